"""Summaries of traces: four that torch's profiler wrote on an H200, some by hand, and what holds of any."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf import kernels
from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.kernels import Detail, Event, keep_trace, read_trace, summary_of, summary_of_cpu

DATA = Path(__file__).parent / "data"
SPANS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 50)), min_size=1, max_size=40)


def kernel(ts: float, dur: float, name: str = "k", **detail: Any) -> Event:
    return Event(name=name, cat="kernel", ts=ts, dur=dur, args=Detail(**{"device": 0, "stream": 7, **detail}))


def runtime(ts: float, dur: float, name: str, cat: str = "cuda_runtime") -> Event:
    return Event(name=name, cat=cat, ts=ts, dur=dur)


def test_two_layers_of_an_mlp_are_a_product_an_activation_and_a_fill() -> None:
    summary = summary_of(read_trace(DATA / "trace_mlp.json.gz"), calls=30, wall_s=0.009)
    assert [(use.name[:24], use.kind, use.count, use.blocks) for use in summary.kernels] == [
        ("nvjet_sm90_tst_256x128_6", "kernel", 1, 132),
        ("void at::native::vectori", "kernel", 1, 16384),
        ("Memset (Device)", "fill", 1, None),
    ]
    assert [use.time_s for use in summary.kernels] == pytest.approx([204.05e-6, 15.861e-6, 0.8597e-6], rel=1e-4)
    assert (summary.launches, summary.graph_launches, summary.streams) == (3, 0, 1)
    assert (summary.span_s, summary.busy_s) == pytest.approx((226.80e-6, 220.77e-6), rel=1e-4)
    assert summary.wall_s == pytest.approx(300e-6)


def test_a_cuda_graph_is_one_launch_of_all_of_its_kernels() -> None:
    summary = summary_of(read_trace(DATA / "trace_graph.json.gz"), calls=5, wall_s=0.0)
    assert (summary.launches, summary.graph_launches) == (1, 1)
    assert sum(use.count for use in summary.kernels) == 60


def test_a_host_that_sleeps_between_launches_shows_as_gaps() -> None:
    """5.3 us of work in 46 us."""
    summary = summary_of(read_trace(DATA / "trace_host_sleep.json.gz"), calls=60, wall_s=0.0)
    assert summary.gap_s / summary.span_s == pytest.approx(0.885, abs=0.001)
    assert summary.longest_gap_s == pytest.approx(116.9e-6, rel=1e-3)


def test_a_copy_says_what_it_moved() -> None:
    [use] = summary_of(read_trace(DATA / "trace_copy.json.gz"), calls=20, wall_s=0.0).kernels
    assert (use.name, use.kind, use.blocks, use.bytes_moved) == ("Memcpy DtoD (Device -> Device)", "copy", None, 2**30)


def test_everything_is_of_one_call() -> None:
    """Two calls of 10 + 20 us, side by side in part: 0 to 25 and 40 to 65, on two streams."""
    once = [kernel(0, 10, "a", grid=[2, 3, 1]), kernel(5, 20, "b", stream=8)]
    again = [kernel(40, 10, "a", grid=[4, 3, 1]), kernel(45, 20, "b", stream=8)]
    host = [runtime(1, 2, "cudaLaunchKernel"), runtime(60, 4, "cudaStreamSynchronize")]
    summary = summary_of([*again, *host, *once], calls=2, wall_s=1e-4)
    assert (summary.span_s, summary.busy_s) == pytest.approx((32.5e-6, 25e-6))
    assert summary.longest_gap_s == pytest.approx(15e-6)
    assert (summary.launches, summary.launch_s, summary.sync_s) == pytest.approx((0.5, 1e-6, 2e-6))
    assert summary.streams == 2
    assert [(use.name, use.count, use.blocks) for use in summary.kernels] == [("b", 1, None), ("a", 1, 9)]
    assert [use.time_s for use in summary.kernels] == pytest.approx([20e-6, 10e-6])


@pytest.mark.parametrize(
    "name",
    [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cudaLaunchCooperativeKernel",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "cudaMemsetAsync",
        "cudaLaunchKernel_v7000",
    ],
)
def test_what_gives_the_gpu_something_to_do_is_a_launch(name: str) -> None:
    assert summary_of([kernel(0, 1), runtime(0, 1, name)], calls=1, wall_s=0.0).launches == 1


@pytest.mark.parametrize("name", ["cudaEventRecord", "cudaMalloc", "cudaStreamIsCapturing", "cudaFuncGetAttributes"])
def test_other_calls_of_the_host_are_none(name: str) -> None:
    summary = summary_of([kernel(0, 1), runtime(0, 1, name)], calls=1, wall_s=0.0)
    assert (summary.launches, summary.sync_s) == (0, 0)


@pytest.mark.parametrize("name", ["cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"])
def test_waiting_is_no_launch(name: str) -> None:
    summary = summary_of([kernel(0, 1), runtime(0, 3, name)], calls=1, wall_s=0.0)
    assert [summary.launches, summary.sync_s] == pytest.approx([0, 3e-6])


@given(SPANS)
def test_busy_and_gaps_are_the_span(spans: list[tuple[int, int]]) -> None:
    """Unit cells of a ruler as the oracle."""
    summary = summary_of([kernel(ts, dur) for ts, dur in spans], calls=1, wall_s=0.0)
    covered = {cell for ts, dur in spans for cell in range(ts, ts + dur)}
    assert summary.busy_s == pytest.approx(len(covered) * 1e-6)
    assert summary.busy_s + summary.gap_s == pytest.approx(summary.span_s)
    assert summary.longest_gap_s <= summary.gap_s + 1e-12


@given(SPANS, st.integers(0, 5))
def test_the_order_of_the_file_does_not_matter(spans: list[tuple[int, int]], seed: int) -> None:
    events = [kernel(ts, dur, f"k{dur % 3}") for ts, dur in spans]
    mixed = list(events)
    random.Random(seed).shuffle(mixed)
    assert summary_of(mixed, calls=1, wall_s=0.0).busy_s == summary_of(events, calls=1, wall_s=0.0).busy_s


@given(st.lists(st.integers(0, 99), min_size=1, max_size=150))
def test_nothing_is_lost_among_the_rest(names: list[int]) -> None:
    summary = summary_of([kernel(i, 1, f"k{name}") for i, name in enumerate(names)], calls=1, wall_s=0.0)
    uses = [*summary.kernels, *([summary.rest] if summary.rest else [])]
    assert len(summary.kernels) == min(len(set(names)), 40)
    assert sum(use.count for use in uses) == len(names)
    assert sum(use.time_s for use in uses) == pytest.approx(len(names) * 1e-6)
    assert (summary.rest is None) == (len(set(names)) <= 40)


def test_the_longest_come_first_and_names_are_cut() -> None:
    summary = summary_of([kernel(0, 1, "x" * 500), kernel(1, 5, "y")], calls=1, wall_s=0.0)
    assert [len(use.name) for use in summary.kernels] == [1, 240]


def test_an_operator_of_the_cpu_has_the_time_that_is_its_own() -> None:
    """10 us in all, 6 of them in a child, 2 of those in its own; the second thread by itself."""

    def op(name: str, ts: float, dur: float, tid: int = 1) -> Event:
        return Event(name=name, cat="cpu_op", ts=ts, dur=dur, tid=tid)

    events = [op("inner", 2, 2), op("outer", 0, 10), op("child", 1, 6), op("other", 0, 3, tid=2), op("next", 10, 1)]
    summary = summary_of_cpu(events, calls=1, wall_s=1e-3)
    assert {use.name: round(use.time_s * 1e6, 6) for use in summary.kernels} == {
        "outer": 4,
        "child": 4,
        "inner": 2,
        "other": 3,
        "next": 1,
    }
    assert summary.busy_s == summary.span_s == pytest.approx(14e-6)
    assert (summary.gap_s, summary.launches, summary.streams) == (0, 0, 2)


def test_no_kernel_is_no_idle_gpu_but_a_profiler_that_did_not_work() -> None:
    with pytest.raises(
        MeasurementError, match=r"saw no kernel in 7 calls\. Likely another profiler held CUPTI: end nsys"
    ):
        summary_of([runtime(0, 1, "cudaLaunchKernel")], calls=7, wall_s=0.0)


def test_no_operator_of_torch_says_so() -> None:
    with pytest.raises(MeasurementError, match=r"saw no operator of torch in 3 calls"):
        summary_of_cpu([kernel(0, 1)], calls=3, wall_s=0.0)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1", b'{"traceEvents": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "rank0.json"
    path.write_bytes(text)
    with pytest.raises(MeasurementError, match=r"rank0\.json is not a trace of torch's profiler: "):
        read_trace(path)


@pytest.mark.parametrize("kept", [10, -3])
def test_a_compressed_trace_that_was_cut_off_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.json.gz"
    path.write_bytes((DATA / "trace_copy.json.gz").read_bytes()[:kept])
    with pytest.raises(MeasurementError, match=r"cut\.json\.gz is not a trace"):
        read_trace(path)


def test_a_trace_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed ones by what they would be: nothing is unpacked without a bound."""
    monkeypatch.setattr(kernels, "LARGEST_TRACE_BYTES", 2**20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 2**21))
    with pytest.raises(MeasurementError, match=r"bomb\.json\.gz has more than 1 MiB, .* Profile fewer calls"):
        read_trace(path)


def test_fields_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    """Annotations and collectives put anything there."""
    path = tmp_path / "odd.json"
    odd = {"cat": "cpu_op", "name": "n", "tid": "main", "args": {"grid": "none", "bytes": {}, "stream": [1]}}
    good = {"cat": "kernel", "name": "k", "ts": 1, "dur": 2, "args": {"grid": [1, 1], "stream": 7}}
    path.write_text(json.dumps({"traceEvents": [odd, good, {"ph": "M"}]}))
    [use] = summary_of(read_trace(path), calls=1, wall_s=0.0).kernels
    assert use.blocks is None


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_kept_trace_is_compressed_once(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    data = b'{"traceEvents": []}'
    source.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    keep_trace(source, tmp_path / "kept.json.gz")
    assert gzip.decompress((tmp_path / "kept.json.gz").read_bytes()) == data
