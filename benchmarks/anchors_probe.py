"""How well the anchors repeat on this machine, and what they cost; beside them other products that could be the anchor.

    python benchmarks/anchors_probe.py [--times 10] [--device auto] [--candidates]

Measures them in one process. Run it in several, and on several machines, for the spread between those.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from pytest_gpuperf.anchors import ANCHORS, Anchor, measure_anchors
from pytest_gpuperf.devices import Device
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.records import Measurement
from pytest_gpuperf.timing import Call
from pytest_gpuperf.units import format_value
from pytest_gpuperf.workloads.matmul import Matmul

#: Size and type of products to compare with the anchor's own, float16 at 4096.
CANDIDATES = ((1024, "float16"), (2048, "float16"), (4096, "bfloat16"), (8192, "float16"), (2048, "float32"))


def product(n: int, dtype: str) -> Callable[[Device], Call]:
    """What builds another matrix product."""
    return lambda device: Matmul(n, dtype=dtype, device=device.device)


def measured(machine: Machine, times: int, names: tuple[str, ...]) -> dict[str, list[tuple[Measurement, float]]]:
    """Name -> measurements and the seconds that each took, all anchors in turn."""
    found: dict[str, list[tuple[Measurement, float]]] = {name: [] for name in names}
    for _ in range(times):
        start_s = time.perf_counter()
        for record in measure_anchors(machine, machine.devices[:1], names=names):
            found[record.key.test].append((record.measurements[0], record.duration_s))
        print(f"  a round of {time.perf_counter() - start_s:.1f} s", flush=True)
    return found


def show(title: str, rows: list[tuple[Measurement, float]]) -> None:
    """One line: mean, spread over the times, the interval within one, clock, power, seconds, first against rest."""
    if not rows:
        print(f"{title:<16} left out: torch, the memory or the type is missing")
        return
    values = [measurement.value for measurement, _ in rows]
    mean = statistics.mean(values)
    cv = statistics.stdev(values) / mean if len(values) > 1 else float("nan")
    within = statistics.mean(measurement.spread or 0.0 for measurement, _ in rows)
    telemetry = rows[-1][0].telemetry
    clock = "-" if telemetry is None or telemetry.sm_clock_mhz is None else f"{telemetry.sm_clock_mhz:.0f} MHz"
    power = "-" if telemetry is None or telemetry.power_w is None else f"{telemetry.power_w:.0f} W"
    unstable = sum(measurement.unstable is not None for measurement, _ in rows)
    print(
        f"{title:<16} {format_value(mean, rows[0][0].unit):>14}  CV {cv:6.2%}"
        f"  range {max(values) / min(values) - 1:6.2%}"
        f"  within {within:6.2%}  first {values[0] / mean - 1:+6.2%}  {clock:>8} {power:>6}"
        f"  {statistics.mean(seconds for _, seconds in rows):.2f} s  {unstable} unstable  ({rows[0][0].method})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--candidates", action="store_true", help="other products too, GPU only")
    arguments = parser.parse_args()
    machine = Machine(arguments.device)
    print(machine.devices[0].name)
    for name, rows in measured(machine, arguments.times, tuple(ANCHORS)).items():
        show(name, rows)
    own: Anchor = ANCHORS["gemm"]
    for n, dtype in CANDIDATES if arguments.candidates else ():
        ANCHORS["gemm"] = replace(own, make=product(n, dtype))
        show(f"{dtype} {n}", measured(machine, arguments.times, ("gemm",))["gemm"])


if __name__ == "__main__":
    main()
