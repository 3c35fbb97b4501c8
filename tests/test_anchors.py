"""The anchors: what is measured, what they are compared with, when the machine is not its usual self."""

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import pytest
from epochs import append
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf import anchors
from pytest_gpuperf.anchors import (
    ANCHORS,
    IDS,
    MODULE,
    AnchorVerdict,
    best_covariate,
    check_anchors,
    is_wanted,
    judge_anchors,
    measure_anchors,
)
from pytest_gpuperf.baseline_file import baseline_path, dumps, list_files, read
from pytest_gpuperf.baseline_store import prune, write
from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import DeviceError, MeasurementError, NotSupported
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuInfo
from pytest_gpuperf.priors import prior_of
from pytest_gpuperf.records import BaselineFile, RunInfo, TestKey, TestRecord
from pytest_gpuperf.report.controller import unused_entries
from pytest_gpuperf.stats import SessionLogs, predict, variance_components
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_machine, fake_state
from pytest_gpuperf.timing import Call

GEMM_S, LAUNCH_S = 2e-4, 4e-6
NOISE = (0.001, -0.001, 0.002, -0.002, 0.0005, -0.0015, 0.001, -0.0005)


def machine(gemm_s: float = GEMM_S, *gpus: GpuInfo) -> Machine:
    return fake_machine(*gpus, anchors={"gemm": lambda: gemm_s, "launch": lambda: LAUNCH_S})


def measured(gemm_s: float = GEMM_S) -> tuple[TestRecord, ...]:
    fake = machine(gemm_s)
    return measure_anchors(fake, fake.devices)


def run_info(number: int) -> RunInfo:
    return RunInfo(schema=1, run_id=f"run-{number}", date="2026-11-21T00:00:00+00:00", visit=f"visit-{number}")


def file_of(count: int, change: Callable[[TestRecord], TestRecord] = lambda record: record) -> BaselineFile:
    """Baselines with this many sessions, whose times differ by `NOISE`."""
    file = None
    for number in range(count):
        for record in measured(GEMM_S * (1 + NOISE[number % len(NOISE)])):
            file = append(file, run_info(number), change(record), ["time"])
    assert file is not None
    return file


@cache
def usual_file() -> BaselineFile:
    return file_of(8)


def judged(gemm_s: float, sessions: int = 8) -> AnchorVerdict:
    return judge_anchors(measured(gemm_s), file_of(sessions), visit="now")


def with_versions(record: TestRecord, **versions: str) -> TestRecord:
    environment = msgspec.structs.replace(record.environment, versions={**record.environment.versions, **versions})
    return msgspec.structs.replace(record, environment=environment)


# What is measured


def test_an_anchor_is_a_test_of_a_module_of_its_own() -> None:
    fake = machine()
    gemm, launch = measure_anchors(fake, fake.devices, label="Pool A")
    assert (gemm.key, launch.key) == (TestKey(module=MODULE, test="gemm"), TestKey(module=MODULE, test="launch"))
    assert (gemm.slug, gemm.devices) == ("nvidia-h100-80gb-hbm3+pool-a", (fake.devices[0].uuid_hash,))
    assert gemm.environment == fake.environment(fake.devices)
    assert gemm.measurements[0].value == pytest.approx(GEMM_S)
    assert gemm.measurements[0].telemetry is not None
    assert (gemm.verdicts, gemm.passed) == ((), True)


def test_each_anchor_has_the_noise_of_its_kind() -> None:
    assert {name: anchor.kind for name, anchor in ANCHORS.items()} == {
        "gemm": "compute",
        "copy": "memory",
        "launch": "host",
        "host": "host",
    }


def test_a_fake_machine_has_no_anchors_unless_it_is_told_so() -> None:
    assert measure_anchors(fake_machine(), fake_machine().devices) == ()
    bare = Machine("auto", nvml=FakeNvml(), make_stopwatch=lambda _: FakeStopwatch())
    assert measure_anchors(bare, bare.devices) == ()


def test_only_the_anchors_that_are_named_are_measured() -> None:
    fake = machine()
    assert [record.key.test for record in measure_anchors(fake, fake.devices, names=["launch"])] == ["launch"]


