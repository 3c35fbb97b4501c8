"""GPUs that turn out to be sick: their tests are INVALID, the others go on, and nobody is accused or recorded."""

from dataclasses import replace

import pytest
from harness import CONFIRMING, Suite, assert_readable, gpuperf, recorded_tests, results_of, statuses_of, verdicts_of

from pytest_gpuperf.testing import fake_gpu

#: Fake H100s that a test can break: the fixture `driver` is their driver.
MACHINE = """
import pytest
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuCondition, GpuState
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_condition, fake_gpu, fake_state

GPUS = [fake_gpu(index) for index in range({count})]
NVML = FakeNvml(*GPUS, {script})

def pytest_configure(config):
    machine = Machine("auto", nvml=NVML, make_stopwatch=lambda _: FakeStopwatch(), anchors={anchors})
    config.stash[machine_key] = machine

@pytest.fixture
def driver():
    return NVML
"""

#: A test that breaks its GPU after it has measured, and one that measures on whatever is left.
BROKEN = """
def test_first(gpu_benchmark, gpu, driver):
    gpu_benchmark(lambda: TIME_S)
    {breaking}

def test_second(gpu_benchmark, gpu):
    gpu_benchmark(lambda: 2e-3)
    print("measured on", gpu.device)
"""

WHO = "GPU 0 (NVIDIA H100 80GB HBM3, GPU-00000000-0000-4000-8000-000000000000)"
XID_79 = "driver.strike(gpu.uuid, 79)"
LOST = "driver.lose(gpu.uuid)"


def machine(*, count: int = 2, script: str = "", anchors: str = "None") -> str:
    """A conftest with fake H100s whose driver follows a script."""
    return MACHINE.format(count=count, script=script, anchors=anchors)


def broken(breaking: str, *, count: int = 2, script: str = "") -> Suite:
    """The suite of `BROKEN`."""
    return Suite(
        files={"test_suite.py": BROKEN.format(breaking=breaking)}, conftest=machine(count=count, script=script)
    )


def suite_of(source: str, *, count: int = 2, script: str = "", anchors: str = "None") -> Suite:
    return Suite(files={"test_suite.py": source}, conftest=machine(count=count, script=script, anchors=anchors))


def notes_of(result: pytest.RunResult) -> list[str]:
    """The lines that say who was taken out of use."""
    return [line for line in result.stdout.lines if line.startswith("GPU ") and " was taken out of use " in line]


# What makes a GPU sick


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (XID_79, "Xid 79 (the GPU fell off the bus): drain the node"),
        ("driver.strike(gpu.uuid, 48)", "Xid 48 (a memory error that ECC cannot correct): end what uses the GPU"),
        ("driver.wear(gpu.uuid, ecc_uncorrected=3)", "3 memory errors that ECC cannot correct: end what uses the GPU"),
        ("driver.wear(gpu.uuid, has_remap_failed=True)", "a bad row of memory, and no spare one is left: drain"),
        (LOST, "it is lost: it has fallen off the bus. What was measured on it is not valid."),
    ],
    ids=["xid 79", "xid 48", "ecc", "remap failure", "lost"],
)
def test_sick_gpu_makes_its_test_invalid_and_the_next_one_goes_on_elsewhere(
    pytester: pytest.Pytester, breaking: str, reason: str
) -> None:
    result = broken(breaking).run(pytester, "-s")

    result.assert_outcomes(passed=2)
    assert statuses_of(pytester) == {"test_first time": "INVALID", "test_second time": "NEW"}
    result.stdout.fnmatch_lines(["*measured on cuda:1*"])
    (note,) = notes_of(result)
    assert note.startswith(f"{WHO} was taken out of use in test_first: {reason}")
    assert_readable(result)


