"""What goes wrong around a test: none of it is a pass, and none shows the plugin's own code."""

from importlib.util import find_spec

import pytest
from harness import (
    FAKE_H100,
    KERNEL,
    Suite,
    assert_readable,
    bytes_of_baselines,
    gpuperf,
    recorded_tests,
    results_of,
    statuses_of,
)

NVML = """
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_state

def pytest_configure(config):
    nvml = FakeNvml(fake_gpu(), {script})
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""


def machine(script: str) -> str:
    """A conftest with one H100 whose driver follows a script."""
    return NVML.format(script=script)


def suite_of(source: str, *, conftest: str = FAKE_H100) -> Suite:
    return Suite(files={"test_suite.py": source}, conftest=conftest)


def kernel(body: str, *, fixtures: str = "gpu_benchmark") -> Suite:
    """A suite of one test."""
    return suite_of(f"def test_kernel({fixtures}):\n    {body}\n")


# The callable


def test_callable_that_raises_shows_the_users_lines_alone(pytester: pytest.Pytester) -> None:
    source = """
def launch():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_kernel(gpu_benchmark):
    gpu_benchmark(launch)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       gpu_benchmark(launch)*",
            "test_suite.py:*",
            ">       raise RuntimeError(*",
            "E       RuntimeError: CUDA error: an illegal memory access was encountered",
            "test_suite.py:*: RuntimeError",
        ]
    )
    assert_readable(result)


NATIVE = pytest.mark.xfail(strict=True, reason="the hook's own frame is in the whole stack, which this style prints")


@pytest.mark.parametrize("style", ["long", "short", "line", "auto", pytest.param("native", marks=NATIVE)])
def test_no_style_of_traceback_shows_the_plugin(pytester: pytest.Pytester, style: str) -> None:
    result = kernel("gpu_benchmark(lambda: 1 / 0)").run(pytester, f"--tb={style}")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ZeroDivisionError*"])
    assert_readable(result)


def test_callable_that_raises_from_another_error_shows_both(pytester: pytest.Pytester) -> None:
    source = """
def launch():
    try:
        {}["plan"]
    except KeyError as error:
        raise RuntimeError("no plan") from error

def test_kernel(gpu_benchmark):
    gpu_benchmark(launch)
"""
    result = suite_of(source).run(pytester)

    result.stdout.fnmatch_lines(["E*KeyError: 'plan'", "*direct cause*", "E*RuntimeError: no plan"])
    assert_readable(result)


def test_callable_that_fails_in_the_middle_of_the_measurement_is_no_pass(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    calls = iter(range(50))
    gpu_benchmark(lambda: next(calls) * 1e-9 + 1e-3)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1)
    assert_readable(result)