class Script:
    """A machine whose GPU anchors take another time with each measurement; the host's launch stays as it is.

    Attributes:
        asked: Devices whose clock was asked for, in order.
    """

    def __init__(self, *times_s: float, gpus: int = 1) -> None:
        self.asked: list[str] = []
        self._times_s = iter(times_s)
        self._now_s = 0.0
        self.machine = Machine(
            "auto",
            nvml=FakeNvml(*(fake_gpu(index) for index in range(gpus))),
            make_stopwatch=self._stopwatch,
            anchors={"gemm": lambda: self._now_s, "launch": lambda: LAUNCH_S},
        )

    def _stopwatch(self, device: Device) -> FakeStopwatch:
        self.asked.append(device.device)
        if device.kind == "cuda":
            self._now_s = next(self._times_s)
        return FakeStopwatch()


@pytest.mark.parametrize("times_s", [(2e-4, 3e-4), (3e-4, 2e-4)])
def test_of_several_devices_the_slowest_counts_and_the_host_is_measured_once(times_s: tuple[float, float]) -> None:
    script = Script(*times_s, gpus=2)
    gemm, _ = measure_anchors(script.machine, script.machine.devices)
    assert gemm.measurements[0].value == pytest.approx(3e-4)
    assert gemm.slug == "2x-nvidia-h100-80gb-hbm3"
    assert len(gemm.devices) == 2
    assert script.asked == ["cuda:0", "cuda:1", "cpu"]


def test_four_anchors_take_a_few_seconds_on_a_gpu_and_the_documentation_says_how_many() -> None:
    plans = [anchor.plan for anchor in ANCHORS.values()]
    least_s = sum(plan.warmup_s + plan.measure_s for plan in plans)
    most_s = sum(plan.warmup_limit_s + plan.measure_limit_s for plan in plans)
    page = (Path(__file__).parents[1] / "docs/anchors.md").read_text()
    assert most_s < 4.0
    assert f"take {least_s:.1f} to {most_s:.1f} s together" in page


def test_an_anchor_that_cannot_be_true_is_an_error_that_says_how_to_do_without() -> None:
    fake = fake_machine(anchors={"gemm": lambda: 1e-9})
    with pytest.raises(MeasurementError) as error:
        measure_anchors(fake, fake.devices)
    assert str(error.value) == (
        "The anchor gemm could not be measured: The callable did no work that the clock can see: 1.000 ns a call. "
        "Does it return a cached result, work on another device, or only define a function? "
        "To measure without: --gpuperf-anchors=off"
    )


def test_without_torch_the_hosts_loop_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    cpu = Machine("cpu")
    (host,) = measure_anchors(cpu, cpu.devices)
    assert host.key.test == "host"
    assert str(host.measurements[0].method) == "hot, wall"


def test_a_torch_that_cannot_use_the_gpu_leaves_the_hosts_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_torch(device: object) -> None:
        raise DeviceError("torch cannot use it")

    monkeypatch.setattr(anchors, "check_torch", check_torch)
    real = Machine("auto", nvml=FakeNvml(), anchors=None)
    assert [record.key.test for record in measure_anchors(real, real.devices)] == ["host"]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: Device) -> Call:
        raise NotSupported("it needs 1 GB, and 0.5 GB are free")

    monkeypatch.setitem(ANCHORS, "copy", dataclasses.replace(ANCHORS["copy"], make=full))
    cpu = Machine("cpu")
    assert measure_anchors(cpu, cpu.devices, names=["copy"]) == ()


def test_the_four_anchors_run_on_a_cpu() -> None:
    pytest.importorskip("torch")
    cpu = Machine("cpu")
    records = measure_anchors(cpu, cpu.devices)
    assert [record.key.test for record in records] == ["gemm", "copy", "launch", "host"]
    assert [record.measurements[0].unit for record in records] == ["FLOP/s", "B/s", "s", "s"]
    assert {str(record.measurements[0].method) for record in records} == {"hot, wall"}


@pytest.mark.parametrize(
    ("choice", "on_gpu", "on_cpu"), [("auto", True, False), ("on", True, True), ("off", False, False)]
)
def test_anchors_are_measured_on_gpus_unless_asked_otherwise(choice: str, *, on_gpu: bool, on_cpu: bool) -> None:
    assert is_wanted(choice, fake_machine().devices) == on_gpu  # type: ignore[arg-type]
    assert is_wanted(choice, (cpu_device(),)) == on_cpu  # type: ignore[arg-type]


# When an anchor is off


def test_an_anchor_that_is_as_usual_passes() -> None:
    verdict = judged(GEMM_S)
    assert (verdict.off, verdict.reason, verdict.advice, verdict.note) == ((), None, None, None)
    assert [record.verdicts[0].status for record in verdict.records] == ["PASS", "PASS"]


