"""Units: which way is better, SI inside, and the only place that converts, when parsing or printing."""

import math
import re
from typing import Literal

from pytest_gpuperf.errors import UsageError

Better = Literal["lower", "higher"]

_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_FLOPS = {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOP/s": 1e15}
_POWER = {"W": 1.0, "mW": 1e-3, "kW": 1e3}
_ENERGY = {"J": 1.0, "mJ": 1e-3, "kJ": 1e3}

#: unit as written -> (base unit, factor)
_TO_BASE: dict[str, tuple[str, float]] = {
    **{unit: ("s", factor) for unit, factor in _TIME.items()},
    **{unit: ("B", factor) for unit, factor in _BYTES.items()},
    **{f"{unit}/s": ("B/s", factor) for unit, factor in _BYTES.items()},
    **{unit: ("FLOP/s", factor) for unit, factor in _FLOPS.items()},
    **{unit: ("W", factor) for unit, factor in _POWER.items()},
    **{unit: ("J", factor) for unit, factor in _ENERGY.items()},
    **{f"{unit}/tok": ("J/tok", factor) for unit, factor in _ENERGY.items()},
    "%": ("", 1e-2),
}

_DIRECTION: dict[str, Better] = {
    **dict.fromkeys(("s", "B", "W", "J", "J/tok", "s/tok", "s/req"), "lower"),
    **dict.fromkeys(("FLOP/s", "B/s", "tok/s", "req/s", "it/s", "img/s", "tok/J", "tok/s/W"), "higher"),
}

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


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
        return f"{value * 100:.{max(digits - 2, 0)}f} %"
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    if unit in ("s", "J", "J/tok", "s/tok", "s/req"):
        scale, prefix = next(((s, p) for s, p in _SMALL_PREFIXES if abs(value) >= s * 0.9999995), (1e-9, "n"))
        return f"{_significant(value / scale, digits)} {prefix}{unit}"
    if unit in ("B", "B/s", "FLOP/s", "W"):
        scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s * 0.9999995), (1.0, ""))
        return f"{_significant(value / scale, digits)} {prefix}{unit}"
    return f"{_significant(value, digits)} {unit}"


def format_percent(fraction: float, *, signed: bool = False) -> str:
    """Print a fraction as a percentage with two significant digits: `3.1 %`, `0.05 %`, `12 %`."""
    percent = fraction * 100
    decimals = 2 if abs(percent) < 0.995 else 1 if abs(percent) < 9.95 else 0
    return f"{percent:{'+' if signed else ''}.{decimals}f} %"


def _significant(value: float, digits: int) -> str:
    whole_digits = max(len(str(int(abs(value)))), 1)
    return f"{value:.{max(digits - whole_digits, 0)}f}"
