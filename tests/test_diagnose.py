"""`gpuperf diagnose`: what it runs and how it puts the numbers together, on fakes and the CPU; what mistakes say."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from pytest_gpuperf.analysis.roofline import Ceilings
from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import DeviceError, MeasurementError, NotSupported, UsageError
from pytest_gpuperf.lease import Lease, lock_folder, lock_path
from pytest_gpuperf.locks import is_held
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.profiling import Found
from pytest_gpuperf.records import KernelSummary, KernelUse, Measurement, Method
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_state
from pytest_gpuperf.timing import Call
from pytest_gpuperf.trials import diagnose, diagnose_known
from pytest_gpuperf.trials.diagnose import (
    Bench,
    Report,
    Wanted,
    bench_on,
    ceilings_of,
    check_wanted,
    dtype_of,
    from_measurement,
    run_diagnosis,
    step_of,
)
from pytest_gpuperf.trials.diagnose_known import KNOWN
from pytest_gpuperf.trials.diagnose_model import Running, _part, estimated_tokens, working_s
from pytest_gpuperf.trials.diagnose_pytest import diagnose_test, is_test
from pytest_gpuperf.workloads.models import presets
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load, RequestTiming
from pytest_gpuperf.workloads.vllm import EngineConfig

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "accelerate")),
    reason="transformers or accelerate are not installed",
)
BUSY = GpuActivity(duration_s=1.0, sm_share=0.9, occupancy=0.2, tensor_share=0.8, dram_share=0.2)


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))


@dataclass
class FakeCase:
    """A call of a known time and known work."""

    time_s: float
    flop: float | None = None
    bytes_moved: float | None = None
    dtype: str | None = "bfloat16"

    def __call__(self) -> object:
        return self.time_s


def kernels(busy_s: float, *, launches: float = 1.0, calls: int = 1, name: str = "gemm") -> KernelSummary:
    return KernelSummary(
        calls=calls,
        wall_s=busy_s,
        span_s=busy_s,
        busy_s=busy_s,
        longest_gap_s=0.0,
        kernels=(KernelUse(name=name, count=launches, time_s=busy_s),),
        launches=launches,
    )


@dataclass
class FakeProfiler:
    """Sees what it is told to, or fails."""

    sees: KernelSummary | None = None
    error: MeasurementError | None = None

    def calls(self, call: Call, *, device_s: float, calls_each: int = 1, name: str = "calls") -> KernelSummary | None:
        if self.error:
            raise self.error
        return self.sees

    def region(self, name: str = "region", *, calls: int = 1) -> AbstractContextManager[Found]:
        raise NotImplementedError


@dataclass
class FakeModel:
    """One step reads all prompts in `prefill_s`, each further one takes `step_s`; the GPU is busy for part of it."""

    prefill_s: float = 0.02
    step_s: float = 0.005
    busy: float = 0.9
    loads: list[Load] = field(default_factory=list)
    profiled: list[Load] = field(default_factory=list)

    def generate(self, load: Load) -> Generation:
        self.loads.append(load)
        gaps_s = (self.step_s,) * (load.output_tokens - 1)
        request = RequestTiming(
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            ttft_s=self.prefill_s,
            latency_s=self.prefill_s + sum(gaps_s),
            gaps_s=gaps_s,
        )
        early = replace(request, ttft_s=self.prefill_s / 2)
        return Generation(
            duration_s=request.latency_s,
            requests=(request, *[early] * (load.requests - 1)),
            step_count=load.output_tokens,
        )

    def profile(self, load: Load) -> GpuTime | None:
        self.profiled.append(load)
        busy_s = self.busy * (self.prefill_s + (load.output_tokens - 1) * self.step_s)
        steps = load.output_tokens
        return GpuTime(busy_s=busy_s, steps=steps, kernels=steps, summary=kernels(busy_s / steps, name="gemv"))


def machine_with(*gpus_and_activities: GpuActivity, profiler: FakeProfiler | None = None, count: int = 1) -> Machine:
    nvml = FakeNvml(
        *(fake_gpu(index) for index in range(count)),
        activities=gpus_and_activities,
        states=[fake_state(sm_clock_mhz=1500.0, memory_used_bytes=20_000_000_000)],
    )
    return Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch(), profiler=profiler)


def bench(machine: Machine, model: Running | None = None, known: FakeCase | None = None) -> Bench:
    """A bench whose product reaches 700 TFLOP/s and whose copy 3 TB/s."""

    @contextlib.contextmanager
    def engine(wanted: Wanted, lent: Lease, machine: Machine) -> Iterator[Running]:
        assert model is not None
        yield model

    return Bench(
        machine=machine,
        engine=engine,
        product=lambda _, dtype: FakeCase(1e-3, flop=0.7e12, dtype=dtype),
        copy=lambda _: FakeCase(1e-3, bytes_moved=3e9),
        known=dict.fromkeys(KNOWN, always(known)) if known else {},
    )


def always(case: FakeCase) -> Callable[[Sequence[Device]], FakeCase]:
    return lambda _: case


def diagnosed(
    case: FakeCase, *activities: GpuActivity, sees: KernelSummary | None = None, name: str = "matmul"
) -> Report:
    machine = machine_with(*activities, profiler=FakeProfiler(sees=sees))
    return run_diagnosis(Wanted(workload=name, iterations=20), bench(machine, known=case))


def test_ceilings_are_those_of_the_same_sitting() -> None:
    ceilings = diagnosed(FakeCase(1e-3, flop=0.69e12), sees=kernels(1e-3)).ceilings
    assert ceilings.origin == "measured"
    assert ceilings.flops_per_s == pytest.approx(700e12)
    assert ceilings.bandwidth_bytes_per_s == pytest.approx(3e12)
    assert ceilings.peak_flops_per_s == 989e12


def test_a_product_is_compute_bound_and_a_copy_memory_bound() -> None:
    (product,) = diagnosed(FakeCase(1e-3, flop=0.69e12, bytes_moved=1e8), sees=kernels(1e-3)).parts
    (copy,) = diagnosed(FakeCase(1e-3, flop=1.0, bytes_moved=2.9e9), sees=kernels(1e-3), name="copy").parts
    assert (product.diagnosis.limit, copy.diagnosis.limit) == ("compute-bound", "memory-bound")
    assert product.diagnosis.mfu == pytest.approx(0.69 / 0.7)
    assert copy.diagnosis.mbu == pytest.approx(2.9 / 3)


def test_gaps_are_overhead_and_long_ones_idleness() -> None:
    (tiny,) = diagnosed(FakeCase(6e-3), sees=kernels(0.3e-3, launches=1000), name="tiny-kernels").parts
    (sleep,) = diagnosed(FakeCase(10e-3), sees=kernels(1e-6), name="sleep").parts
    assert (tiny.diagnosis.limit, sleep.diagnosis.limit) == ("overhead-bound", "idle")


def test_all_reduce_is_communication_bound_and_holds_two_gpus() -> None:
    seen: list[int] = []
    machine = machine_with(profiler=FakeProfiler(sees=kernels(1e-3, name="ncclDevKernel_AllReduce")), count=2)
    whole = bench(machine)

    def make(devices: Sequence[Device]) -> FakeCase:
        seen.append(len(devices))
        return FakeCase(1e-3)

    report = run_diagnosis(Wanted(workload="all-reduce", iterations=5), replaced(whole, {"all-reduce": make}))
    assert report.parts[0].diagnosis.limit == "communication-bound"
    assert report.title == "all-reduce on 2 GPUs"
    assert seen == [2]


def test_two_gpus_are_those_that_are_connected_best() -> None:
    seen: list[list[int]] = []
    a, _, c = gpus = [fake_gpu(index) for index in range(3)]
    machine = Machine(
        "auto", nvml=FakeNvml(*gpus, nvlinks=[(a.uuid, c.uuid)]), make_stopwatch=lambda _: FakeStopwatch()
    )

    def make(devices: Sequence[Device]) -> FakeCase:
        seen.append([device.index for device in devices])
        return FakeCase(1e-3)

    run_diagnosis(Wanted(workload="all-reduce", iterations=5), replaced(bench(machine), {"all-reduce": make}))
    assert seen == [[0, 2]]


@pytest.fixture
def two_instances(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two MIG instances, of which CUDA shows a process the first."""
    whole = fake_gpu(0, mig_enabled=True)
    parts = [fake_gpu(i, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid=f"MIG-{i}") for i in range(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0,MIG-1")
    nvml = FakeNvml(whole, instances={whole.uuid: parts})
    return Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())


def test_of_several_mig_instances_the_one_is_held_that_cuda_shows(two_instances: Machine) -> None:
    first, second = two_instances.devices
    held: list[bool] = []

    def make(_: Sequence[Device]) -> FakeCase:
        held.extend(is_held(lock_path(lock_folder(), one.uuid)) for one in (first, second))
        return FakeCase(1e-3)

    run_diagnosis(Wanted(workload="matmul", iterations=5), replaced(bench(two_instances), {"matmul": make}))
    assert held[:2] == [True, False]
    with pytest.raises(DeviceError, match=r"all-reduce needs 2 GPUs, and CUDA shows a process one MIG instance\."):
        run_diagnosis(Wanted(workload="all-reduce"), bench(two_instances))


def replaced(whole: Bench, known: dict[str, Callable[[Sequence[Device]], FakeCase]]) -> Bench:
    return Bench(machine=whole.machine, engine=whole.engine, product=whole.product, copy=whole.copy, known=known)


def test_counters_of_the_workload_are_held_against_those_of_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    product, copy = replace(BUSY, tensor_share=0.9), replace(BUSY, dram_share=0.8)
    half = replace(BUSY, tensor_share=0.1, dram_share=0.6)
    machine = machine_with(profiler=FakeProfiler(sees=kernels(1e-3)))
    answers = iter([product, copy, half])
    assert machine.nvml is not None
    monkeypatch.setattr(machine.nvml, "activity_meter", lambda _: lambda: next(answers))
    case = FakeCase(1e-3, flop=1.0, bytes_moved=1.0)
    report = run_diagnosis(Wanted(workload="matmul"), bench(machine, known=case))
    assert (report.ceilings.tensor_share, report.ceilings.dram_share) == (0.9, 0.8)
    assert report.parts[0].diagnosis.shares.memory == pytest.approx(0.75)
    assert report.parts[0].diagnosis.limit == "memory-bound"


def test_a_profiler_that_fails_is_a_note() -> None:
    machine = machine_with(profiler=FakeProfiler(error=MeasurementError("CUPTI is taken.")))
    whole = bench(machine, known=FakeCase(1e-3, flop=0.69e12, bytes_moved=1.0))
    (part,) = run_diagnosis(Wanted(workload="matmul"), whole).parts
    assert part.notes == ("No kernels are known: CUPTI is taken.",)
    assert part.diagnosis.shares.busy is None
    assert part.diagnosis.limit == "compute-bound"


def test_iterations_are_a_floor_and_the_limit_a_ceiling() -> None:
    machine = machine_with()
    whole = bench(machine, known=FakeCase(0.01))
    assert len(run_diagnosis(Wanted(workload="matmul", iterations=300), whole).parts[0].times_s) == 300
    assert len(run_diagnosis(Wanted(workload="matmul", iterations=3), whole).parts[0].times_s) == 100
    limited = run_diagnosis(Wanted(workload="matmul", iterations=10**6, limit_s=2.0), whole)
    assert len(limited.parts[0].times_s) == pytest.approx(200, abs=1)


def test_the_data_sheet_stands_in_for_ceilings_that_cannot_be_measured() -> None:
    machine = machine_with()

    def refuse(device: Device, dtype: str) -> FakeCase:
        raise NotSupported("8192 does not fit")

    whole = Bench(machine=machine, engine=bench(machine).engine, product=refuse, known={})
    found = ceilings_of("measured", whole, machine.devices[0], "bfloat16")
    assert found.origin == "data sheet"
    assert found.flops_per_s == pytest.approx(0.8 * 989e12)
    assert found.problem == "The ceilings could not be measured: 8192 does not fit"


def test_the_data_sheet_is_taken_where_it_is_asked_for_and_refused_where_there_is_none() -> None:
    machine = machine_with()
    found = ceilings_of("data-sheet", bench(machine), machine.devices[0], "bfloat16")
    assert (found.origin, found.problem) == ("data sheet", None)
    with pytest.raises(UsageError, match=r"No data sheet of .* is known\. Measure: --ceilings measured"):
        ceilings_of("data-sheet", bench(machine), cpu_device(), "float32")


# A model


def test_prefill_and_decode_are_parts_of_their_own() -> None:
    model = FakeModel()
    report = run_diagnosis(
        Wanted(model="llama-3-8b", batch_size=4, output_tokens=11, iterations=30, limit_s=0.2),
        bench(machine_with(), model),
    )
    prefill, decode = report.parts
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert report.title == "llama-3-8b in bfloat16 through transformers, batch 4, 128 + 11 tokens"
    assert set(prefill.times_s) == {0.02}
    assert set(decode.times_s) == {0.005}
    assert prefill.tokens_per_s == pytest.approx(4 * 128 / 0.02)
    assert decode.tokens_per_s == pytest.approx(4 / 0.005)
    assert decode.telemetry.memory_used_bytes == 20_000_000_000


def test_busy_time_of_a_step_is_what_more_steps_have_more() -> None:
    model = FakeModel(busy=0.8)
    wanted = Wanted(model="llama-3-8b", output_tokens=64, iterations=63, limit_s=0.2)
    prefill, decode = run_diagnosis(wanted, bench(machine_with(), model)).parts
    assert prefill.diagnosis.shares.busy == pytest.approx(0.8)
    assert decode.diagnosis.shares.busy == pytest.approx(0.8)
    assert decode.diagnosis.evidence.kernels is not None
    assert decode.diagnosis.evidence.kernels.kernels[0].time_s == pytest.approx(0.8 * 0.005)
    assert [load.output_tokens for load in model.profiled] == [1, 17]


def test_decode_alone_is_one_part_and_prefill_alone_is_not_decoded() -> None:
    machine, model = machine_with(), FakeModel()
    wanted = Wanted(model="llama-3-8b", output_tokens=8, iterations=7, limit_s=0.1)
    (only,) = run_diagnosis(replace(wanted, phase="decode"), bench(machine, model)).parts
    assert only.name == "decode"
    model = FakeModel()
    (only,) = run_diagnosis(replace(wanted, phase="prefill"), bench(machine, model)).parts
    assert only.name == "prefill"
    assert {load.output_tokens for load in model.loads} == {1}


def test_counters_of_decode_are_without_those_of_the_prompts_before() -> None:
    whole, reading = replace(BUSY, dram_share=0.5, tensor_share=None), replace(BUSY, dram_share=0.9)
    own = _part(whole, reading, whole_s=10.0, other_s=2.0, own_s=6.0)  # for 2 s nothing ran
    assert own is not None
    assert own.dram_share == pytest.approx((10 * 0.5 - 2 * 0.9) / 6)
    assert (own.tensor_share, own.duration_s) == (None, 6.0)
    assert _part(whole, None, whole_s=10.0, other_s=2.0, own_s=6.0) is None  # what reading took is not known
    assert _part(None, reading, whole_s=10.0, other_s=2.0, own_s=6.0) is None


def test_a_model_without_a_profiler_says_what_is_missing() -> None:
    class Blind(FakeModel):
        def profile(self, load: Load) -> GpuTime | None:
            return None

    wanted = Wanted(model="llama-3-8b", output_tokens=4, iterations=3, limit_s=0.1)
    prefill, _ = run_diagnosis(wanted, bench(machine_with(), Blind())).parts
    assert "how long the GPU was busy" in prefill.diagnosis.missing


def test_a_prompt_is_counted_in_words_and_said_so() -> None:
    wanted = Wanted(model="llama-3-8b", prompt="What is a roofline?", output_tokens=4, iterations=3, limit_s=0.1)
    model = FakeModel()
    report = run_diagnosis(wanted, bench(machine_with(), model))
    assert model.loads[0].prompt_tokens == 6
    assert report.notes == ("The prompt of 4 words is taken as 6 tokens of random ids: there is no tokenizer.",)
    assert estimated_tokens("") == 1


def test_long_prompts_of_vllm_are_read_in_several_passes() -> None:
    shape, device = presets()["llama-3-8b"], machine_with().devices[0]
    wanted = Wanted(model="llama-3-8b", engine="vllm", batch_size=128, prompt_tokens=128)
    assert step_of("prefill", shape, wanted, device).passes == 2
    assert step_of("decode", shape, wanted, device).passes == 1
    assert step_of("decode", shape, wanted, device).tokens == 128 + 32
    assert step_of("prefill", shape, replace(wanted, engine="transformers"), device).passes == 1


def test_what_cannot_be_is_doubted() -> None:
    (product,) = diagnosed(FakeCase(1e-3, flop=0.9e12, bytes_moved=1.0), sees=kernels(1e-3)).parts
    assert product.notes[0].startswith("129 % of the product's rate cannot be: something else ran while")
    (copy,) = diagnosed(FakeCase(1e-3, flop=1.0, bytes_moved=9e9), sees=kernels(1e-3), name="copy").parts
    assert copy.notes == ("300 % of the copy's bandwidth: caches served it.",)


def test_waiting_for_a_core_is_work_that_could_not_be_done(tmp_path: Path) -> None:
    told = tmp_path / "schedstat"
    told.write_text("100 50000000000 7\n")
    assert working_s(told) == pytest.approx(50 + working_s(tmp_path / "none"), abs=0.1)


def test_vllm_gets_room_for_the_load_and_for_sixteen_requests_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EngineConfig] = []
    inherited: list[Sequence[int]] = []

    def engine(config: EngineConfig, *, descriptors: Sequence[int], **_: object) -> AbstractContextManager[Running]:
        configs.append(config)
        inherited.append(descriptors)
        return contextlib.nullcontext(FakeModel())

    monkeypatch.setattr(diagnose, "Engine", engine)
    machine = machine_with()
    wanted = Wanted(model="llama-3-8b", engine="vllm", batch_size=8, prompt_tokens=100, output_tokens=20)
    diagnose.start_engine(wanted, Lease(devices=machine.devices, descriptors=(7, 8)), machine)
    (config,) = configs
    assert inherited == [(7, 8)]
    assert (config.model, config.dtype) == ("llama-3-8b", "bfloat16")
    assert (config.max_model_len, config.max_num_seqs, config.enforce_eager) == (120, 16, False)