def test_reason_of_the_verdict_has_the_mend_and_no_uuid(pytester: pytest.Pytester) -> None:
    broken(LOST).run(pytester)
    reason = verdicts_of(pytester)["test_first time"].reason

    assert reason.startswith("GPU 0 (NVIDIA H100 80GB HBM3) was taken out of use: it is lost")
    assert "sudo nvidia-smi --gpu-reset" in reason
    assert "GPU-0000" not in (pytester.path / ".gpuperf" / "results.jsonl").read_text()


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 154])
def test_error_of_a_kernel_or_a_mere_message_makes_nobody_sick(pytester: pytest.Pytester, code: int) -> None:
    result = broken(f"driver.strike(gpu.uuid, {code})").run(pytester, "-s")

    assert statuses_of(pytester) == {"test_first time": "NEW", "test_second time": "NEW"}
    result.stdout.fnmatch_lines(["*measured on cuda:0*"])
    assert notes_of(result) == []


def test_corrected_errors_make_nobody_sick(pytester: pytest.Pytester) -> None:
    broken("driver.wear(gpu.uuid, ecc_corrected=900)").run(pytester)

    assert statuses_of(pytester) == {"test_first time": "NEW", "test_second time": "NEW"}


def test_row_that_waits_to_be_replaced_is_a_note_and_no_sickness(pytester: pytest.Pytester) -> None:
    result = broken("driver.wear(gpu.uuid, is_remap_pending=True)").run(pytester)

    assert statuses_of(pytester) == {"test_first time": "NEW", "test_second time": "NEW"}
    lines = [line for line in result.stdout.lines if "a row of memory waits to be replaced" in line]
    assert lines == [
        f"{WHO}: a row of memory waits to be replaced. Reset the GPU when it is free: `sudo nvidia-smi --gpu-reset`"
    ]


def test_row_that_could_not_be_replaced_earlier_is_found_before_the_first_test(pytester: pytest.Pytester) -> None:
    source = "def test_kernel(gpu_benchmark, gpu):\n    gpu_benchmark(lambda: TIME_S)\n    assert gpu.index == 1\n"
    conftest = machine().replace(
        "def pytest_configure", "NVML.wear(GPUS[0].uuid, has_remap_failed=True)\n\ndef pytest_configure"
    )
    result = Suite(files={"test_suite.py": source}, conftest=conftest).run(pytester)

    result.assert_outcomes(passed=1)
    assert [note.partition(": a bad row")[0] for note in notes_of(result)] == [
        f"{WHO} was taken out of use before test_kernel"
    ]


def test_xid_between_two_tests_is_seen_by_the_next(pytester: pytest.Pytester) -> None:
    source = """
def test_first(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_between(driver):
    from conftest import GPUS
    driver.strike(GPUS[0].uuid, 79)

def test_second(gpu_benchmark, gpu):
    gpu_benchmark(lambda: TIME_S)
    assert gpu.index == 1
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(passed=3)
    assert statuses_of(pytester) == {"test_first time": "NEW", "test_second time": "NEW"}
    assert "was taken out of use before test_second: Xid 79" in notes_of(result)[0]


def test_xid_of_a_gpu_that_no_test_of_this_process_has_held_yet_is_heard_from_its_first_test_on(
    pytester: pytest.Pytester,
) -> None:
    source = f"""
import pytest

def test_first(gpu_benchmark, driver):
    gpu_benchmark(lambda: TIME_S)
    driver.strike("{fake_gpu(1).uuid}", 48)  # under a test of another worker