def out_of_memory(error: str) -> Suite:
    """A suite whose first test runs out of memory."""
    source = f"""
{"" if error == "MemoryError" else "import torch"}

def launch():
    raise {error}

def test_kernel(gpu_benchmark):
    gpu_benchmark(launch)

def test_next(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    return suite_of(source)


def assert_out_of_memory(result: pytest.RunResult, name: str) -> None:
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines([f"E *{name}*"])
    assert_readable(result)


def test_callable_that_runs_out_of_memory_fails(pytester: pytest.Pytester) -> None:
    assert_out_of_memory(out_of_memory("MemoryError").run(pytester), "MemoryError")


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_callable_that_runs_out_of_gpu_memory_fails(pytester: pytest.Pytester) -> None:
    suite = out_of_memory("torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')")

    assert_out_of_memory(suite.in_subprocess().run(pytester), "OutOfMemoryError: CUDA out of memory.")


@pytest.mark.parametrize("seconds", ["0.0", "1e-9", "0"])
def test_callable_that_returns_at_once_did_no_work(pytester: pytest.Pytester, seconds: str) -> None:
    result = kernel(f"gpu_benchmark(lambda: {seconds})").run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*The callable did no work that the clock can see: * a call.*"])
    assert_readable(result)


@pytest.mark.parametrize(("call", "kind"), [("1e-3", "float"), ("None", "NoneType"), ("'kernel'", "str")])
def test_something_that_cannot_be_called_is_named(pytester: pytest.Pytester, call: str, kind: str) -> None:
    result = kernel(f"gpu_benchmark({call})").run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*gpu_benchmark needs a callable without arguments, not {kind}.*"])
    assert_readable(result)


def test_callable_that_wants_arguments_fails_readably(pytester: pytest.Pytester) -> None:
    result = kernel("gpu_benchmark(lambda x: x)").run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*TypeError: *missing 1 required positional argument: 'x'*"])
    assert_readable(result)


@pytest.mark.parametrize("outcome", ["skip", "xfail"])
def test_callable_may_skip_its_test(pytester: pytest.Pytester, outcome: str) -> None:
    result = kernel(f"gpu_benchmark(lambda: pytest.{outcome}('not today'))").run(pytester)

    result.assert_outcomes(**({"skipped": 1} if outcome == "skip" else {"xfailed": 1}))


def test_test_that_measures_and_then_skips_is_skipped(pytester: pytest.Pytester) -> None:
    result = kernel("gpu_benchmark(lambda: 1e-3); pytest.skip('not today')").run(pytester, "--gpuperf-update")

    result.assert_outcomes(skipped=1)
    assert recorded_tests(pytester) == []


# Arguments


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("gpu_benchmark(k, flops=0)", "flops=0 is not a finite number above zero."),
        ("gpu_benchmark(k, flops=-1)", "flops=-1 is not a finite number above zero."),
        ("gpu_benchmark(k, flops=float('nan'))", "flops=nan is not a finite number above zero."),
        ("gpu_benchmark(k, bytes=float('inf'))", "bytes=inf is not a finite number above zero."),
        ("gpu_benchmark(k, bytes='1e9')", "bytes='1e9' is not a finite number above zero."),
        ("gpu_benchmark(k, mode='fast')", "mode='fast' cannot be measured. Valid: cold, hot, sustained."),
        ("gpu_benchmark(k, clock='sundial')", "clock='sundial' does not exist on this device. Valid: cuda-events, "),
        ("gpu_benchmark(k, clock='cuda-graph', mode='cold')", "mode='cold' times single calls and cannot use"),
        ("gpu_benchmark(k, tolerance=5)", "tolerance=5 is outside 0 to 1"),
        ("gpu_benchmark(k, tolerance='x')", "tolerance='x' is not a number. Write 0.05 or '5%'."),
        ("perf.record('m', float('nan'), unit='s')", "m = nan is not a finite number above zero"),
        ("perf.record('m', float('inf'), unit='s')", "m = inf is not a finite number above zero"),
        ("perf.record('m', 0, unit='s')", "m = 0 is not a finite number above zero"),
        ("perf.record('m', -1.5, unit='s')", "m = -1.5 is not a finite number above zero"),
        ("perf.record('m', True, unit='s')", "m = True is not a finite number above zero"),
        ("perf.record('m', '5', unit='s')", "m = '5' is not a finite number above zero"),
        ("perf.record('m', None, unit='s')", "m = None is not a finite number above zero"),
        ("perf.record('', 1, unit='s')", "The name of a metric is text, not ''."),
        ("perf.record('  ', 1, unit='s')", "The name of a metric is text, not '  '."),
        ("perf.record(7, 1, unit='s')", "The name of a metric is text, not 7."),
        ("perf.record('m', 1, unit='furlong')", "The unit 'furlong' does not say whether more or less is better."),
        ("perf.record('m', 1, unit='s', better='higher')", "better='higher' contradicts the unit 's', where lower is"),
        ("perf.record('m', 1, unit='tok/s', better='lower')", "better='lower' contradicts the unit 'tok/s'"),
        ("perf.record('m', 1, unit='s', better='faster')", "better='faster' is not a direction."),
        ("perf.record('m', 1, unit='s', tolerance=7)", "tolerance=7 is outside 0 to 1"),
        ("perf.record('m', 1, unit='s'), perf.record('m', 2, unit='s')", "The metric 'm' was recorded twice"),
        ("gpu_benchmark(k), gpu_benchmark(k)", "The metric 'time' was recorded twice in this test."),
        ("gpu_benchmark(k).assert_at_least(1, of='top')", "of='top' is not something to compare with. Valid: 'peak'."),
        ("gpu_benchmark(k).assert_at_most(1, unit='GB')", "The bound is in GB, but time is in s."),
    ],
)
def test_wrong_argument_fails_the_test_with_its_message(pytester: pytest.Pytester, call: str, text: str) -> None:
    source = f"""
