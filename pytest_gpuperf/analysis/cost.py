"""What tokens cost: a measured throughput and a price per hour."""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import geometric_mean

import msgspec

from pytest_gpuperf.analysis.gpu_kinds import is_kind
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Measurement, Record, TestRecord
from pytest_gpuperf.stats import mean_of_known

#: Version of the layout of prices. 1: the first.
PRICES_SCHEMA = 1


class Price(Record, frozen=True, kw_only=True):
    """What one kind of machine with GPUs costs.

    Attributes:
        instance: The provider's name of the machine; `--price` for a price given on the command line.
        gpu: Kind of its GPUs: see `gpu_kinds.is_kind`.
        count: GPUs in it.
        per_hour: Of the whole machine, in `currency`.
        currency: ISO 4217, such as `USD`.
        date: When this was the price: a year, a month or a day; empty where that is not known.
        retrieved: When it was read at its source.
        source: Where it is from.
    """

    instance: str
    gpu: str
    count: int
    per_hour: float
    currency: str = "USD"
    date: str = ""
    retrieved: str = ""
    source: str = ""

    @property
    def per_gpu_hour(self) -> float:
        """Of one GPU, with its share of the machine."""
        return self.per_hour / self.count


class PriceTable(Record, frozen=True, kw_only=True):
    """data/prices.json, and a file of prices of one's own."""

    schema: int
    prices: tuple[Price, ...]


class Throughput(Record, frozen=True, kw_only=True):
    """Tokens a second of some GPUs.

    Attributes:
        test: Test that measured it; empty for a number given by hand.
        metric: Its name, with the size where it is one point of a curve.
        tokens_per_s: On all of the GPUs together.
        gpu: Name of the device.
        gpus: How many.
        gpu_busy_share: Part of the measured time in which a kernel ran, 0 to 1; `None` if it was not measured.
    """

    test: str
    metric: str
    tokens_per_s: float
    gpu: str
    gpus: int
    gpu_busy_share: float | None = None


class Cost(Record, frozen=True, kw_only=True):
    """What a throughput costs. All amounts are in the price's currency.

    Attributes:
        throughput: What was measured.
        price: What a machine with such GPUs costs. Only the GPUs used are counted.
    """

    throughput: Throughput
    price: Price

    @property
    def per_hour(self) -> float:
        """Of the GPUs used."""
        return self.price.per_gpu_hour * self.throughput.gpus

    @property
    def per_million_tokens(self) -> float:
        """Cost of 1,000,000 tokens. The time in which the GPU waited is in it, because the throughput has it."""
        return self.per_hour * 1e6 / (3600 * self.throughput.tokens_per_s)

    @property
    def tokens_per_unit(self) -> float:
        """Tokens for one unit of the currency."""
        return 1e6 / self.per_million_tokens

    @property
    def per_busy_hour(self) -> float | None:
        """The effective price: what an hour costs in which the GPUs compute. `None` without a busy share."""
        share = self.throughput.gpu_busy_share
        return self.per_hour / share if share else None

    @property
    def waiting_per_million_tokens(self) -> float | None:
        """Part of `per_million_tokens` that is paid for GPUs that wait. `None` without a busy share."""
        share = self.throughput.gpu_busy_share
        return self.per_million_tokens * (1 - share) if share else None

    @property
    def alone_per_million_tokens(self) -> float | None:
        """Cost of 1,000,000 tokens where the machine's other GPUs stand idle; `None` where all are used."""
        machines = math.ceil(self.throughput.gpus / self.price.count)
        rented = machines * self.price.count
        return None if rented == self.throughput.gpus else self.per_million_tokens * rented / self.throughput.gpus


def read_prices(path: Path | None = None) -> tuple[Price, ...]:
    """Read a table of prices; by default the one that comes with this package.

    Raises:
        UsageError: There is no such file, it is not a table of prices, or a price is 0 or negative.
    """
    place = str(path) if path else "data/prices.json"
    try:
        text = path.read_bytes() if path else files("pytest_gpuperf").joinpath("data", "prices.json").read_bytes()
        table = msgspec.json.decode(text, type=PriceTable)
    except OSError as error:
        raise UsageError(f"Cannot read the prices in {place}: {error.strerror}.") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"{place} is not a table of prices: {error}. See docs/cost.md for its layout.") from None
    if table.schema > PRICES_SCHEMA:
        raise UsageError(f"{place} has schema {table.schema}, this version reads {PRICES_SCHEMA}. Upgrade.")
    for price in table.prices:
        _refuse_impossible(price, place)
    return table.prices


def _refuse_impossible(price: Price, place: str) -> None:
    if not (math.isfinite(price.per_hour) and price.per_hour > 0):
        raise UsageError(f"{place}: {price.instance} costs {price.per_hour:g} per hour. A price is a number above 0.")
    if price.count < 1:
        raise UsageError(f"{place}: {price.instance} has {price.count} GPUs. A machine with a price has 1 or more.")


def own_price(per_gpu_hour: float, gpu: str) -> Price:
    """Make a price from a number: dollars for an hour of one GPU.

    Raises:
        UsageError: It is 0, negative or no number.
    """
    if not (math.isfinite(per_gpu_hour) and per_gpu_hour > 0):
        raise UsageError(
            f"--price {per_gpu_hour:g} is not a price. Give the dollars for an hour of one GPU, a number above 0; "
            "of a machine with 8, an eighth of its price."
        )
    return Price(instance="--price", gpu=gpu, count=1, per_hour=per_gpu_hour)