@pytest.mark.gpu(count=2)
def test_both(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(passed=1, skipped=1)
    assert statuses_of(pytester) == {"test_first time": "NEW"}
    assert len(notes_of(result)) == 1
    assert notes_of(result)[0].startswith("GPU 1 (")


def test_one_meter_listens_through_anchors_and_all_measurements(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark, perf, gpu_monitor, driver):
    gpu_benchmark(lambda: TIME_S)
    with gpu_monitor(), perf.region():
        pass
    assert driver.calls.count("error_meter") == 1
    assert driver.calls.count("condition") >= 2 + 4 * 2  # of the fixture, an anchor, and three that watch
"""
    suite_of(source, count=1, anchors='{"gemm": lambda: 2e-4}').run(pytester).assert_outcomes(passed=1)


# A GPU that falls off at any moment


@pytest.mark.parametrize("answered", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14])
def test_gpu_that_falls_off_at_any_question_accuses_nobody(pytester: pytest.Pytester, answered: int) -> None:
    source = """
def test_first(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_second(gpu_benchmark):
    gpu_benchmark(lambda: 2e-3)

def test_third(gpu_benchmark):
    gpu_benchmark(lambda: 3e-3)
"""
    suite_of(source).record(pytester)
    result = suite_of(source, script=f"lost={{GPUS[0].uuid: {answered}}}").run(pytester)
    found = statuses_of(pytester)

    assert set(found.values()) <= {"PASS", "INVALID"}
    assert found["test_third time"] == "PASS"
    if answered:
        assert len(notes_of(result)) == 1
    else:
        result.stdout.fnmatch_lines(["GPU 0 is lost: it has fallen off the bus. * This run goes on without it."])
    sick = [test for test in results_of(pytester).tests if test.verdicts[0].status == "INVALID"]
    assert all("fallen off the bus" in test.verdicts[0].reason for test in sick)
    assert_readable(result)


@pytest.mark.parametrize("shown", ["1", "GPU-00000000"])
def test_a_run_that_is_refused_for_a_lost_gpu_does_not_claim_to_go_on(pytester: pytest.Pytester, shown: str) -> None:
    suite = suite_of("def test_first(gpu): pass", script="lost={GPUS[0].uuid: 0}")
    result = replace(suite, environment={"CUDA_VISIBLE_DEVICES": shown}).run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: GPU 0 is lost: it has fallen off the bus.*CUDA_VISIBLE_DEVICES*"])
    result.stdout.no_fnmatch_line("*goes on without it*")


def test_gpu_that_falls_off_in_a_test_fails_it_with_what_to_do_and_keeps_what_was_measured(
    pytester: pytest.Pytester,
) -> None:
    source = """
def test_first(gpu_benchmark, gpu, driver):
    gpu_benchmark(lambda: TIME_S)
    driver.lose(gpu.uuid)
    gpu_benchmark(lambda: TIME_S, metric="again")

def test_second(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines([f"{WHO} is lost: it has fallen off the bus.*sudo nvidia-smi --gpu-reset*"])
    first = results_of(pytester).tests[0]
    assert (first.measurements[0].value, first.verdicts[0].status, first.passed) == (1e-3, "INVALID", False)
    assert statuses_of(pytester)["test_second time"] == "NEW"
    assert_readable(result)


def test_gpu_that_falls_off_under_an_anchor_fails_that_test_and_the_next_goes_on(pytester: pytest.Pytester) -> None:
    source = """
def test_first(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_second(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    anchors = '{"gemm": lambda: NVML.lose(GPUS[0].uuid) or 2e-4}'
    result = suite_of(source, anchors=anchors).run(pytester)

    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([f"{WHO} is lost*"])
    assert [note.partition(":")[0] for note in notes_of(result)] == [f"{WHO} was taken out of use in test_first"]
    assert statuses_of(pytester)["test_second time"] == "NEW"


def test_run_in_which_nothing_was_measured_tells_of_the_sick_gpu_all_the_same(pytester: pytest.Pytester) -> None:
    source = f"def test_first(gpu_benchmark, gpu, driver):\n    {LOST}\n    gpu_benchmark(lambda: TIME_S)\n"
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1)
    assert len(notes_of(result)) == 1


def test_engine_that_dies_with_its_gpu_fails_with_its_own_words_and_the_gpu_is_out_of_use(
    pytester: pytest.Pytester,
) -> None:
    source = f"""
from pytest_gpuperf.errors import EngineError

def test_engine(perf, gpu, driver):
    {LOST}
    raise EngineError("vLLM ended with code 1: CUDA error: unspecified launch failure")

def test_second(gpu_benchmark, gpu):
    gpu_benchmark(lambda: TIME_S)
    assert gpu.index == 1
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["vLLM ended with code 1: CUDA error: unspecified launch failure"])
    assert len(notes_of(result)) == 1


# Verdicts and baselines


def test_slow_test_on_a_sick_gpu_is_not_regressed(pytester: pytest.Pytester) -> None:
    suite = broken("pass").record(pytester)
    result = broken(XID_79).slower().run(pytester)

    assert suite.files != broken(XID_79).files
    result.assert_outcomes(passed=2)
    assert statuses_of(pytester) == {"test_first time": "INVALID", "test_second time": "PASS"}


@pytest.mark.parametrize("breaking", [XID_79, LOST])
def test_what_a_sick_gpu_measured_is_kept_and_never_recorded(pytester: pytest.Pytester, breaking: str) -> None:
    broken(breaking).run(pytester, "--gpuperf-update")

    assert results_of(pytester).tests[0].measurements[0].value == 1e-3
    assert recorded_tests(pytester) == ["test_suite.py::test_second"]


def test_command_that_records_later_leaves_out_what_a_sick_gpu_measured(pytester: pytest.Pytester) -> None:
    broken(LOST).run(pytester)
    gpuperf("baseline", "record")

    assert recorded_tests(pytester) == ["test_suite.py::test_second"]


def test_value_that_a_test_recorded_itself_is_invalid_on_a_sick_gpu_too(pytester: pytest.Pytester) -> None:
    source = f"def test_own(perf, gpu, driver):\n    perf.record('latency', 40, unit='ms')\n    {XID_79}\n"
    suite_of(source).run(pytester)

    assert statuses_of(pytester) == {"test_own latency": "INVALID"}


def test_under_the_policy_fail_the_test_fails_with_reason_and_mend(pytester: pytest.Pytester) -> None:
    result = broken(XID_79).run(pytester, "--gpuperf-invalid", "fail")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        ["*time is INVALID: GPU 0 (NVIDIA H100 80GB HBM3) was taken out of use: Xid 79 (*): drain the node*"]
    )


def test_test_on_a_sick_gpu_is_not_measured_again(pytester: pytest.Pytester) -> None:
    broken("pass").record(pytester)
    result = broken(XID_79).slower().run(pytester, *CONFIRMING)

    result.stdout.no_fnmatch_line("*in fresh processes*")
    assert statuses_of(pytester)["test_first time"] == "INVALID"


def test_suspicion_on_a_gpu_that_is_sick_by_the_end_accuses_nobody(pytester: pytest.Pytester) -> None:
    source = f"""
def test_slow(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_breaking(gpu_benchmark, gpu, driver):
    gpu_benchmark(lambda: 2e-3)
    if TIME_S > 1e-3:
        {XID_79}
"""
    suite = suite_of(source).record(pytester)
    result = suite.slower().run(pytester, *CONFIRMING)
    verdict = verdicts_of(pytester)["test_slow time"]

    assert result.ret == 0
    assert verdict.status == "INCONCLUSIVE"
    assert "not confirmed: GPU 0 (NVIDIA H100 80GB HBM3) was taken out of use: Xid 79" in verdict.reason


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        ("NVML.wear(GPUS[0].uuid, has_remap_failed=True)", "not confirmed: a fresh process was started, but it"),
        ("NVML._xids = {GPUS[0].uuid: [(), (), (), (79,)]}", "not confirmed: in a fresh process, too: GPU 0 (NVIDIA"),
    ],
    ids=["before", "meanwhile"],
)
def test_gpu_that_is_sick_in_the_fresh_process_alone_accuses_nobody(
    pytester: pytest.Pytester, breaking: str, said: str
) -> None:
    source = "def test_kernel(gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n"
    conftest = f"{machine()}\nimport os\nif 'GPUPERF_FAMILY' in os.environ:\n    {breaking}\n"
    suite = Suite(files={"test_suite.py": source}, conftest=conftest).record(pytester)
    suite.slower().run(pytester, *CONFIRMING)
    verdict = verdicts_of(pytester)["test_kernel time"]

    assert verdict.status == "INCONCLUSIVE"
    assert said in verdict.reason