def test_kernel(gpu_benchmark, perf):
    k = lambda: 1e-3
    {call}

def test_next(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(failed=1, passed=1)
    assert text in result.stdout.str()
    assert_readable(result)


@pytest.mark.parametrize(
    "call",
    [
        "perf.record(None, 1, unit='s')",
        "perf.record('m', 1, unit=None)",
        "perf.record('m', 1, unit=['s'])",
        "gpu_benchmark(k, metric=7)",
        "gpu_benchmark(k, metric='')",
        "gpu_benchmark(k, dtype=16)",
        "gpu_benchmark(k, dtype=['bfloat16'], flops=1e9)",
        "gpu_benchmark(k, mode=['cold'])",
        "gpu_benchmark(k, clock=['cuda-events'])",
        "gpu_benchmark(k, flops=True)",
        "perf.record('m', 10**400, unit='s')",
        "perf.record('m', 1e-320, unit='ns')",
        "perf.record('m', 1e308, unit='TB')",
    ],
)
def test_argument_of_a_wrong_type_is_no_pass_and_no_traceback(pytester: pytest.Pytester, call: str) -> None:
    source = f"""
def test_kernel(gpu_benchmark, perf):
    k = lambda: 1e-3
    {call}
"""
    result = suite_of(source).run(pytester, "--gpuperf-update")

    assert result.ret != 0
    assert_readable(result)


@pytest.mark.parametrize(
    ("arguments", "share"),
    [("flops=5000e9, dtype='bfloat16'", "506 %"), ("bytes=5e9", "149 %"), ("flops=1010e9, dtype='bfloat16'", "102 %")],
)
def test_more_than_the_hardware_can_do_is_an_error(pytester: pytest.Pytester, arguments: str, share: str) -> None:
    result = kernel(f"gpu_benchmark(lambda: 1e-3, {arguments})").run(pytester, "--gpuperf-update")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*{share} of the peak of NVIDIA H100 80GB HBM3 (*more than the hardware can do.*"])
    assert recorded_tests(pytester) == []
    assert_readable(result)


def test_a_little_over_the_peak_is_believed(pytester: pytest.Pytester) -> None:
    result = kernel("gpu_benchmark(lambda: 1e-3, flops=1005e9, dtype='bfloat16')").run(pytester)

    result.assert_outcomes(passed=1)


# The driver and the GPU


def test_missing_nvml_is_explained_and_the_cpu_measured(pytester: pytest.Pytester) -> None:
    source = "def test_latency(perf):\n    perf.record('latency', TIME_S, unit='s')\n"
    blocked = "import sys\nsys.modules['pynvml'] = None\n"
    result = suite_of(source, conftest=blocked).run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Measured on the CPU: *nvidia-ml-py*"])
    assert_readable(result)


def test_missing_nvml_where_a_gpu_is_required_is_an_error(pytester: pytest.Pytester) -> None:
    blocked = "import sys\nsys.modules['pynvml'] = None\n"
    result = suite_of(KERNEL, conftest=blocked).run(pytester, "--gpuperf-require-gpu")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--gpuperf-require-gpu, but there is no GPU. *nvidia-ml-py*"])
    assert_readable(result)


def test_pynvml_of_somebody_else_is_explained(pytester: pytest.Pytester) -> None:
    source = "def test_latency(perf):\n    perf.record('latency', TIME_S, unit='s')\n"
    shadow = "import sys, types\nsys.modules['pynvml'] = types.ModuleType('pynvml')\n"
    result = suite_of(source, conftest=shadow).run(pytester)

    result.stdout.fnmatch_lines(["Measured on the CPU: *pynvml*"])
    assert_readable(result)


@pytest.mark.parametrize("call", [1, 2])
def test_gpu_that_is_lost_during_a_measurement_fails_the_test(pytester: pytest.Pytester, call: int) -> None:
    script = f"errors={{('state', {call}): DeviceError('GPU 0 is lost: it has fallen off the bus')}}"
    result = suite_of(KERNEL, conftest=machine(script)).run(pytester, "--gpuperf-update")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*GPU 0 is lost: it has fallen off the bus*"])
    assert recorded_tests(pytester) == []
    assert_readable(result)


def test_gpu_that_is_lost_in_a_region_fails_the_test(pytester: pytest.Pytester) -> None:
    source = """
def test_generate(perf):
    with perf.region() as region:
        pass
    perf.record("time", region.time_s, unit="s")
"""
    script = "errors={('state', 2): DeviceError('GPU 0 is lost')}"
    result = suite_of(source, conftest=machine(script)).run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*GPU 0 is lost*"])
    assert_readable(result)


def test_gpu_that_is_lost_between_two_readings_fails_the_test(pytester: pytest.Pytester) -> None:
    source = """
import time

def test_generate(perf):
    with perf.region() as region:
        time.sleep(0.25)
    perf.record("time", 1.0, unit="s")
"""
    script = "errors={('sample', 1): DeviceError('GPU 0 is lost')}"
    result = suite_of(source, conftest=machine(script)).run(pytester)

    assert_readable(result)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*GPU 0 is lost*"])


@pytest.mark.parametrize("method", ["gpus", "driver_version", "cuda_version"])
def test_gpu_that_is_lost_before_anything_is_measured_is_no_pass(pytester: pytest.Pytester, method: str) -> None:
    script = f"errors={{('{method}', count): DeviceError('GPU 0 is lost') for count in range(99)}}"
    result = suite_of(KERNEL, conftest=machine(script)).run(pytester)

    assert result.ret != 0
    assert "GPU 0 is lost" in result.stdout.str() + result.stderr.str()
    assert_readable(result)


def test_gpu_that_is_lost_at_collection_is_a_usage_error(pytester: pytest.Pytester) -> None:
    script = "errors={('gpus', count): DeviceError('GPU 0 is lost') for count in range(99)}"
    result = suite_of(KERNEL, conftest=machine(script)).run(pytester)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.stderr.lines if line.startswith("ERROR: ")] == ["ERROR: GPU 0 is lost"]


def test_gpu_that_is_lost_does_not_concern_plain_tests(pytester: pytest.Pytester) -> None:
    script = "errors={('gpus', count): DeviceError('GPU 0 is lost') for count in range(99)}"
    result = suite_of("def test_plain(): pass", conftest=machine(script)).run(pytester)

    result.assert_outcomes(passed=1)


def test_old_name_of_a_mig_instance_is_no_crash(pytester: pytest.Pytester) -> None:
    suite = Suite(environment={"CUDA_VISIBLE_DEVICES": "MIG-GPU-4b5c/1/0"})
    result = suite.run(pytester)

    assert result.ret != 0
    assert "MIG instance 'MIG-GPU-4b5c/1/0'" in result.stdout.str() + result.stderr.str()
    assert_readable(result)


SLOWDOWNS = {
    "hw_thermal_s": "thermal slowdown by the hardware",
    "sw_thermal_s": "thermal slowdown by the driver",
    "power_brake_s": "an external power brake",
}


@pytest.mark.parametrize(("counter", "cause"), SLOWDOWNS.items(), ids=SLOWDOWNS)
def test_slowdown_of_an_unwell_gpu_is_invalid_and_never_a_regression(
    pytester: pytest.Pytester, counter: str, cause: str
) -> None:
    Suite().record(pytester)
    before = bytes_of_baselines(pytester)
    script = f"states=[fake_state({counter}=100.0 * count) for count in range(9)]"
    suite = suite_of(KERNEL, conftest=machine(script)).slower()

    result = suite.run(pytester, "--gpuperf-update")
    assert statuses_of(pytester) == {"test_kernel time": "INVALID"}
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"INVALID test_kernel time: {cause} for 100 % of the time", "Refused *: invalid: *"])
    assert bytes_of_baselines(pytester) == before

    failed = suite.run(pytester, "--gpuperf-invalid=fail")
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines([f"  time is INVALID: {cause} for *"])
    failed.stdout.no_fnmatch_line("*got slower*")