@pytest.mark.parametrize(("factor", "word"), [(1.05, "slower"), (0.95, "faster")])
def test_an_anchor_that_is_off_says_by_how_much_against_what(factor: float, word: str) -> None:
    verdict = judged(GEMM_S * factor)
    assert verdict.off == ("gemm",)
    assert verdict.reason is not None
    assert verdict.reason.startswith(f"the anchor gemm is 5.0 % {word} than usual, ")
    assert " times its deviation of 0." in verdict.reason
    assert verdict.reason.endswith("(3 are allowed)")


def test_the_advice_names_causes_and_commands() -> None:
    assert judged(GEMM_S * 1.05).advice == (
        "Likely causes: a lower clock or power limit, heat, another process on the GPU. "
        "See: nvidia-smi -q -d PERFORMANCE,CLOCK,POWER,PIDS. If the machine is to stay so: "
        "gpuperf baseline accept --reason WHY anchors.py::gemm"
    )


def unwell(gemm_s: float) -> tuple[TestRecord, ...]:
    """Anchors measured while heat held the clock down."""
    states = [fake_state(), fake_state(hw_thermal_s=1e6)]
    nvml = FakeNvml(states=states)
    ill = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch(), anchors={"gemm": lambda: gemm_s})
    return measure_anchors(ill, ill.devices)


def test_the_illness_of_the_device_is_named_with_the_anchor_that_is_off() -> None:
    verdict = judge_anchors(unwell(3e-4), file_of(8), visit="now")
    assert verdict.off == ("gemm",)
    assert verdict.reason is not None
    assert verdict.reason.endswith("(3 are allowed); thermal slowdown by the hardware for 100 % of the time")


@pytest.mark.parametrize("sessions", [4, 8])
def test_an_anchor_that_is_as_usual_on_an_unwell_device_is_explained_by_the_illness_alone(sessions: int) -> None:
    verdict = judge_anchors(unwell(GEMM_S), file_of(sessions), visit="now")
    (told,) = verdict.records[0].verdicts
    assert (told.status, told.reason) == ("INVALID", "thermal slowdown by the hardware for 100 % of the time")


@pytest.mark.parametrize("sessions", [0, 4, 8])
def test_an_anchor_of_an_unwell_device_is_never_recorded_even_if_it_is_not_off(sessions: int) -> None:
    verdict = judge_anchors(unwell(GEMM_S), file_of(sessions) if sessions else None, visit="now")
    (told,) = verdict.records[0].verdicts
    assert verdict.off == ()
    assert told.status == "INVALID"
    assert told.reason.endswith("thermal slowdown by the hardware for 100 % of the time")


def standard_error(record: TestRecord, file: BaselineFile) -> tuple[float, float]:
    """Expected logarithm and its standard error, without the module's own way there."""
    prior = prior_of("compute", is_cpu=False)
    logs = [
        SessionLogs(device_group=s.devices, logs=tuple(math.log(run.value) for run in s.runs), visit=s.visit)
        for s in file.tests["gemm"]["time"].sessions
    ]
    components = variance_components(logs, prior=prior.variances, floor=prior.floor)
    told = predict(logs, components, device_group=record.devices, current_runs=1, visit="now")
    return told.expected_log, told.standard_error


@settings(max_examples=25, deadline=None)
@given(deviations=st.floats(-6.0, 6.0).filter(lambda d: abs(abs(d) - 3.0) > 0.01))
def test_an_anchor_is_off_by_more_than_three_of_its_deviations(deviations: float) -> None:
    file = usual_file()
    expected, error = standard_error(measured()[0], file)
    records = measured(math.exp(expected + deviations * error))
    assert bool(judge_anchors(records, file, visit="now").off) == (abs(deviations) > 3.0)


def test_a_value_that_is_itself_uncertain_deviates_less_easily() -> None:
    (gemm, *_) = measured(GEMM_S * 1.03)
    unsure = msgspec.structs.replace(gemm.measurements[0], spread=0.2)
    shaky = msgspec.structs.replace(gemm, measurements=(unsure,))
    assert judge_anchors([gemm], file_of(8), visit="now").off == ("gemm",)
    assert judge_anchors([shaky], file_of(8), visit="now").off == ()