# Who is left


NONE_LEFT = (
    "*test_second: 1 of the 1 GPUs here is out of use. GPU 0 (NVIDIA H100 80GB HBM3) was taken out of use: Xid 79*"
)


@pytest.mark.parametrize("policy", ["warn", "pass"])
def test_where_no_gpu_is_left_tests_are_skipped_with_reason_and_mend(pytester: pytest.Pytester, policy: str) -> None:
    result = broken(XID_79, count=1).run(pytester, "-rs", "--gpuperf-invalid", policy)

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines([f"{NONE_LEFT}drain the node*"])


def test_where_no_gpu_is_left_tests_fail_under_the_policy_fail(pytester: pytest.Pytester) -> None:
    result = broken(XID_79, count=1).run(pytester, "--gpuperf-invalid", "fail")

    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines([f"{NONE_LEFT}drain the node*"])


def test_where_gpus_are_insisted_on_tests_fail_too(pytester: pytest.Pytester) -> None:
    result = broken(XID_79, count=1).run(pytester, "--gpuperf-require-gpu")

    result.assert_outcomes(passed=1, errors=1)


def test_test_of_two_gpus_is_skipped_where_one_of_two_is_sick(pytester: pytest.Pytester) -> None:
    source = f"""
def test_first(gpu_benchmark, gpu, driver):
    gpu_benchmark(lambda: TIME_S)
    {XID_79}

@pytest.mark.gpu(count=2)
def test_two(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*test_two: 1 of the 2 GPUs here is out of use, and the rest will not do. GPU 0*"])


def test_test_that_could_never_run_here_is_skipped_for_its_own_reason(pytester: pytest.Pytester) -> None:
    source = f"""
