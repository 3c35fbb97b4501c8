"""What `gpuperf diagnose` prints, as text, JSON and picture; the command with its mistakes."""

import importlib.util
import json
from pathlib import Path

import pytest
from harness import gpuperf
from msgspec.structs import replace

from pytest_gpuperf.analysis.advice import Recommendation, Setting, recommendations
from pytest_gpuperf.analysis.roofline import Ceilings, Evidence, diagnose, from_data_sheet
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import KernelSummary, KernelUse, Telemetry
from pytest_gpuperf.report.diagnose import diagnosis_lines, headline, save_plot, to_json
from pytest_gpuperf.trials.diagnose import Part, Report

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
CEILINGS = Ceilings(
    dtype="bfloat16",
    flops_per_s=664.6e12,
    bandwidth_bytes_per_s=4.2595e12,
    tensor_share=0.813,
    dram_share=0.809,
    peak_flops_per_s=989e12,
    peak_bandwidth_bytes_per_s=4.8e12,
)
TELEMETRY = Telemetry(
    duration_s=2.0, sm_clock_mhz=1552.0, power_w=690.0, power_cap_share=0.96, memory_used_bytes=20_000_000_000
)
GEMM = KernelUse(name="nvjet_sm90_tst_256x128", count=2.0, time_s=1.39e-3, blocks=132.0)


def kernels(busy_s: float, **changes: object) -> KernelSummary:
    values: dict[str, object] = {
        "calls": 10,
        "wall_s": busy_s,
        "span_s": busy_s,
        "busy_s": busy_s,
        "longest_gap_s": 0.0,
        "kernels": (replace(GEMM, time_s=busy_s),),
        "launches": 2.0,
    }
    return KernelSummary(**{**values, **changes})  # type: ignore[arg-type]


def part(evidence: Evidence, *, ceilings: Ceilings = CEILINGS, name: str = "matmul", tokens: int | None = None) -> Part:
    found = diagnose(evidence, ceilings)
    setting = Setting(
        dtype="bfloat16",
        peak_flops_per_s={"bfloat16": 989e12, "float8": 1979e12},
        telemetry=TELEMETRY,
        max_sm_clock_mhz=1980.0,
    )
    return Part(
        name=name,
        times_s=(evidence.time_s,) * 98 + (2 * evidence.time_s,) * 2,
        tokens=tokens,
        diagnosis=found,
        advice=recommendations(found, setting),
        telemetry=TELEMETRY,
    )


PRODUCT = Evidence(
    time_s=1.654e-3,
    busy_s=1.65e-3,
    flop=2 * 8192**3,
    bytes_moved=402.7e6,
    activity=GpuActivity(duration_s=1.2, sm_share=0.84, occupancy=0.12, tensor_share=0.813, dram_share=0.158),
    kernels=kernels(1.65e-3),
)
COPY = Evidence(time_s=504e-6, busy_s=503.5e-6, flop=1.0, bytes_moved=2**31, kernels=kernels(503.5e-6))
GAPS = Evidence(
    time_s=41.3e-3,
    busy_s=6.3e-3,
    flop=1.5e10,
    bytes_moved=1.5e10,
    kernels=kernels(6.3e-3, launches=1462.0, span_s=48e-3),
)
SLEEP = Evidence(time_s=10e-3, busy_s=1e-6, kernels=kernels(1e-6, launches=1.0, calls=2))
TALK = Evidence(
    time_s=1e-3, busy_s=1e-3, kernels=kernels(1e-3, kernels=(replace(GEMM, name="ncclDevKernel_X", time_s=1e-3),))
)


def report(*parts: Part, ceilings: Ceilings = CEILINGS, notes: tuple[str, ...] = ()) -> Report:
    return Report(title="a workload", device="NVIDIA H200", ceilings=ceilings, parts=parts, notes=notes)