def test_an_anchor_that_is_off_is_recorded_only_with_a_reason(tmp_path: Path) -> None:
    verdict = judged(GEMM_S * 1.05)
    (gemm, _) = verdict.records
    path = baseline_path(tmp_path, gemm.slug, MODULE)
    path.parent.mkdir()
    path.write_bytes(dumps(file_of(8)))
    (refused,) = write(tmp_path, run_info(9), [gemm], accept_reason=None)
    assert (refused.action, refused.can_be_accepted) == ("refused", True)
    (accepted,) = write(tmp_path, run_info(9), [gemm], accept_reason="a new power supply")
    assert accepted.action == "accepted"
    file = read(path)
    assert file is not None
    after = judge_anchors(measured(GEMM_S * 1.05), file, visit="now")
    assert after.off == ()


def test_an_anchor_is_held_closer_to_the_sessions_of_its_own_visit() -> None:
    records, file = measured(), file_of(8)
    (now, same) = (judge_anchors(records, file, visit=visit).records[0].verdicts[0] for visit in ("now", "visit-0"))
    assert same.tolerance < now.tolerance


# When it cannot say


def test_an_anchor_without_a_baseline_is_new_and_says_what_is_missing() -> None:
    verdict = judge_anchors(measured(), None, visit="now")
    assert verdict.off == ()
    assert {record.verdicts[0].status for record in verdict.records} == {"NEW"}
    assert verdict.note == (
        "Anchors: 0 of 5 sessions on this hardware and software; until then they say nothing of the machine."
    )


def test_fewer_than_five_sessions_never_make_a_run_invalid() -> None:
    verdict = judged(GEMM_S * 3, sessions=4)
    assert (verdict.off, verdict.reason) == ((), None)
    assert verdict.note is not None
    assert verdict.note.startswith("Anchors: 4 of 5 sessions")
    (told, _) = (record.verdicts[0] for record in verdict.records)
    assert told.status == "INCONCLUSIVE"
    assert told.reason.startswith("The anchor gemm is 200 % slower than usual, ")
    assert told.reason.endswith("(3 are allowed), which 4 of 5 sessions cannot tell from chance.")


def test_fewer_than_five_sessions_that_agree_are_a_provisional_pass() -> None:
    verdict = judged(GEMM_S, sessions=1)
    assert [record.verdicts[0].status for record in verdict.records] == ["PASS", "PASS"]
    assert all(record.verdicts[0].is_provisional for record in verdict.records)
    assert verdict.note is not None
    assert verdict.note.startswith("Anchors: 1 of 5 sessions")


def test_five_sessions_do() -> None:
    assert judged(GEMM_S * 3, sessions=5).off == ("gemm",)


@pytest.mark.parametrize("name", ["driver", "cuda", "torch", "python"])
def test_another_version_of_what_an_anchor_stands_on_is_not_the_machines_doing(name: str) -> None:
    file = file_of(8)
    records = [with_versions(record, **{name: "99.0"}) for record in measured(GEMM_S * 1.2)]
    verdict = judge_anchors(records, file, visit="now")
    assert verdict.off == ()
    assert verdict.records[0].verdicts[0].reason == "No session on this hardware and software."


def test_another_kernel_or_vllm_is_no_excuse() -> None:
    records = [with_versions(record, kernel="99.0", vllm="99.0") for record in measured(GEMM_S * 1.2)]
    assert judge_anchors(records, file_of(8), visit="now").off == ("gemm",)


def test_another_power_limit_is_not_compared() -> None:
    fake = machine(GEMM_S * 1.2, fake_gpu(power_limit_w=500.0))
    assert judge_anchors(measure_anchors(fake, fake.devices), file_of(8), visit="now").off == ()


def test_another_method_is_not_compared_and_says_so() -> None:
    def cold(record: TestRecord) -> TestRecord:
        method = msgspec.structs.replace(record.measurements[0].method, mode="cold")
        changed = msgspec.structs.replace(record.measurements[0], method=method)
        return msgspec.structs.replace(record, measurements=(changed,))

    verdict = judge_anchors(measured(GEMM_S * 1.2), file_of(8, cold), visit="now")
    assert verdict.off == ()
    assert verdict.records[0].verdicts[0].reason == (
        "Not comparable: method sustained, cuda-events, baseline cold, cuda-events."
    )


# Once more


def test_an_anchor_that_is_off_once_is_measured_again_and_believed_if_it_is_well() -> None:
    script = Script(3e-4, GEMM_S)
    verdict = check_anchors(script.machine, script.machine.devices, file_of(8), visit="now")
    assert verdict.off == ()
    assert verdict.records[0].measurements[0].value == pytest.approx(GEMM_S)
    assert script.asked == ["cuda:0", "cpu", "cuda:0"]


