"""`@pytest.mark.gpu` and `@pytest.mark.perf`: mistakes end the run before it begins, needs that are not met skip."""

import pytest
from harness import KERNEL, Suite, assert_readable, statuses_of

TWO_H100 = """
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu

def pytest_configure(config):
    gpus = [fake_gpu(index) for index in range(2)]
    pairs = [tuple(gpu.uuid for gpu in gpus)] if NVLINK else ()
    nvml = FakeNvml(*gpus, nvlinks=pairs)
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""
LINKED = "NVLINK = True" + TWO_H100
UNLINKED = "NVLINK = False" + TWO_H100

#: A test that holds its device and does nothing with it: measuring on a real CPU takes a second.
HOLDS = "\ndef test_kernel(gpu): assert gpu.device == 'cpu'\n"


def marked(marker: str, *, test: str = KERNEL) -> Suite:
    """A suite with a marked test, and one beside it that would leave a trace if anything ran."""
    beside = """
def test_beside():
    open("something-ran", "w").close()
"""
    return Suite(files={"test_suite.py": f"@pytest.mark.{marker}{test}{beside}"})


def on_cpu(marker: str) -> Suite:
    """A marked test that is run on this machine's CPU."""
    files = {"test_suite.py": f"@pytest.mark.{marker}{HOLDS}"}
    return Suite(files=files, conftest="", options=("--gpuperf-device=cpu", "-rs"))


def assert_usage_error(pytester: pytest.Pytester, result: pytest.RunResult, *texts: str) -> None:
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in result.stderr.lines + result.stdout.lines if line.startswith("ERROR: ")]
    assert len(errors) == 1, result.stdout.str() + result.stderr.str()
    for text in texts:
        assert text in errors[0]
    assert not (pytester.path / "something-ran").exists()
    assert_readable(result)


# Mistakes