def test_first(gpu_benchmark, gpu, driver):
    gpu_benchmark(lambda: TIME_S)
    {XID_79}

@pytest.mark.gpu(count=3)
def test_three(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester, "-rs", "--gpuperf-invalid", "fail")

    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.no_fnmatch_line("*test_three*out of use*")


def test_test_of_two_gpus_names_the_one_that_is_sick(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.gpu(count=2)
def test_two(gpu_benchmark, gpus, driver):
    gpu_benchmark(lambda: TIME_S)
    driver.strike(gpus[1].uuid, 74)

def test_next(gpu_benchmark, gpu):
    gpu_benchmark(lambda: TIME_S)
    assert gpu.index == 0
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(passed=2)
    assert statuses_of(pytester) == {"test_two time": "INVALID", "test_next time": "NEW"}
    assert notes_of(result)[0].startswith("GPU 1 (NVIDIA H100 80GB HBM3, GPU-00000001-")


def test_anchors_are_not_measured_on_a_sick_gpu_and_are_on_the_next(pytester: pytest.Pytester) -> None:
    suite = suite_of(BROKEN.format(breaking=XID_79), anchors='{"gemm": lambda: 2e-4}')
    suite.run(pytester)
    anchors = [test for test in results_of(pytester).tests if test.key.test == "gemm"]

    assert len({test.devices for test in anchors}) == 2


def test_workers_of_xdist_find_out_by_themselves_and_tell_the_controller(pytester: pytest.Pytester) -> None:
    result = broken(XID_79).in_subprocess().run(pytester, "-n", "1")

    result.assert_outcomes(passed=2)
    assert statuses_of(pytester) == {"test_first time": "INVALID", "test_second time": "NEW"}
    assert len(notes_of(result)) == 1


# Messages of failing tests


def test_failing_test_is_told_of_the_errors_that_its_kernel_caused(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark, gpu, driver):
    driver.strike(gpu.uuid, 31)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_next(gpu_benchmark):
    assert False, "for another reason"
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "*Captured GPU errors call*",
            "GPU 0 (NVIDIA H100 80GB HBM3): Xid 31 (a memory page fault): run the test alone under `compute-*",
        ]
    )
    assert result.stdout.str().count("Captured GPU errors") == 1
    assert notes_of(result) == []