def test_an_anchor_that_is_off_twice_is_off() -> None:
    slow = machine(3e-4)
    verdict = check_anchors(slow, slow.devices, file_of(8), visit="now")
    assert verdict.off == ("gemm",)
    assert [record.key.test for record in verdict.records] == ["gemm", "launch"]


def test_anchors_that_are_well_are_measured_once() -> None:
    script = Script(GEMM_S)
    check_anchors(script.machine, script.machine.devices, file_of(8), visit="now")
    assert script.asked == ["cuda:0", "cpu"]


# In the baselines, as a test


def test_the_file_of_the_anchors_is_beside_those_of_the_tests(tmp_path: Path) -> None:
    verdict = judge_anchors(measured(), None, visit="now")
    changes = write(tmp_path, run_info(0), verdict.records, accept_reason=None)
    assert [change.action for change in changes] == ["recorded", "recorded"]
    assert [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path)] == [
        "nvidia-h100-80gb-hbm3/anchors.json"
    ]


def test_an_anchor_that_was_left_out_is_not_unused(tmp_path: Path) -> None:
    both = judge_anchors(measured(), None, visit="now")
    write(tmp_path, run_info(0), both.records, accept_reason=None)
    (gemm, launch) = both.records
    assert unused_entries(tmp_path, gemm.slug, [launch], set()) == ()
    assert prune(tmp_path, gemm.slug, [(gemm.key, "time")]) == 1


def test_the_ids_are_those_of_the_records() -> None:
    assert {str(record.key) for record in measured()} <= IDS
    assert len(IDS) == 4


# As a covariate


def correlated(count: int) -> tuple[BaselineFile, BaselineFile]:
    """Baselines of anchors, and of a metric that is slow when `gemm` is."""
    anchor_file = metric_file = None
    for number in range(count):
        factor = 1 + 0.01 * number
        for record in measured(GEMM_S * factor):
            anchor_file = append(anchor_file, run_info(number), record, ["time"])
        metric = measured(1e-3 * factor * (1 + NOISE[number % 8] / 10))[0]
        metric_file = append(metric_file, run_info(number), metric, ["time"])
    assert anchor_file is not None
    assert metric_file is not None
    return anchor_file, metric_file


def test_the_anchor_that_a_metric_goes_along_with_corrects_it() -> None:
    anchor_file, metric_file = correlated(9)
    baseline = metric_file.tests["gemm"]["time"]
    found = best_covariate(baseline, 1.04e-3, measured(GEMM_S * 1.04), anchor_file)
    assert found is not None
    assert (found.anchor, found.sessions) == ("gemm", 9)
    assert found.slope == pytest.approx(1.0, abs=0.05)


def test_of_several_anchors_the_closest_corrects() -> None:
    anchor_file, metric_file = correlated(9)
    gemm = anchor_file.tests["gemm"]["time"]
    loose = [
        msgspec.structs.replace(
            s, runs=tuple(msgspec.structs.replace(r, value=r.value * (1 + 5 * NOISE[i % 8])) for r in s.runs)
        )
        for i, s in enumerate(gemm.sessions)
    ]
    tests = {**anchor_file.tests, "launch": {"time": msgspec.structs.replace(gemm, sessions=tuple(loose))}}
    records = measured(GEMM_S * 1.04)
    as_launch = msgspec.structs.replace(records[0], key=TestKey(module=MODULE, test="launch"))
    found = best_covariate(
        metric_file.tests["gemm"]["time"],
        1.04e-3,
        [as_launch, records[0]],
        msgspec.structs.replace(anchor_file, tests=tests),
    )
    assert found is not None
    assert found.anchor == "gemm"


def test_a_slower_torch_is_not_subtracted_as_the_machines_part() -> None:
    anchor_file, metric_file = correlated(9)
    records = [with_versions(record, torch="99.0") for record in measured(GEMM_S * 1.04)]
    assert best_covariate(metric_file.tests["gemm"]["time"], 1.04e-3, records, anchor_file) is None


def test_without_a_baseline_nothing_corrects() -> None:
    _, metric_file = correlated(9)
    assert best_covariate(metric_file.tests["gemm"]["time"], 1e-3, measured(), None) is None
    assert best_covariate(metric_file.tests["gemm"]["time"], 1e-3, [], None) is None
