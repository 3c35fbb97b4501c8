"""Units: which way is better, SI inside, and the only place that converts, when parsing or printing."""

import math
import re
from typing import Literal

from pytest_gpuperf.errors import UsageError

Better = Literal["lower", "higher"]

_LARGE = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_ENERGY = {"k": 1e3, **_SMALL}

#: Base unit -> prefixes that are printed before it and read before it, the largest first.
_PREFIXES: dict[str, dict[str, float]] = {
    **dict.fromkeys(("s", "s/tok", "s/req"), _SMALL),
    **dict.fromkeys(("B", "B/s", "FLOP/s"), _LARGE),
    **dict.fromkeys(("J", "J/tok"), _ENERGY),
    "W": {**_LARGE, "m": 1e-3},
}

#: unit as written -> (base unit, factor)
_TO_BASE: dict[str, tuple[str, float]] = {
    **{
        f"{prefix}{base}": (base, factor) for base, prefixes in _PREFIXES.items() for prefix, factor in prefixes.items()
    },
    **{f"µ{base}": (base, 1e-6) for base in ("s", "s/tok", "s/req")},
    **{f"{prefix}FLOPS": ("FLOP/s", factor) for prefix, factor in _LARGE.items() if factor >= 1e9},
    **{
        f"{prefix}iB{per}": (f"B{per}", 2.0**power)
        for prefix, power in (("K", 10), ("M", 20), ("G", 30))
        for per in ("", "/s")
    },
    "%": ("", 1e-2),
}

_DIRECTION: dict[str, Better] = {
    **dict.fromkeys(("s", "B", "W", "J", "J/tok", "s/tok", "s/req"), "lower"),
    **dict.fromkeys(("FLOP/s", "B/s", "tok/s", "req/s", "it/s", "img/s", "tok/J", "tok/s/W"), "higher"),
}


def to_base(value: float, unit: str) -> tuple[float, str]:
    """Convert a value to the base unit that results and baselines are kept in.

    Args:
        value: The number as the user gave it.
        unit: `ms`, `GB/s`, `TFLOP/s`, `tok/s`, ...; a unit that is not known is kept as it is.

    Returns:
        The value and its base unit (`s`, `B`, `B/s`, `FLOP/s`, `W`, `J`, ...).

    >>> to_base(12.5, "ms")
    (0.0125, 's')
    """
    base, factor = _TO_BASE.get(unit, (unit, 1.0))
    return value * factor, base


def direction(unit: str, *, better: Better | None = None, contradicts_unit: bool = False) -> Better:
    """Say which way is better for a metric of this unit.

    Args:
        unit: Unit as the user wrote it or its base unit.
        better: The user's own word, needed where the unit says nothing (`%`, a count).
        contradicts_unit: Must be set for a direction against the unit's own, such as a time that should be long.

    Raises:
        UsageError: The unit has no direction and none was given, or the two contradict.
    """
    if better not in (None, "lower", "higher"):
        raise UsageError(f"better={better!r} is not a direction. Valid: 'lower', 'higher'.")
    known = _DIRECTION.get(to_base(1.0, unit)[1])
    if known is None and better is None:
        raise UsageError(
            f"The unit {unit!r} does not say whether more or less is better. Add better='lower' or better='higher'."
        )
    if known and better and known != better and not contradicts_unit:
        raise UsageError(
            f"better={better!r} contradicts the unit {unit!r}, where {known} is better. "
            "Correct one of them, or add contradicts_unit=True if it is meant."
        )
    return better or known or "lower"


def is_of_time(unit: str) -> bool:
    """Whether a base unit says how long something takes, or how much of it is done in a time.

    >>> is_of_time("tok/s"), is_of_time("s/req"), is_of_time("B")
    (True, True, False)
    """
    return unit in ("s", "s/tok", "s/req") or unit.endswith("/s")


def worse_log(value: float, better: Better) -> float:
    """Return the logarithm of a value above 0, with its sign so that more is worse."""
    return math.log(value) if better == "lower" else -math.log(value)


def from_worse_log(log: float, better: Better) -> float:
    """Return the value, or the factor, of a logarithm of which more is worse."""
    return math.exp(log if better == "lower" else -log)


def parse_tolerance(value: object) -> float:
    """Read a tolerance: a fraction (`0.05`) or a percentage with its sign (`"5%"`).

    Raises:
        UsageError: Anything else. A bare `5` is refused, because it could mean 5 % or 500 %.
    """
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", value)):
        fraction = float(match[1]) / 100
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        fraction = float(value)
    else:
        raise UsageError(f"tolerance={value!r} is not a number. Write 0.05 or '5%'.")
    if not math.isfinite(fraction) or not 0 < fraction < 1:
        raise UsageError(
            f"tolerance={value!r} is outside 0 to 1 (0 % to 100 %). A tolerance of 5 % is written 0.05 or '5%'."
        )
    return fraction


def format_value(value: float, unit: str, *, digits: int = 4) -> str:
    """Print a base-unit value with a readable prefix, such as `690.2 TFLOP/s`, `3.002 TB/s` or `1.616 ms`."""
    if unit == "":
        value, unit = value * 100, "%"
    if value == 0 or not math.isfinite(value):
        return f"{value:zg} {unit}"
    prefixes = _PREFIXES.get(unit, {"": 1.0})
    # Chosen by what will be printed, so that 999.96 us is 1.000 ms.
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    prefix = next((prefix for prefix, factor in prefixes.items() if rounded >= factor), list(prefixes)[-1])
    return f"{_significant(value / prefixes[prefix], digits)} {prefix}{unit}"


def counted(count: int, noun: str) -> str:
    """Print a number of things: `1 session`, `3 sessions`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_percent(fraction: float, *, signed: bool = False) -> str:
    """Print a fraction as a percentage with two significant digits: `3.1 %`, `0.05 %`, `12 %`."""
    percent = fraction * 100
    decimals = 2 if abs(percent) < 0.995 else 1 if abs(percent) < 9.95 else 0
    return f"{percent:{'+' if signed else ''}z.{decimals}f} %"


def _significant(value: float, digits: int) -> str:
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if not -5 <= exponent <= 15:
        return f"{value:.{digits}g}"
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"
