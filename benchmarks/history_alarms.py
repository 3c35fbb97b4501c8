"""How often an unchanged series shows a step, and how often a step is found, by simulation.

    python benchmarks/history_alarms.py [--series 20000]

Prints one line a kind of noise with the rate of false alarms, then one line a step with the rate of finding it within
two runs of where it is.
"""

import argparse
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from pytest_gpuperf.analysis.changes import steps

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Floats]

NOISE, FLOOR = 0.005, 0.0005


def autoregressive(rng: np.random.Generator, count: int) -> Floats:
    """AR(1) with a coefficient of 0.5, begun long before."""
    shocks = rng.normal(size=count + 50)
    for i in range(1, len(shocks)):
        shocks[i] += 0.5 * shocks[i - 1]
    return shocks[50:]


def bimodal(rng: np.random.Generator, count: int) -> Floats:
    """Two modes, 10 deviations apart, drawn anew each time."""
    return 0.3 * rng.normal(size=count) + 3.0 * rng.integers(0, 2, count)


def spiky(rng: np.random.Generator, count: int) -> Floats:
    """White, with 3 % of the values 20 deviations off."""
    return rng.normal(size=count) + 20.0 * (rng.random(count) < 0.03)


def louder(rng: np.random.Generator, count: int) -> Floats:
    """White, four times as loud in the second half."""
    return rng.normal(size=count) * np.where(np.arange(count) < count // 2, 1.0, 4.0)


KINDS: dict[str, Noise] = {
    "white": lambda rng, count: rng.normal(size=count),
    "t with 3 degrees of freedom": lambda rng, count: rng.standard_t(3, size=count),
    "Cauchy": lambda rng, count: rng.standard_cauchy(size=count),
    "AR(1), 0.5": autoregressive,
    "bimodal": bimodal,
    "3 % spikes": spiky,
    "louder in the second half": louder,
}


def pool(rng: np.random.Generator, count: int, devices: int) -> tuple[Floats, Sequence[Hashable]]:
    """White noise on a device drawn from so many, whose own offsets are four times as large."""
    which = rng.integers(0, devices, count)
    return rng.normal(size=count) + 4 * rng.normal(size=devices)[which], which.tolist()


def alarms(series: int, draw: Callable[[np.random.Generator], tuple[Floats, Sequence[Hashable]]]) -> float:
    """Share of the series with any step."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(series):
        values, devices = draw(rng)
        found += bool(steps((NOISE * values).tolist(), devices, floor=FLOOR))
    return found / series


def hits(series: int, before: int, after: int, size: float) -> float:
    """Share of the series in which a step of so many deviations is found within two runs."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(series):
        values = rng.normal(size=before + after)
        values[before:] += size
        places = [step.at for step in steps((NOISE * values).tolist(), [0] * len(values), floor=FLOOR)]
        found += any(abs(at - before) <= 2 for at in places)
    return found / series


def main() -> None:
    """Print all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=20000)
    series = parser.parse_args().series
    print(f"false alarms in {series} series of unchanged runs")
    for count in (10, 30, 100):
        for name, kind in KINDS.items():
            rate = alarms(series, lambda rng, count=count, kind=kind: (kind(rng, count), [0] * count))  # type: ignore[misc]
            print(f"  {count:5} {name:<28} {rate:8.3%}", flush=True)
        for devices in (4, 10 * count):
            rate = alarms(series, lambda rng, count=count, devices=devices: pool(rng, count, devices))  # type: ignore[misc]
            print(f"  {count:5} {f'white, of {devices} devices':<28} {rate:8.3%}", flush=True)
    print("steps found within two runs, white noise, 100 runs before")
    for after in (3, 5, 10, 30):
        shares = [f"{size:g} sd {hits(series // 20, 100, after, size):4.0%}" for size in (2, 2.5, 3, 4, 6)]
        print(f"  {after:5} runs after  {'   '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
