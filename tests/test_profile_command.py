"""`gpuperf profile` as its user runs it, on a CPU; its numbers of traces that were taken on a GPU; nsys by a fake."""

import json
import os
import sys
from pathlib import Path

import pytest
from harness import gpuperf
from msgspec.structs import replace

from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import NotSupported, UsageError
from pytest_gpuperf.kernels import read_trace, summary_of
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.profiling import NSYS_VARIABLE
from pytest_gpuperf.records import KernelSummary, KernelUse
from pytest_gpuperf.report.profile import profile_lines
from pytest_gpuperf.trials.profile import Profiled, Result, Wanted, check, is_test, profile, workload_of

pytest.importorskip("torch")
DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and locks of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def shown(name: str, calls: int, *, top: int = 15, asked: int | None = None, width: int = 80) -> str:
    """What is printed of a trace of an H200."""
    kernels = summary_of(read_trace(DATA / f"trace_{name}.json.gz"), calls=calls, wall_s=calls * 250e-6)
    result = Result(seen=(Profiled(title=name, kernels=kernels),))
    return "\n".join(line.text for line in profile_lines(result, top=top, asked=asked, width=width))


def printed(kernels: KernelSummary, *, width: int = 80) -> str:
    result = Result(seen=(Profiled(title="t", kernels=kernels),))
    return "\n".join(line.text for line in profile_lines(result, top=15, asked=None, width=width))


# What is printed


def test_kernels_come_with_their_shares_and_the_host_with_its_launches() -> None:
    assert shown("mlp", 30).splitlines() == [
        "mlp",
        "  30 calls profiled; of one call:",
        "  GPU    227 us from first to last, busy 97 %, idle 2.7 % (6.03 us)",
        "         longest gap 20.4 us, 1 stream",
        "  host   3 launches, 19.3 us in them",
        "         waits for the GPU 199 us, wall 250 us with the profiler's cost",
        "    share      time   count  blocks  kernel",
        "   92.4 %    204 us       1     132  nvjet_sm90_tst_256x12…x4_1x2_h_bz_coopA_NNT",
        "    7.2 %   15.9 us       1   16384  vectorized_elementwise_kernel",
        "    0.4 %    860 ns       1       -  Memset (Device)",
    ]


def test_a_copy_shows_its_bytes_and_its_rate() -> None:
    assert "  Memcpy DtoD (Device -> Device): 1.07 GB in 504 us, 2.13 TB/s" in shown("copy", 20).splitlines()


def test_a_graph_is_said_to_be_one() -> None:
    assert "host   1 launches, 1 of them CUDA graphs, 103 us in them" in shown("graph", 5)


def test_a_gpu_that_waits_is_said_to() -> None:
    text = shown("host_sleep", 60)
    assert "busy 12 %, idle 88 % (40.7 us)" in text
    assert (
        "  The GPU waits: the host takes 46.0 us from one launch to the next, and the\n  GPU is done in 5.30 us."
        in text
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sync_s": 80e-6, "launches": 5.0}, "the host stops for it between launches"),
        ({"launches": 50.0}, "the host takes 2.00 us from one launch to the next, and the GPU is done in 200 ns. A"),
        ({"launches": 50.0}, "A CUDA graph, torch.compile or larger batches launch less."),
        ({"span_s": 1e-3, "launches": 5.0}, "Look for what it does in between."),
        ({"launches": 2.0, "graph_launches": 2.0}, "between the kernels of a CUDA graph, which are small."),
    ],
)
def test_why_it_waits_follows_from_the_numbers(changes: dict[str, float], words: str) -> None:
    use = KernelUse(name="k", count=1.0, time_s=1e-5)
    kernels = KernelSummary(
        calls=1, wall_s=1e-4, span_s=1e-4, busy_s=1e-5, longest_gap_s=1e-5, kernels=(use,), launches=1.0
    )
    assert words in printed(replace(kernels, **changes), width=200)


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("name", ["mlp", "graph", "host_sleep", "copy"])
def test_it_fits_the_terminal(name: str, width: int) -> None:
    assert max(map(len, shown(name, 5, width=width).splitlines())) <= max(width, 73), "the narrowest that is looked at"


