"""What tokens cost, in words: one block for each kind of GPU and price, one row for each throughput."""

from collections.abc import Sequence

from pytest_gpuperf.analysis.cost import Cost, Price, Throughput
from pytest_gpuperf.report.terminal import Line
from pytest_gpuperf.units import format_percent

_SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£"}


def cost_lines(costs: Sequence[Cost], *, width: int = 80) -> list[Line]:
    """Say what each throughput costs: per million tokens, tokens for a dollar, and what the waiting GPU takes of it.

    Args:
        costs: At least one.
        width: Of the terminal.
    """
    lines: list[Line] = []
    groups: dict[tuple[Price, int, str], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.price, cost.throughput.gpus, cost.throughput.gpu), []).append(cost)
    for group in groups.values():
        lines += _group_lines(group, width)
    return lines


def _group_lines(group: Sequence[Cost], width: int) -> list[Line]:
    price = group[0].price
    name_width = max(width - 44, 12)
    unit = _SYMBOLS.get(price.currency, f"1 {price.currency}")
    lines = [
        *(Line(text=text) for text in _header(group[0])),
        Line(text=f"{'':<{name_width}} {'tok/s':>10} {'per 1M tok':>12} {f'tok per {unit}':>13} {'busy':>5}"),
    ]
    test = ""
    for cost in group:
        if cost.throughput.test != test:
            test = cost.throughput.test
            lines.append(Line(text=test))
        lines += _row(cost, name_width)
    return lines


def _header(cost: Cost) -> list[str]:
    price, gpus = cost.price, cost.throughput.gpus
    if price.instance == "--price":
        of = "as given by --price"
    else:
        machine = price.instance if price.count == 1 else f"a GPU's share of {price.instance} with {price.count}"
        of = machine + _when(price)
    count = "" if gpus == 1 else f"{gpus} x "
    total = "" if gpus == 1 else f", {money(cost.per_hour, price.currency)} together"
    lines = [
        f"{count}{cost.throughput.gpu} at {money(price.per_gpu_hour, price.currency)} per GPU-hour{total}",
        f"  {of}",
    ]
    if cost.alone_per_million_tokens is not None:
        factor = cost.alone_per_million_tokens / cost.per_million_tokens
        lines.append(f"  While the machine's other GPUs stand idle, it costs {factor:.3g} times as much.")
    return lines


def _when(price: Price) -> str:
    if price.date:
        return f", price of {price.date}"
    return f", price as retrieved {price.retrieved}" if price.retrieved else ""


def _row(cost: Cost, name_width: int) -> list[Line]:
    found: Throughput = cost.throughput
    share = "-" if found.gpu_busy_share is None else f"{found.gpu_busy_share * 100:.0f} %"
    currency = cost.price.currency
    cells = (
        f"{_number(found.tokens_per_s):>10} {money(cost.per_million_tokens, currency):>12} "
        f"{cost.tokens_per_unit:>13,.0f} {share:>5}"
    )
    name = f" {found.metric}"
    lines = [Line(text=f"{name:<{name_width}} {cells}")]
    if len(name) > name_width:
        lines = [Line(text=name), Line(text=f"{'':<{name_width}} {cells}")]
    if cost.per_busy_hour is not None and cost.waiting_per_million_tokens is not None:
        text = (
            f"   {format_percent(found.gpu_busy_share or 0.0)} busy: {money(cost.per_busy_hour, currency)} per hour of "
            f"computing; {money(cost.waiting_per_million_tokens, currency)} per 1M tok is for waiting"
        )
        lines.append(Line(text=text))
    return lines


def money(amount: float, currency: str) -> str:
    """Print an amount: four significant digits below 1,000, two decimals from there on.

    >>> money(0.73056, "USD"), money(1234.5, "CHF")
    ('$0.7306', '1,234.50 CHF')
    """
    text = f"{amount:,.2f}" if amount >= 999.95 else _number(amount)
    symbol = _SYMBOLS.get(currency)
    return f"{symbol}{text}" if symbol else f"{text} {currency}"


def _number(value: float) -> str:
    """Four significant digits, never an exponent for what people pay."""
    if value >= 9999.5:
        return f"{value:,.0f}"
    if value < 1e-6:
        return f"{value:.4g}"
    exponent = int(f"{value:.3e}".partition("e")[2])
    return f"{value:,.{max(3 - exponent, 0)}f}"