def text(*parts: Part, **changes: object) -> list[str]:
    return [line.text for line in diagnosis_lines(report(*parts, **changes))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evidence", "line"),
    [
        (PRODUCT, "compute-bound, compute 100 % of a product, memory 20 % of a copy"),
        (COPY, "memory-bound, memory 100 % of a copy, compute 0.00 % of a product"),
        (GAPS, "overhead-bound, busy 15 % of the time (under 70 %), 24 us pause a launch"),
        (SLEEP, "idle, busy 0.01 % of the time (under 10 %), 10 ms pause a launch"),
        (TALK, "communication-bound, 100 % of the busy time (from 30 % on); busy 100 % of all"),
        (
            replace(COPY, bytes_moved=2**30),
            "latency-bound, memory 50 % of a copy, compute 0.00 % of a product (both under 60 %)",
        ),
        (
            Evidence(time_s=1.0),
            "not known: how long the GPU was busy and bytes moved and FLOP missing (memory -, compute -)",
        ),
    ],
)
def test_the_first_line_is_the_class_with_the_numbers_that_decided(evidence: Evidence, line: str) -> None:
    assert headline(diagnose(evidence, CEILINGS)) == line


def test_a_diagnosis_is_read_from_top_to_bottom() -> None:
    lines = text(part(PRODUCT))
    assert lines[:9] == [
        "matmul: compute-bound, compute 100 % of a product, memory 20 % of a copy",
        "  nearest: overhead-bound, 30 points away (busy 100 %, there 70 %)",
        "  per iteration   p50 1.654 ms, p95 1.654 ms, p99 3.308 ms (100)",
        "  busy            100 % of the time, 2 kernels, 2 launches",
        "  memory          20.00 GB in use",
        "  bandwidth       243.5 GB/s (MBU 5.7 %, 403 MB needed)",
        "  computation     664.8 TFLOP/s (MFU 100 %, 1.10 TFLOP needed)",
        "  counters        SMs 84 %, occupancy 12 %, tensor 81 %, DRAM 16 %",
        "  clock           1552 MHz, 690 W, power-capped 96 %",
    ]
    assert lines[9] == "  What follows:"
    assert lines[10].startswith("  1. Products in bfloat16 take 100 % of the time: fp8 has 2.0x the peak here; at")
    assert lines[-2:] == [
        "Ceilings (measured just now): bfloat16 product 664.6 TFLOP/s, copy 4.260 TB/s,",
        "  ridge at 156 FLOP/B.",
    ]


def test_nothing_is_wider_than_a_terminal() -> None:
    long = Recommendation(topic="x", because="1,234 kernels " * 8, action="do this " * 9, gain=2.0)
    wide = replace(part(PRODUCT, name="a/long/path/test_module.py::test_function[bfloat16-16384]"), advice=(long,))
    notes = ("What to know. " * 12,)
    for one in (wide, part(COPY), part(GAPS), part(SLEEP), part(TALK), part(Evidence(time_s=1.0))):
        assert max(map(len, text(one, notes=notes))) <= 81  # a name that cannot be broken


def test_phases_are_blocks_of_their_own_with_their_tokens() -> None:
    lines = text(part(PRODUCT, name="prefill", tokens=2048), part(GAPS, name="decode", tokens=1))
    assert lines[0] == ""
    heads = [line for line in lines if line.startswith(("prefill:", "decode:"))]
    assert [head.split(",")[0] for head in heads] == ["prefill: compute-bound", "decode: overhead-bound"]
    rates = [line for line in lines if line.startswith("  throughput")]
    assert rates[1].split()[1:] == ["23.74", "tok/s"]


def test_the_data_sheet_and_another_process_are_said() -> None:
    sheet = from_data_sheet("bfloat16", flops_per_s=989e12, bandwidth_bytes_per_s=4.8e12)
    crowded = replace(part(PRODUCT, ceilings=sheet), telemetry=replace(TELEMETRY, other_process_pids=(4711,)))
    whole = "\n".join(text(crowded, ceilings=sheet))
    assert "Ceilings (data sheet x 0.8 and x 0.9)" in whole
    assert "others          pid 4711 used the GPU: all numbers are of both" in whole