def test_clock_far_below_the_baselines_is_invalid(pytester: pytest.Pytester) -> None:
    suite_of(KERNEL, conftest=machine("states=[fake_state(sm_clock_mhz=1980.0)]")).record(pytester)
    result = suite_of(KERNEL, conftest=machine("states=[fake_state(sm_clock_mhz=990.0)]")).slower().run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["INVALID *: the SM clock was 990 MHz, 1980 MHz in the baseline"])


def test_power_cap_is_told_and_does_not_excuse_a_slowdown(pytester: pytest.Pytester) -> None:
    Suite().record(pytester)
    capped = machine("states=[fake_state(power_cap_s=100.0 * count) for count in range(9)]")
    result = suite_of(KERNEL, conftest=capped).slower().run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*; power-capped 100 % of the time"])


# Disks


def test_results_path_that_is_a_folder_is_no_pass(pytester: pytest.Pytester) -> None:
    pytester.mkdir("out.jsonl")
    result = Suite().run(pytester, "--gpuperf-json=out.jsonl")

    assert result.ret != 0
    result.stdout.fnmatch_lines(["The results could not be written to *out.jsonl: *"])
    assert_readable(result)


def test_problem_with_the_results_is_told_once(pytester: pytest.Pytester) -> None:
    pytester.mkdir("out.jsonl")
    source = (
        "@pytest.mark.parametrize('n', range(5))\ndef test_kernel(gpu_benchmark, n):\n    gpu_benchmark(lambda: 1e-3)\n"
    )
    result = suite_of(source).run(pytester, "--gpuperf-json=out.jsonl")

    assert sum("The results could not be written" in line for line in result.stdout.lines) == 1