def test_failing_test_of_a_suite_whose_own_fixture_is_called_gpus_fails_with_its_own_words(
    pytester: pytest.Pytester,
) -> None:
    source = """
@pytest.fixture
def gpus():
    return 4

def test_theirs(gpus):
    assert gpus == 5
"""
    result = suite_of(source).run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*assert 4 == 5"])


# Others on the GPU


def test_memory_of_others_at_the_beginning_makes_a_test_invalid(pytester: pytest.Pytester) -> None:
    script = "states=[fake_state(memory_used_bytes=5_000_000_000)]"
    suite_of("def test_kernel(gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n", script=script).run(pytester)
    verdict = verdicts_of(pytester)["test_kernel time"]

    assert verdict.status == "INVALID"
    assert verdict.reason.startswith("other memory in use: 5.000 GB of the GPU when the test began")


def test_process_that_comes_and_goes_makes_its_test_alone_invalid(pytester: pytest.Pytester, stranger: int) -> None:
    script = f"states=[fake_state(process_pids=({stranger},)), fake_state()]"
    result = broken("pass", script=script).run(pytester)

    assert statuses_of(pytester) == {"test_first time": "INVALID", "test_second time": "NEW"}
    assert f"another process used the GPU (pid {stranger})" in verdicts_of(pytester)["test_first time"].reason
    assert notes_of(result) == []


# Drivers that tell little or nothing


@pytest.mark.parametrize(
    "script",
    ["xids=None", "conditions=[GpuCondition()], xids=None, states=[GpuState()]"],
    ids=["no permission for events", "nothing supported"],
)
def test_driver_that_does_not_tell_makes_nobody_sick(pytester: pytest.Pytester, script: str) -> None:
    result = broken(XID_79, script=script).run(pytester)

    result.assert_outcomes(passed=2)
    assert statuses_of(pytester) == {"test_first time": "NEW", "test_second time": "NEW"}
    assert notes_of(result) == []


def test_without_nvml_the_cpu_is_measured_and_nothing_is_looked_at(pytester: pytest.Pytester) -> None:
    conftest = machine().replace("nvml=NVML, ", "")
    source = "def test_kernel(gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n"
    result = Suite(files={"test_suite.py": source}, conftest=conftest).run(pytester, "--gpuperf-device", "auto")

    result.assert_outcomes(passed=1)
    assert statuses_of(pytester) == {"test_kernel time": "NEW"}
    telemetry = results_of(pytester).tests[0].measurements[0].telemetry
    assert telemetry is not None
    assert (telemetry.xids, telemetry.ecc_uncorrected, telemetry.foreign_memory_bytes) == (None, None, None)


def test_mig_instance_is_out_of_use_when_its_gpu_is_sick(pytester: pytest.Pytester) -> None:
    instance = "MIG-10000000-0000-4000-8000-000000000000"
    conftest = machine(count=1, script="instances=INSTANCES").replace(
        "NVML = ",
        "GPUS = [fake_gpu(mig_enabled=True)]\n"
        f"INSTANCES = {{GPUS[0].uuid: [fake_gpu(0, 'NVIDIA H100 80GB HBM3 MIG 1g.10gb', uuid='{instance}')]}}\n"
        "NVML = ",
    )
    source = BROKEN.format(breaking="driver.strike('GPU-00000000-0000-4000-8000-000000000000', 79)")
    suite = Suite(files={"test_suite.py": source}, conftest=conftest, environment={"CUDA_VISIBLE_DEVICES": instance})
    result = suite.run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    assert statuses_of(pytester) == {"test_first time": "INVALID"}
    assert notes_of(result)[0].startswith(f"GPU 0 (NVIDIA H100 80GB HBM3 MIG 1g.10gb, {instance}) was taken out of use")
