"""Diagnoses what a pytest test measures: one fresh process times it, another one profiles it."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pytest_gpuperf import confirm
from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.lease import lease
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.records import KernelSummary, Results, TestKey, TestRecord, decode_lines
from pytest_gpuperf.trials.ab import interrupted_by_sigterm
from pytest_gpuperf.trials.diagnose import (
    Bench,
    Part,
    Report,
    Wanted,
    ceilings_of,
    check_choices,
    dtype_of,
    from_measurement,
    notes_on,
)

#: Measured once, and nothing is judged: what the test is compared with is the device.
_OPTIONS = (
    *("--gpuperf-budget=0", "--gpuperf-anchors=off", "--gpuperf-expectations=off"),
    *("--gpuperf-missing=pass", "--gpuperf-invalid=warn", "-p", "no:cacheprovider"),
)

#: pytest, its imports and the test's fixtures come on top of what the user gives the test.
_LEAST_TIMEOUT_S = 300.0


def is_test(name: str) -> bool:
    """Whether this names a test or a file of tests, and no known workload."""
    return "::" in name or name.endswith(".py")


@interrupted_by_sigterm()
def diagnose_test(wanted: Wanted, bench: Bench, *, device: str = "auto") -> Report:
    """Run a test, profile it, and say what limits each metric that has a time.

    Args:
        wanted: Its workload is a node id of pytest, in the current folder.
        bench: What runs here.
        device: For pytest: auto, cuda or cpu.

    Raises:
        UsageError: There is no such test, or it measures no time.
        MeasurementError: It failed, or ran into the time limit.
    """
    check_choices(wanted)
    test = wanted.workload or ""
    records = _timed(test, device=device, timeout_s=_LEAST_TIMEOUT_S + wanted.limit_s).tests
    devices = _devices_of(records, bench)
    with lease([devices]) as held, bench.machine.current(devices[0]):
        profiles, problem = confirm.profile(
            records,
            _invocation((test, f"--gpuperf-device={device}", *_OPTIONS), _root_of(test, records[0].key.module)),
            leased=tuple(one.uuid_hash for one in devices),
            setup_s=0.0,
            descriptors=held.descriptors,
        )
        seen = {(one.key, one.metric): one.kernels for one in profiles}
        parts = _parts(records, seen, wanted, bench, devices)
    if not parts:
        metrics = [f"{one.metric} in {one.unit or '%'}" for record in records for one in record.measurements]
        raise UsageError(
            f"{test} measures {', '.join(metrics) or 'nothing'}, and no time of a call. Diagnose a test that uses "
            "gpu_benchmark, or one that records a time; or a model with --model."
        )
    ceilings = parts[0].diagnosis.ceilings
    return Report(
        title=test,
        device=devices[0].name,
        ceilings=ceilings,
        parts=tuple(parts),
        notes=(*((f"No kernels are known: {problem}.",) if problem else ()), *notes_on(devices, ceilings)),
    )


def _parts(
    records: Sequence[TestRecord],
    seen: dict[tuple[TestKey, str], KernelSummary],
    wanted: Wanted,
    bench: Bench,
    devices: tuple[Device, ...],
) -> list[Part]:
    timed = [(record.key, one) for record in records for one in record.measurements if one.time_s is not None]
    dtypes = {dtype_of(one, devices[0]) for _, one in timed}
    ceilings = {dtype: ceilings_of(wanted.ceilings, bench, devices[0], dtype) for dtype in sorted(dtypes)}
    return [
        from_measurement(
            one,
            seen.get((key, one.metric)),
            machine=bench.machine,
            devices=devices,
            ceilings=ceilings[dtype_of(one, devices[0])],
        )
        for key, one in timed
    ]


def _timed(test: str, *, device: str, timeout_s: float) -> Results:
    """Run the test as it is; what it measured."""
    with tempfile.TemporaryDirectory(prefix="gpuperf-") as name:
        path = Path(name) / "results.jsonl"
        # a folder without baselines: a test that got slower is one to diagnose, and shall not fail
        own = (f"--gpuperf-device={device}", f"--gpuperf-json={path}", f"--gpuperf-baselines={name}/none")
        arguments = (test, *own, *_OPTIONS)
        finished = run_group([sys.executable, "-m", "pytest", *arguments], timeout_s=timeout_s)
        if finished.code in (4, 5):
            last = finished.tail.strip().splitlines()[-1:] or [""]
            raise UsageError(f"pytest found no test {test}: {last[0].strip('= ')}")
        if finished.code != 0:
            print(finished.tail, file=sys.stderr)  # noqa: T201 - what pytest said is what the user needs
            raise MeasurementError(
                f"pytest {test} {finished.in_words}, so there is nothing to diagnose. Mend it first."
            )
        found = decode_lines(path.read_bytes().splitlines(keepends=True)) if path.exists() else None
    if found is None or not found.tests:
        raise UsageError(f"{test} measured nothing: it was skipped, or uses neither gpu_benchmark nor perf.")
    return found


def _devices_of(records: Sequence[TestRecord], bench: Bench) -> tuple[Device, ...]:
    """The devices that the first test held."""
    known = {device.uuid_hash: device for device in bench.machine.devices}
    return tuple(known[name] for name in records[0].devices if name in known) or bench.machine.devices[:1]


def _root_of(test: str, module: str) -> Path:
    """pytest's root folder, which it names test modules from: here, or above."""
    path, parts = Path(os.path.abspath(test.partition("::")[0])), Path(module).parts  # noqa: PTH100 - as pytest, links stay
    return Path(*path.parts[: -len(parts)]) if path.parts[-len(parts) :] == parts else Path.cwd()


def _invocation(arguments: tuple[str, ...], root: Path) -> confirm.Invocation:
    return confirm.Invocation(arguments=arguments, folder=Path.cwd(), root=root, environment=dict(os.environ))