def test_results_below_a_file_are_no_pass(pytester: pytest.Pytester) -> None:
    (pytester.path / ".gpuperf").write_text("a file, where a folder should be")
    result = Suite().run(pytester)

    assert result.ret != 0
    result.stdout.fnmatch_lines(["The results could not be written to *results.jsonl: *"])
    assert_readable(result)


FULL_DISK = """
import errno, os

fsync = os.fsync

def full(descriptor):
    if FAILS_FROM <= full.calls:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full.calls += 1
    fsync(descriptor)

full.calls = 0

@pytest.fixture(autouse=True, scope="session")
def full_disk():
    os.fsync = full
    yield

def pytest_unconfigure():
    os.fsync = fsync
"""


@pytest.mark.parametrize("fails_from", [0, 1, 2])
def test_disk_that_is_full_is_no_pass(pytester: pytest.Pytester, fails_from: int) -> None:
    conftest = f"import pytest\nFAILS_FROM = {fails_from}\n{FULL_DISK}{FAKE_H100}"
    result = suite_of(KERNEL, conftest=conftest).run(pytester)

    assert result.ret != 0
    result.stdout.fnmatch_lines(["*could not be written*: No space left on device*"])
    assert_readable(result)


@pytest.mark.parametrize("option", ["--gpuperf-update", "--gpuperf-accept=why"])
def test_disk_that_is_full_when_baselines_are_written_is_no_pass(pytester: pytest.Pytester, option: str) -> None:
    conftest = f"import pytest\nFAILS_FROM = 3\n{FULL_DISK}{FAKE_H100}"
    result = suite_of(KERNEL, conftest=conftest).run(pytester, option)

    assert result.ret != 0
    result.stdout.fnmatch_lines(["*test_suite.json could not be written: No space left on device (ENOSPC).*"])
    assert recorded_tests(pytester) == []
    assert_readable(result)


def test_baselines_folder_that_is_a_file_is_no_pass(pytester: pytest.Pytester) -> None:
    (pytester.path / "baselines").write_text("a file, where a folder should be")
    result = Suite().run(pytester, "--gpuperf-update")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "baselines" in result.stdout.str() + result.stderr.str()
    assert_readable(result)