def test_what_is_not_shown_is_summed_up() -> None:
    rows = shown("mlp", 30, top=1).splitlines()
    assert rows[-1].split() == ["7.6", "%", "16.7", "us", "2", "-", "all", "others"]


def test_fewer_calls_than_asked_for_are_explained() -> None:
    lines = shown("mlp", 30, asked=100_000).splitlines()
    assert lines[1] == "  30 calls profiled of 100,000 asked for (the trace stays small); of one call:"
    assert len(lines[1]) <= 80
    assert shown("mlp", 1, asked=1).splitlines()[1] == "  1 call profiled; of one call:"


# Workloads and tests


def test_a_workload_by_name_writes_a_trace(tmp_path: Path) -> None:
    result = gpuperf("profile", "matmul:64:float32", "--device", "cpu", "--output", "traces", "--calls", "5")
    assert result.code == 0, result.errors
    trace = tmp_path / "traces" / "matmul-64-float32.trace.json.gz"
    assert sum(event.name == "aten::mm" for event in read_trace(trace)) == 5
    assert "5 calls profiled; of one call:" in result.output
    assert "  no GPU: torch's operators take " in result.output
    assert "Trace: traces/matmul-64-float32.trace.json.gz\nOpen it at https://ui.perfetto.dev" in result.output


def test_a_test_is_profiled_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import os\nimport torch\n\n"
        "def test_add(gpu_benchmark):\n"
        f"    assert os.getpid() != {os.getpid()}\n"
        "    one = torch.ones(9)\n"
        "    gpu_benchmark(lambda: torch.add(one, one), mode='hot')\n"
    )
    result = gpuperf("profile", "test_own.py::test_add", "--calls", "3", "--", "--gpuperf-device", "cpu")
    assert result.code == 0, result.errors
    assert result.output.startswith("test_own.py::test_add time\n  3 calls profiled; of one call:")
    assert "Trace: .gpuperf/profile/test_add-time.trace.json.gz" in result.output
    assert not (tmp_path / ".gpuperf" / "results.jsonl").exists(), "nothing was measured"


def test_a_test_that_profiles_nothing_says_what_pytest_said(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_nothing():\n    pass\n")
    result = gpuperf("profile", "test_own.py::test_nothing")
    assert result.code == 1
    assert "Nothing was profiled in test_own.py::test_nothing: pytest ended with exit code 0." in result.errors
    assert "1 passed" in result.errors


def test_a_test_that_does_not_end_is_ended(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("import time\n\ndef test_long():\n    time.sleep(60)\n")
    result = gpuperf("profile", "test_own.py::test_long", "--timeout", "2")
    assert result.code == 1
    assert "pytest did not end in time and was killed" in result.errors


@pytest.mark.parametrize(
    ("target", "is_one"),
    [
        ("test_a.py::test_b[x]", True),
        ("test_a.py", True),
        ("perf_tests", True),
        ("matmul:64", False),
        ("llama-3-8b", False),
        ("model", False),
    ],
)
def test_a_test_is_told_from_a_workload(tmp_path: Path, target: str, is_one: bool) -> None:
    (tmp_path / "perf_tests").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert is_test(target) == is_one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], r"'nonsense' is neither a test (test_a.py::test_b) nor a workload. Workloads: matmul:N:DTYPE"),
        (["matmul:64", "--calls", "0"], "--calls 0: at least 1 is needed."),
        (["matmul:64", "--top", "0"], "--top 0: at least 1 is needed."),
        (["matmul:64", "--timeout", "nan"], "--timeout nan is not a number of seconds above zero."),
        (["matmul:64", "--engine", "trt"], "--engine trt does not exist. Valid: transformers, vllm."),
        (["matmul:64", "--device", "tpu"], "--device tpu does not exist. Valid: auto, cuda, cpu."),
        (["matmul:64", "--output", "file"], "--output file is a file. Name a folder for the traces."),
        (["matmul:64", "--output", "file/a"], "--output file/a cannot be written to: Not a directory. Name another"),
        (["matmul:64", "--", "-k", "x"], "matmul:64 is no test, so pytest's arguments"),
        (["matmul:0", "--device", "cpu"], "'matmul:0' is not matmul:N:DTYPE, such as matmul:8192:bfloat16."),
        (["matmul:8:int99", "--device", "cpu"], "Matmul knows no dtype 'int99'."),
        (["copy:big", "--device", "cpu"], "'copy:big': 'big' is not a size of 4 bytes or more"),
        (["copy:1MiB:2", "--device", "cpu"], "'copy:1MiB:2' has too many parts."),
        (["tiny", "--engine", "vllm", "--device", "cpu"], "vLLM's profiler is of use on a GPU alone."),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    result = gpuperf("profile", *arguments)
    assert result.code == 1
    assert message in result.errors
    assert result.output == ""