def test_json_has_everything_with_what_is_derived() -> None:
    (one,) = json.loads(to_json(report(part(PRODUCT, tokens=2))))["parts"]
    assert one["limit"] == "compute-bound"
    assert one["shares"]["compute"] == pytest.approx(1.0, rel=0.01)
    assert one["p99_s"] == pytest.approx(3.308e-3)
    assert one["iterations"] == 100
    assert one["mfu"] == pytest.approx(1.0, rel=0.01)
    assert one["next"]["limit"] == "overhead-bound"
    assert one["recommendations"][0]["topic"] == "fp8"
    assert one["evidence"]["kernels"]["kernels"][0]["name"] == "nvjet_sm90_tst_256x128"


@needs_matplotlib
def test_the_picture_has_roofs_ridge_and_a_point_for_each_part(tmp_path: Path) -> None:
    path = tmp_path / "roofline.svg"
    save_plot(report(part(PRODUCT, name="prefill"), part(COPY, name="decode")), path)
    drawn = path.read_text()
    for words in ("ridge 156", "data sheet: 989 TFLOP/s", "prefill: compute-bound", "decode: memory-bound"):
        assert f"<!-- {words}" in drawn


@needs_matplotlib
def test_a_picture_without_a_roof_or_a_place_is_refused(tmp_path: Path) -> None:
    blank = Ceilings(dtype="bfloat16")
    with pytest.raises(UsageError, match="There is no roof to draw"):
        save_plot(report(part(PRODUCT, ceilings=blank), ceilings=blank), tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"The plot cannot be written to .*gone/x\.png"):
        save_plot(report(part(PRODUCT)), tmp_path / "gone" / "x.png")


@needs_matplotlib
@pytest.mark.parametrize(
    ("picture", "message"), [("gone/x.png", "there is no folder gone."), ("x.foo", "It ends in one of: "), ("x", "It ")]
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_runs(picture: str, message: str) -> None:
    done = gpuperf("diagnose", "matmul", "--device", "cpu", "--plot", picture)
    assert (done.code, done.output) == (1, "")
    assert done.errors.startswith(f"gpuperf: The plot cannot be written to {picture}")
    assert message in done.errors


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    done = gpuperf("diagnose", "matmul", "--device", "cpu", "--plot", "x.png")
    assert (done.code, done.output) == (1, "")
    assert done.errors.strip() == (
        "gpuperf: --plot needs matplotlib: pip install 'pytest-gpuperf[report]'. Or leave --plot out."
    )


@needs_torch
@needs_matplotlib
def test_the_command_prints_json_alone_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))
    plot = tmp_path / "roofline.png"
    arguments = ("--device", "cpu", "--iterations", "2", "--limit", "0.2", "--json", "--plot", str(plot))
    done = gpuperf("diagnose", "matmul", *arguments)
    assert done.code == 0
    assert json.loads(done.output)["parts"][0]["name"] == "matmul"
    assert done.errors.strip() == f"Plot: {plot}"
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["matmull"], "There is no workload 'matmull'."),
        (["--model", "lama"], "The model 'lama' is no preset and no folder."),
        (["--model", "tiny", "--batch-size", "0"], "--batch-size 0: at least 1 is needed."),
        (["all-reduce"], "all-reduce needs 2 GPUs, and 0 are here."),
        (["copy", "--ceilings", "guess"], "--ceilings guess does not exist. Valid: measured, data-sheet."),
        (["copy", "--ceilings", "data-sheet"], "No data sheet of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))  # somebody may measure on this machine
    done = gpuperf("diagnose", *arguments, "--device", "cpu")
    assert (done.code, done.output) == (1, "")
    assert done.errors.startswith(f"gpuperf: {message}")
    assert len(done.errors.splitlines()) == 1