READ_ONLY = """
import errno, os
from pathlib import Path

mkdir = Path.mkdir

def refuse(self, *arguments, **options):
    if "baselines" in self.parts:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
    mkdir(self, *arguments, **options)

def pytest_runtest_setup():
    Path.mkdir = refuse

def pytest_unconfigure():
    Path.mkdir = mkdir
"""


def test_baselines_folder_that_cannot_be_made_is_no_pass(pytester: pytest.Pytester) -> None:
    result = suite_of(KERNEL, conftest=READ_ONLY + FAKE_H100).run(pytester, "--gpuperf-update")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*could not be locked: Permission denied (EACCES). No file was changed.*"])
    assert_readable(result)


def test_patch_that_cannot_be_written_is_no_pass(pytester: pytest.Pytester) -> None:
    pytester.mkdir("new.patch")
    result = Suite().run(pytester, "--gpuperf-patch=new.patch")

    assert result.ret != 0
    result.stdout.fnmatch_lines(["*new.patch could not be written: *"])
    assert_readable(result)


def test_lock_folder_that_is_a_file_is_no_pass(pytester: pytest.Pytester) -> None:
    (pytester.path / "locks").write_text("a file, where a folder should be")
    suite = Suite(environment={"GPUPERF_LOCK_DIR": str(pytester.path / "locks")})
    result = suite.run(pytester)

    assert result.ret != 0
    assert "GPUPERF_LOCK_DIR" in result.stdout.str()
    assert_readable(result)


# Interruptions

THREE = """
def test_one(gpu_benchmark):
    gpu_benchmark(lambda: 1e-3)

def test_two(gpu_benchmark):
    gpu_benchmark(lambda: 2e-3)

def test_three(gpu_benchmark):
    if os.environ.get("INTERRUPT", "1") == "1":
        raise KeyboardInterrupt
    gpu_benchmark(lambda: 3e-3)
"""


def test_interrupted_run_keeps_what_was_measured(pytester: pytest.Pytester) -> None:
    result = suite_of(THREE).in_subprocess().run(pytester, "--gpuperf-update")
    results = results_of(pytester)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert [test.key.test for test in results.tests] == ["test_one", "test_two"]
    assert results.end is None or not results.end.is_whole
    assert recorded_tests(pytester) == []
    result.stdout.fnmatch_lines([" time *2.000 ms*NEW"])


def test_interrupted_run_can_be_recorded_by_the_command(pytester: pytest.Pytester) -> None:
    suite_of(THREE).in_subprocess().run(pytester)
    done = gpuperf("baseline", "record")

    assert (done.code, done.output) == (0, "Baselines in baselines: 2 recorded.\n")
    assert recorded_tests(pytester) == ["test_suite.py::test_one", "test_suite.py::test_two"]


def test_interrupted_run_leaves_the_baselines_untouched(pytester: pytest.Pytester) -> None:
    suite = suite_of(THREE)
    Suite(files=suite.files, environment={"INTERRUPT": "0"}).record(pytester)
    before = bytes_of_baselines(pytester)
    suite.in_subprocess().run(pytester, "--gpuperf-update")

    assert bytes_of_baselines(pytester) == before
    assert gpuperf("baseline", "prune").code == 1
    assert bytes_of_baselines(pytester) == before


def test_interruption_inside_a_measurement_is_an_interruption(pytester: pytest.Pytester) -> None:
    source = """
def interrupt():
    raise KeyboardInterrupt

def test_kernel(gpu_benchmark):
    gpu_benchmark(interrupt)
"""
    result = suite_of(source).in_subprocess().run(pytester)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert not (pytester.path / ".gpuperf").exists()
    assert "INTERNALERROR" not in result.stdout.str()


def test_fixture_that_fails_after_the_measurement_keeps_it(pytester: pytest.Pytester) -> None:
    source = """
@pytest.fixture
def engine():
    yield
    raise RuntimeError("could not stop")

def test_kernel(engine, gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(passed=1, errors=1)
    assert statuses_of(pytester) == {"test_kernel time": "NEW"}
    assert_readable(result)