@pytest.mark.parametrize(
    ("marker", "texts"),
    [
        (
            "gpu(vram=40)",
            ("Unknown argument 'vram' in @gpu of test_kernel", "Valid: arch, count, exclusive, min_vram_gb, nvlink."),
        ),
        ("gpu(Count=2)", ("'Count'", "Valid: arch, count, exclusive, min_vram_gb, nvlink.")),
        ("gpu(40)", ("test_kernel", "arch, count, exclusive, min_vram_gb, nvlink")),
        ("gpu(count='2')", ("count='2'", "test_kernel", "a whole number of GPUs")),
        ("gpu(count=0)", ("count=0", "test_kernel")),
        ("gpu(count=-1)", ("count=-1", "test_kernel")),
        ("gpu(count=True)", ("count=True", "test_kernel")),
        ("gpu(count=1.5)", ("count=1.5", "test_kernel")),
        ("gpu(min_vram_gb='40')", ("min_vram_gb='40'", "test_kernel", "a number of GB")),
        ("gpu(min_vram_gb=-1)", ("min_vram_gb=-1", "test_kernel")),
        ("gpu(min_vram_gb=float('nan'))", ("min_vram_gb=nan", "test_kernel")),
        ("gpu(min_vram_gb=float('inf'))", ("min_vram_gb=inf", "test_kernel")),
        ("gpu(min_vram_gb=[40])", ("min_vram_gb=[40]", "test_kernel")),
        ("gpu(arch='hoper')", ("arch='hoper'", "test_kernel", "hopper")),
        ("gpu(arch=9.0)", ("arch=9.0", "test_kernel")),
        ("gpu(nvlink='yes')", ("nvlink='yes'", "test_kernel", "True or False")),
        ("gpu(nvlink=1)", ("nvlink=1", "test_kernel", "True or False")),
        ("perf(tolerence=0.1)", ("Unknown argument 'tolerence' in @perf of test_kernel", "Valid: mode, tolerance.")),
        ("perf(0.05)", ("@perf of test_kernel takes no positional arguments", "Valid: mode, tolerance.")),
        ("perf(tolerance=5)", ("@perf of test_kernel", "tolerance=5 ", "0.05 or '5%'")),
        ("perf(tolerance=1.0)", ("@perf of test_kernel", "tolerance=1.0 ")),
        ("perf(tolerance=0)", ("@perf of test_kernel", "tolerance=0 ")),
        ("perf(tolerance=-0.1)", ("@perf of test_kernel", "tolerance=-0.1 ")),
        ("perf(tolerance=float('nan'))", ("@perf of test_kernel", "tolerance=nan ")),
        ("perf(tolerance=float('inf'))", ("@perf of test_kernel", "tolerance=inf ")),
        ("perf(tolerance='x')", ("@perf of test_kernel", "tolerance='x' is not a number", "0.05 or '5%'")),
        ("perf(tolerance='')", ("@perf of test_kernel", "tolerance=''")),
        ("perf(tolerance='0.05')", ("@perf of test_kernel", "tolerance='0.05'")),
        ("perf(tolerance='-5%')", ("@perf of test_kernel", "tolerance='-5%'")),
        ("perf(tolerance='500%')", ("@perf of test_kernel", "tolerance='500%'")),
        ("perf(tolerance=True)", ("@perf of test_kernel", "tolerance=True")),
        ("perf(tolerance=[0.05])", ("@perf of test_kernel", "tolerance=[0.05]")),
        ("perf(mode='fast')", ("mode='fast'", "@perf of test_kernel", "Valid: cold, hot, sustained.")),
        ("perf(mode='recorded')", ("mode='recorded'", "@perf of test_kernel")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_in_a_marker_is_a_usage_error_that_names_the_test_and_runs_nothing(
    pytester: pytest.Pytester, marker: str, texts: tuple[str, ...]
) -> None:
    assert_usage_error(pytester, marked(marker).run(pytester), *texts)


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("perf(mode=['cold'])", "mode=['cold']"),
        ("perf(mode={})", "mode={}"),
        ("gpu(arch=['hopper'])", "arch=['hopper']"),
        ("gpu(arch={})", "arch={}"),
    ],
)
def test_unhashable_argument_is_a_usage_error_too(pytester: pytest.Pytester, marker: str, text: str) -> None:
    assert_usage_error(pytester, marked(marker).run(pytester), text, "test_kernel")


def test_mistake_is_found_even_when_only_collecting(pytester: pytest.Pytester) -> None:
    result = marked("gpu(vram=40)").run(pytester, "--collect-only")

    assert_usage_error(pytester, result, "Unknown argument 'vram'")


def test_mistake_in_a_test_that_uses_no_fixture_is_found(pytester: pytest.Pytester) -> None:
    result = marked("gpu(vram=40)", test="\ndef test_plain(): pass\n").run(pytester)

    assert_usage_error(pytester, result, "Unknown argument 'vram' in @gpu of test_plain")


def test_mistake_of_a_class_names_a_test_of_it(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.perf(tolerance=5)
class TestKernels:
    def test_kernel(self, gpu_benchmark):
        gpu_benchmark(lambda: TIME_S)
"""
    result = Suite(files={"test_suite.py": source}).run(pytester)

    assert_usage_error(pytester, result, "@perf of test_kernel", "tolerance=5 ")


def test_mistake_of_a_module_names_a_test_of_it(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": f"pytestmark = pytest.mark.gpu(count='all'){KERNEL}"}).run(pytester)

    assert_usage_error(pytester, result, "test_kernel", "count='all'")


def test_mistake_in_one_parameter_names_it(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.perf(tolerance=7))])
def test_kernel(gpu_benchmark, n):
    gpu_benchmark(lambda: TIME_S)
"""
    result = Suite(files={"test_suite.py": source}).run(pytester)

    assert_usage_error(pytester, result, "@perf of test_kernel[2]", "tolerance=7 ")


def test_mistake_in_a_test_that_is_not_selected_does_not_matter(pytester: pytest.Pytester) -> None:
    result = marked("gpu(vram=40)").run(pytester, "-k", "beside")

    result.assert_outcomes(passed=1, deselected=1)


# Good arguments


@pytest.mark.parametrize("tolerance", ["0.05", "'5%'", "' 5 % '", "'2.5%'", "1e-3"])
def test_good_tolerances_are_taken(pytester: pytest.Pytester, tolerance: str) -> None:
    marked(f"perf(tolerance={tolerance})").run(pytester, "--strict-markers").assert_outcomes(passed=2)


def test_mode_of_the_marker_is_measured_with(pytester: pytest.Pytester) -> None:
    marked("perf(mode='sustained')").run(pytester, "--gpuperf-update").assert_outcomes(passed=2)
    result = marked("perf(mode='cold')").run(pytester)

    assert statuses_of(pytester) == {"test_kernel time": "INCOMPARABLE"}
    result.stdout.fnmatch_lines(
        ["INCOMPARABLE test_kernel time: Not comparable: method cold, cuda-events, baseline sustained, cuda-events."]
    )


def test_markers_are_known_to_strict_markers(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": f"@pytest.mark.gpu\n@pytest.mark.perf{KERNEL}"})

    suite.run(pytester, "--strict-markers").assert_outcomes(passed=1)


def test_markers_are_explained(pytester: pytest.Pytester) -> None:
    result = Suite().run(pytester, "--markers")

    result.stdout.fnmatch_lines(
        [
            "@pytest.mark.gpu(count=1, min_vram_gb=0, arch=None, nvlink=False, exclusive=*",
            "@pytest.mark.perf(tolerance=None, *",
        ]
    )


# Needs


def test_test_that_needs_more_memory_is_skipped_with_both_numbers(pytester: pytest.Pytester) -> None:
    result = marked("gpu(min_vram_gb=90)").run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_kernel: *gpu(min_vram_gb=90)*85.5* GB*NVIDIA H100 80GB HBM3*"])


def test_test_that_needs_no_more_memory_than_there_is_runs(pytester: pytest.Pytester) -> None:
    marked("gpu(min_vram_gb=80)").run(pytester).assert_outcomes(passed=2)


def test_test_that_needs_two_gpus_is_skipped_where_there_is_one(pytester: pytest.Pytester) -> None:
    result = marked("gpu(count=2)").run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_kernel: *gpu(count=2), but there is 1 GPU here*"])


@pytest.mark.parametrize(
    ("arch", "skipped"),
    [("'hopper'", 0), ("'Hopper'", 0), ("'9.0'", 0), ("'>=8.0'", 0), ("'ampere'", 1), ("'8.0'", 1), ("'>=10.0'", 1)],
)
def test_architecture_is_compared_with_the_gpu(pytester: pytest.Pytester, arch: str, skipped: int) -> None:
    result = marked(f"gpu(arch={arch})").run(pytester, "-rs")

    result.assert_outcomes(passed=2 - skipped, skipped=skipped)
    if skipped:
        result.stdout.fnmatch_lines([f"SKIPPED*test_kernel: *gpu(arch={arch})*"])


def test_test_that_needs_nvlink_is_skipped_where_there_is_none(pytester: pytest.Pytester) -> None:
    suite = Suite(files=marked("gpu(count=2, nvlink=True)").files, conftest=UNLINKED)
    result = suite.run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_kernel: *gpu(count=2, nvlink=True)*NVLink*"])


def test_test_that_needs_nvlink_gets_both_gpus(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.gpu(count=2, nvlink=True)
def test_kernel(gpus, gpu, gpu_benchmark):
    assert [each.index for each in gpus] == [0, 1]
    assert gpu == gpus[0]
    gpu_benchmark(lambda: TIME_S)
"""
    result = Suite(files={"test_suite.py": source}, conftest=LINKED).run(pytester, "--gpuperf-update")

    result.assert_outcomes(passed=1)
    assert [path.name for path in (pytester.path / "baselines").glob("[!.]*")] == ["2x-nvidia-h100-80gb-hbm3"]


def test_test_without_marker_gets_one_gpu(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpus):
    assert len(gpus) == 1
"""
    Suite(files={"test_suite.py": source}, conftest=LINKED).run(pytester).assert_outcomes(passed=1)


def test_marked_test_without_fixtures_is_skipped_too(pytester: pytest.Pytester) -> None:
    result = marked("gpu(min_vram_gb=90)", test="\ndef test_plain(): assert False\n").run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_plain: *gpu(min_vram_gb=90)*"])


def test_closest_marker_wins(pytester: pytest.Pytester) -> None:
    source = """
pytestmark = pytest.mark.gpu(min_vram_gb=90)

def test_too_large(): pass

@pytest.mark.gpu(min_vram_gb=40)
class TestInner:
    def test_fits(self): pass

    @pytest.mark.gpu(min_vram_gb=100)
    def test_too_large(self): pass
"""
    result = Suite(files={"test_suite.py": source}).run(pytester, "-rs")

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*gpu(min_vram_gb=90)*", "*gpu(min_vram_gb=100)*"])


def test_marker_on_a_class_counts_for_its_tests(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.perf(tolerance=0.5)
class TestKernels:
    def test_kernel(self, gpu_benchmark):
        gpu_benchmark(lambda: TIME_S)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert suite.slower().run(pytester).ret == 0


# On the CPU


def test_cpu_does_where_a_test_asks_for_one_device(pytester: pytest.Pytester) -> None:
    on_cpu("gpu").run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize("marker", ["gpu(count=2)", "gpu(arch='hopper')", "gpu(count=2, nvlink=True)"])
def test_what_a_cpu_cannot_be_is_skipped_on_it(pytester: pytest.Pytester, marker: str) -> None:
    result = on_cpu(marker).run(pytester)

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        [f"SKIPPED*test_kernel: *{marker}, which needs a GPU, and this run measures on the CPU *"]
    )


def test_memory_on_the_cpu_is_its_ram(pytester: pytest.Pytester) -> None:
    on_cpu("gpu(min_vram_gb=0.1)").run(pytester).assert_outcomes(passed=1)
    result = on_cpu("gpu(min_vram_gb=1e6)").run(pytester)

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*test_kernel: *gpu(min_vram_gb=1e+06), but this machine has * of RAM*"])


def test_exclusive_use_of_the_host_by_a_test_that_holds_nothing_is_a_mistake(pytester: pytest.Pytester) -> None:
    source = 'import pytest\n\n@pytest.mark.gpu(exclusive="host")\ndef test_alone():\n    pass\n'
    result = Suite(files={"test_suite.py": source}).run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: exclusive='host' in @gpu of test_alone keeps nobody away, because *. Add the fixture gpu to its*"]
    )