# Mistakes


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(workload="matmull"), "There is no workload 'matmull'. Known: matmul, copy, tiny-kernels, sleep, all-"),
        (Wanted(workload="copy", model="tiny"), "copy and --model tiny are two workloads. Drop one of them."),
        (Wanted(model="lama"), "The model 'lama' is no preset and no folder."),
        (Wanted(model="tiny", engine="tgi"), "--engine tgi does not exist. Valid: transformers, vllm."),
        (Wanted(model="tiny", phase="all"), "--phase all does not exist. Valid: prefill, decode, both."),
        (Wanted(workload="copy", ceilings="guess"), "--ceilings guess does not exist. Valid: measured, data-sheet."),
        (Wanted(model="tiny", batch_size=0), "--batch-size 0: at least 1 is needed."),
        (Wanted(model="tiny", iterations=0), "--iterations 0: at least 1 is needed."),
        (Wanted(model="tiny", limit_s=0.0), "--limit 0 is not a number of seconds above zero."),
        (Wanted(model="tiny", prompt_tokens=2000, output_tokens=64), "2000 prompt and 64 output tokens are 2,064, and"),
        (Wanted(model="tiny", output_tokens=1), "--output-tokens 1 leaves no step of decode: ask for 2 or more, or"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(wanted: Wanted, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_wanted(wanted, machine_with().devices)
    assert str(caught.value).startswith(message)


def test_all_reduce_needs_two_gpus() -> None:
    with pytest.raises(DeviceError, match=r"all-reduce needs 2 GPUs, and 1 is here\. `gpuperf specs` lists them\."):
        check_wanted(Wanted(workload="all-reduce"), machine_with().devices)
    with pytest.raises(DeviceError, match=r"and 0 are here"):
        check_wanted(Wanted(workload="all-reduce"), (cpu_device(),))


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(NotSupported, match=r"pip install 'pytest-gpuperf\[llm\]'"):
        check_wanted(Wanted(model="tiny"), (cpu_device(),))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named() -> None:
    with pytest.raises(NotSupported, match="vLLM"):
        check_wanted(Wanted(model="tiny", engine="vllm"), (cpu_device(),))


# On the CPU


@needs_torch
def test_a_cpu_that_sleeps_is_idle() -> None:
    whole = bench_on(Machine("cpu"))
    report = run_diagnosis(Wanted(workload="sleep", iterations=5), whole)
    found = report.parts[0].diagnosis
    assert found.limit == "idle"
    assert report.ceilings.origin == "measured"
    assert any(note.startswith("On the CPU: busy is") for note in report.notes)


@needs_torch
def test_every_known_workload_knows_its_work() -> None:
    made = {name: make([cpu_device()]) for name, make in KNOWN.items() if name != "all-reduce"}
    assert all(case() is not None for name, case in made.items())
    assert made["matmul"].flop == 2 * 512**3
    assert made["matmul"].bytes_moved == 3 * 4 * 512**2
    assert made["copy"].bytes_moved == 2 * 2**26
    with pytest.raises(NotSupported, match="all-reduce needs two GPUs"):
        diagnose_known.KNOWN["all-reduce"]([cpu_device()])


@needs_transformers
def test_the_tiny_model_runs_on_the_cpu() -> None:
    wanted = Wanted(output_tokens=4, prompt_tokens=16, iterations=3, limit_s=0.3)
    report = run_diagnosis(wanted, bench_on(Machine("cpu")))
    assert report.title == "tiny in float32 through transformers, batch 1, 16 + 4 tokens"
    assert [part.name for part in report.parts] == ["prefill", "decode"]
    assert all(part.tokens_per_s and part.diagnosis.limit for part in report.parts)


# Tests


def test_a_test_is_told_from_a_workload() -> None:
    assert [is_test(name) for name in ("tests/test_x.py::test_y", "test_x.py", "matmul")] == [True, True, False]


def test_a_measurement_and_a_profile_of_another_process_make_a_diagnosis() -> None:
    machine = machine_with()
    ceilings = Ceilings(dtype="bfloat16", flops_per_s=700e12, bandwidth_bytes_per_s=3e12)
    measurement = Measurement(
        metric="throughput",
        value=650e12,
        unit="FLOP/s",
        better="higher",
        kind="compute",
        method=Method(clock="cuda-events", mode="sustained"),
        flop=650e9,
        peak=989e12,
    )
    part = from_measurement(measurement, kernels(0.99e-3), machine=machine, devices=machine.devices, ceilings=ceilings)
    assert part.diagnosis.limit == "compute-bound"
    assert part.diagnosis.shares.compute == pytest.approx(650 / 700 / 0.99)
    assert dtype_of(measurement, machine.devices[0]) in ("bfloat16", "float16")  # their peaks are the same


def test_a_metric_without_a_time_is_refused() -> None:
    machine = machine_with()
    measurement = Measurement(
        metric="throughput",
        value=650.0,
        unit="tok/s",
        better="higher",
        kind="end-to-end",
        method=Method(clock="wall", mode="recorded"),
    )
    with pytest.raises(UsageError, match=r"throughput is in tok/s, and no time of a call is known"):
        from_measurement(
            measurement, None, machine=machine, devices=machine.devices, ceilings=Ceilings(dtype="bfloat16")
        )


SUITE = """
import torch

def test_copy(gpu_benchmark):
    source = torch.randn(2**22)
    target = torch.empty_like(source)
    gpu_benchmark(lambda: target.copy_(source), bytes=2 * 4 * 2**22)
"""
#: Without torch, whose import takes a second.
OTHERS = """
import os

def test_rate(perf):
    perf.record("throughput", 3.0, unit="tok/s")

def test_broken(gpu_benchmark):
    raise RuntimeError("broken")

def test_skipped(gpu_benchmark):
    import pytest
    pytest.skip("not here")

def test_regressed(perf):
    perf.record("throughput", float(os.environ.get("RATE", "3")), unit="tok/s")
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_others.py").write_text(OTHERS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.chdir(tmp_path)


def on_cpu(test: str) -> Report:
    return diagnose_test(Wanted(workload=test), bench_on(Machine("cpu")), device="cpu")


@needs_torch
@pytest.mark.usefixtures("suite")
def test_a_test_is_timed_in_one_process_and_profiled_in_another() -> None:
    report = on_cpu("test_suite.py::test_copy")
    (part,) = report.parts
    assert part.name == "bandwidth"
    assert part.diagnosis.evidence.bytes_moved == 2 * 4 * 2**22
    assert part.diagnosis.limit is not None
    assert part.diagnosis.evidence.kernels is not None
    assert any(note.startswith("On the CPU") for note in report.notes)


@needs_torch
@pytest.mark.usefixtures("suite")
def test_a_test_is_profiled_from_a_folder_below_pytests_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "root" / "below"
    folder.mkdir(parents=True)
    (folder.parent / "pytest.ini").write_text("[pytest]\n")
    Path("test_suite.py").rename(folder / "test_suite.py")
    monkeypatch.chdir(folder)
    report = on_cpu("test_suite.py::test_copy")
    assert report.parts[0].diagnosis.evidence.kernels is not None
    assert not any(note.startswith("No kernels") for note in report.notes)


@needs_torch
@pytest.mark.usefixtures("suite")
def test_a_test_that_measures_no_time_or_fails_or_is_not_there_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"measures throughput in tok/s, and no time of a call"):
        on_cpu("test_others.py::test_rate")
    with pytest.raises(MeasurementError, match=r"ended with exit code 1, so there is nothing to diagnose"):
        on_cpu("test_others.py::test_broken")
    assert "RuntimeError: broken" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"test_skipped measured nothing: it was skipped"):
        on_cpu("test_others.py::test_skipped")
    with pytest.raises(UsageError, match=r"pytest found no test test_others.py::test_gone"):
        on_cpu("test_others.py::test_gone")


@pytest.mark.usefixtures("suite")
def test_a_diagnosis_that_is_ended_from_outside_leaves_no_test_behind(tmp_path: Path) -> None:
    hangs = "import os, pathlib, time\ndef test_hangs(perf):\n    pathlib.Path('pid').write_text(str(os.getpid()))\n"
    Path("test_hangs.py").write_text(hangs + "    time.sleep(60)\n")
    command = [sys.executable, "-c", "from pytest_gpuperf.cli import main; main()", "diagnose", "test_hangs.py"]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.DEVNULL)
    end_s = time.monotonic() + 60
    while not (text := Path("pid").read_text() if Path("pid").exists() else ""):
        assert time.monotonic() < end_s, "the test did not begin"
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(text), 0)


@pytest.mark.usefixtures("suite")
def test_a_test_that_got_slower_is_diagnosed_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    test = "test_others.py::test_regressed"
    recorded = run_group(
        [sys.executable, "-m", "pytest", test, "--gpuperf-device=cpu", "--gpuperf-update", "-p", "no:cacheprovider"],
        timeout_s=60,
    )
    assert recorded.code == 0, recorded.tail
    monkeypatch.setenv("RATE", "0.3")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--gpuperf-strict")
    with pytest.raises(UsageError, match=r"measures throughput in tok/s, and no time of a call"):
        on_cpu(test)