def price_of(gpu: str, prices: Sequence[Price], *, instance: str | None = None) -> Price:
    """Find what a GPU costs; of several machines, the one with the least for an hour of a GPU.

    Args:
        gpu: Name of the device, or a kind such as `A100`.
        prices: The table.
        instance: The machine to take, by its name.

    Raises:
        UsageError: No price for this GPU or several currencies, no such machine, or it has other GPUs.
    """
    if instance is not None:
        return _of_instance(gpu, prices, instance)
    found = [price for price in prices if is_kind(gpu, price.gpu) or is_kind(price.gpu, gpu)]
    if not found:
        raise UsageError(
            f"No price for {gpu}. Known: {_known(prices)}. Give one with --price DOLLARS_PER_GPU_HOUR, "
            "or a table of your own with --prices FILE."
        )
    if len(currencies := sorted({price.currency for price in found})) > 1:
        raise UsageError(
            f"{gpu} has prices in {' and '.join(currencies)}, which cannot be compared. Name the machine: --instance."
        )
    return min(found, key=lambda price: price.per_gpu_hour)


def _of_instance(gpu: str, prices: Sequence[Price], instance: str) -> Price:
    price = next((one for one in prices if one.instance.casefold() == instance.casefold()), None)
    if price is None:
        raise UsageError(f"No price for an instance {instance!r}. Known: {_known(prices)}.")
    if not (is_kind(gpu, price.gpu) or is_kind(price.gpu, gpu)):
        raise UsageError(
            f"{price.instance} has {price.gpu}, but the throughput is of {gpu}. "
            "Measure on that instance, or give the price of this GPU."
        )
    return price


def _known(prices: Sequence[Price]) -> str:
    return ", ".join(f"{price.gpu} ({price.instance})" for price in prices) or "none"


class PriceSource(Record, frozen=True, kw_only=True):
    """Where a price is from: a number, or a machine of a table.

    Attributes:
        per_gpu_hour: Dollars for an hour of one GPU; `None`: look it up.
        table: File of prices; `None`: the one of this package.
        instance: The machine to take, by its name; `None`: the one with the least for an hour of a GPU.
    """

    per_gpu_hour: float | None = None
    table: Path | None = None
    instance: str | None = None


def costs(found: Sequence[Throughput], source: PriceSource, *, only: str | None = None) -> tuple[Cost, ...]:
    """Say what throughputs cost.

    Args:
        found: What was measured.
        source: Of the price.
        only: GPU that all of them must be of.

    Raises:
        UsageError: Two prices were given, none is known, or something was measured on another GPU.
    """
    if source.per_gpu_hour is not None and (source.table or source.instance):
        raise UsageError("--price is a price by itself. Drop it, or drop --prices and --instance.")
    other = next((one for one in found if only and not is_kind(one.gpu, only)), None)
    if other is not None:
        raise UsageError(
            f"The results are of {other.gpu}, not of {only}. What tokens cost on {only} has to be measured there."
        )
    if source.per_gpu_hour is not None:
        return tuple(Cost(throughput=one, price=own_price(source.per_gpu_hour, one.gpu)) for one in found)
    prices = read_prices(source.table)
    return tuple(Cost(throughput=one, price=price_of(one.gpu, prices, instance=source.instance)) for one in found)


def given_throughput(
    tokens_per_s: float, *, gpu: str | None, gpus: int, busy: float | None, has_price: bool
) -> Throughput:
    """Take a throughput by hand.

    Raises:
        UsageError: A number that cannot be, or nothing says which GPU's price counts.
    """
    if not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
        raise UsageError(f"--throughput {tokens_per_s:g} is not a number of tokens a second above 0.")
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: a throughput takes 1 GPU or more.")
    if busy is not None and not 0 < busy <= 1:
        raise UsageError(f"--busy {busy:g} is no part of the time. Write 0.65 for 65 %.")
    if gpu is None and not has_price:
        raise UsageError("Whose price? Add --gpu, such as --gpu T4, or --price DOLLARS_PER_GPU_HOUR.")
    return Throughput(
        test="", metric="as given", tokens_per_s=tokens_per_s, gpu=gpu or "GPU", gpus=gpus, gpu_busy_share=busy
    )


def throughputs(tests: Sequence[TestRecord]) -> tuple[Throughput, ...]:
    """Find everything measured in tokens a second; a curve counts point by point.

    Of a test that was measured again in fresh processes, these alone count, with their geometric mean.

    Raises:
        UsageError: There is nothing.
    """
    found = tuple(
        one
        for record in tests
        for measurement in record.measurements
        if measurement.unit == "tok/s"
        for one in _of_metric(record, measurement)
    )
    if not found:
        units = sorted({measurement.unit or "%" for record in tests for measurement in record.measurements})
        raise UsageError(
            f"The results hold nothing in tok/s, which costs are computed from, but {', '.join(units) or 'nothing'}. "
            "Run a test that records a throughput, or give a number with --throughput."
        )
    return found


def _of_metric(record: TestRecord, first: Measurement) -> list[Throughput]:
    runs = record.runs_of(first.metric)
    fresh = runs[1:] or runs  # the first of several was repeated because it stood out
    whole = Throughput(
        test=str(record.key),
        metric=first.metric,
        tokens_per_s=geometric_mean(run.value for run in fresh),
        gpu=record.environment.hardware.name,
        gpus=record.environment.hardware.count,
        gpu_busy_share=mean_of_known(run.gpu_busy_share for run in fresh),
    )
    curves = [run.curve for run in fresh if run.curve]
    if not curves:
        return [whole]
    return [
        msgspec.structs.replace(
            whole,
            metric=f"{first.metric}, {curves[0].x} {size}",
            tokens_per_s=geometric_mean(curve.points[size] for curve in curves if size in curve.points),
            gpu_busy_share=None,  # that of the whole curve says nothing of a point
        )
        for size in sorted(curves[0].points, key=int)
    ]