@pytest.mark.parametrize(("size", "size_bytes"), [("copy:2MiB", 2 * 2**21), ("read:64kB", 64e3), ("write:8B", 8)])
def test_sizes_are_read_as_they_are_written(size: str, size_bytes: float) -> None:
    """A copy moves each byte twice."""
    assert workload_of(size, cpu_device()).bytes_moved == size_bytes


def test_what_the_device_cannot_do_is_said() -> None:
    device: Device = cpu_device()
    with pytest.raises(NotSupported, match="tf32 is a mode of GPUs"):
        workload_of("matmul:64:tf32", device)


def test_a_model_is_profiled_step_by_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    wanted = Wanted(target="tiny", output=tmp_path / "traces", calls=4)
    check(wanted)
    result = profile(wanted, Machine("cpu"))
    [one] = result.seen
    assert (one.kernels.calls, one.calls) == (4, "steps")
    assert one.title == "tiny, 2 requests of 16 + 4 tokens"
    assert [trace.name for trace in result.traces] == ["tiny.trace.json.gz"]


# nsys

NSYS = """#!{python}
import json, os, pathlib, subprocess, sys
arguments = sys.argv[1:]
report = next(one.partition("=")[2] for one in arguments if one.startswith("--output="))
command = arguments[next(i for i, one in enumerate(arguments) if i and not one.startswith("--")):]
pathlib.Path("nsys.json").write_text(json.dumps({{"arguments": arguments, "under": os.environ.get("{variable}")}}))
done = subprocess.run(command, capture_output=True, text=True)
pathlib.Path("said").write_text(done.stdout + done.stderr)
if "{end}" == "report":
    pathlib.Path(report + ".nsys-rep").write_text("report")
sys.exit(done.returncode)
"""


def put_nsys(folder: Path, monkeypatch: pytest.MonkeyPatch, *, end: str = "report") -> None:
    folder.mkdir()
    program = folder / "nsys"
    program.write_text(NSYS.format(python=sys.executable, variable=NSYS_VARIABLE, end=end))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nsys_watches_the_same_command_without_another_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nsys(tmp_path / "bin", monkeypatch)
    result = gpuperf("profile", "matmul:64", "--device", "cpu", "--nsys", "--output", "out")
    assert result.code == 0, result.errors
    told = json.loads((tmp_path / "nsys.json").read_text())
    assert told["under"] == "1"
    assert told["arguments"][:4] == [
        "profile",
        "--trace=cuda,nvtx,osrt",
        "--force-overwrite=true",
        "--output=out/report",
    ]
    assert told["arguments"][-6:] == ["profile", "matmul:64", "--device", "cpu", "--output", "out"]
    assert (tmp_path / "said").read_text() == "nsys recorded it: torch's profiler was left out.\n"
    assert "Report of nsys: out/report.nsys-rep" in result.output
    assert "nsys stats out/report.nsys-rep" in result.output


def test_nsys_that_leaves_no_report_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nsys(tmp_path / "bin", monkeypatch, end="nothing")
    result = gpuperf("profile", "matmul:64", "--device", "cpu", "--nsys", "--output", "out")
    assert result.code == 1
    assert "nsys ended with exit code 0, and out/report.nsys-rep is missing." in result.errors


def test_without_nsys_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = gpuperf("profile", "matmul:64", "--device", "cpu", "--nsys")
    assert result.code == 1
    assert "nsys is not on the PATH. Install NVIDIA Nsight Systems, or leave --nsys out" in result.errors


def test_check_takes_what_is_right() -> None:
    for target in ("matmul:64", "copy:1GiB", "tiny", "test_a.py::test_b"):
        check(Wanted(target=target, output=Path("new")))
    with pytest.raises(UsageError, match="neither a test"):
        check(Wanted(target="test_a", output=Path("new")))
