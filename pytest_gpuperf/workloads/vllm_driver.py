"""Runs a load through `vllm.LLM.generate` and notes when each token arrives; in the process that vLLM runs in."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from pytest_gpuperf.kernels import keep_trace
from pytest_gpuperf.workloads.gpu_trace import gpu_time
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load, RequestTiming, Step, prompts_of


class Watch:
    """Listens to an engine while the body of a `with` statement runs, at about a microsecond a step.

    vLLM's own loop stays in charge, so that what is measured is what its users get. What passes is noted as numbers:
    objects that are kept would be walked by the garbage collector.

    Args:
        engine: An `LLMEngine`. Its `add_request`, and its core's `get_output`, are listened to.

    Attributes:
        handed: Request id and time, in the order of the load.
        arrivals: Time, request ids, and how many tokens of each.
        steps: Times are absolute.
        driver_s: What the listening itself took.
    """

    def __init__(self, engine: Any) -> None:
        self.handed: list[tuple[str, float]] = []
        self.arrivals: list[tuple[float, list[str], list[int]]] = []
        self.steps: list[Step] = []
        self.driver_s = 0.0
        self._engine = engine
        loggers = stat_loggers(engine)
        self._loggers: list[object] = [] if loggers is None else loggers

    def __enter__(self) -> Self:
        self._add_request, self._get_output = self._engine.add_request, self._engine.engine_core.get_output
        self._engine.add_request = self._noted_add_request
        self._engine.engine_core.get_output = self._noted_get_output
        self._loggers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._loggers.remove(self)
        del self._engine.add_request, self._engine.engine_core.get_output  # the classes' own appear again

    def _noted_add_request(self, *arguments: Any, **named: Any) -> Any:
        begin_s = time.perf_counter()
        request_id = self._add_request(*arguments, **named)
        end_s = time.perf_counter()
        self.handed.append((request_id, begin_s))
        self.driver_s += time.perf_counter() - end_s
        return request_id

    def _noted_get_output(self) -> Any:
        outputs = self._get_output()
        now_s = time.perf_counter()
        arrived = outputs.outputs
        if arrived:
            counts = [len(one.new_token_ids) for one in arrived]
            self.arrivals.append((now_s, [one.request_id for one in arrived], counts))
        self.driver_s += time.perf_counter() - now_s
        return outputs

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: object, **__: object) -> None:
        """Note a step; called by vLLM as one of its stat loggers."""
        now_s = time.perf_counter()
        if scheduler_stats is not None and iteration_stats is not None:
            self.steps.append(_step(now_s, scheduler_stats, iteration_stats))
        self.driver_s += time.perf_counter() - now_s

    def log(self) -> None:
        """Say nothing; called by vLLM every ten seconds."""

    def log_engine_initialized(self) -> None:
        """Say nothing; one of the calls that vLLM's loggers have in common."""

    def record_sleep_state(self, *_: object) -> None:
        """Note nothing; likewise."""


def stat_loggers(engine: Any) -> list[object] | None:
    """The list that vLLM's stat loggers stand in, or `None` where this version has none: its classes are not stable."""
    loggers = getattr(getattr(engine, "logger_manager", None), "stat_loggers", None)
    return loggers if isinstance(loggers, list) else None


def _step(now_s: float, scheduler: Any, iteration: Any) -> Step:
    prefix = getattr(scheduler, "prefix_cache_stats", None)
    prompt = getattr(iteration, "prompt_token_stats", None)
    return Step(
        time_s=now_s,
        running=scheduler.num_running_reqs,
        waiting=scheduler.num_waiting_reqs + getattr(scheduler, "num_skipped_waiting_reqs", 0),
        kv_share=scheduler.kv_cache_usage,
        preemptions=getattr(iteration, "num_preempted_reqs", 0),
        prompt_tokens=getattr(prompt, "computed", 0) if prompt else getattr(iteration, "num_prompt_tokens", 0),
        output_tokens=iteration.num_generation_tokens,
        prefix_queries=getattr(prefix, "queries", 0),
        prefix_hits=getattr(prefix, "hits", 0),
    )


def generate(llm: Any, load: Load, *, vocab: int) -> Generation:
    """Generate a load with an empty prefix cache and time it.

    Args:
        llm: A `vllm.LLM` without a tokenizer.
        load: All its requests are handed over at once.
        vocab: Token ids are below it.
    """
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts_of(load, vocab)]
    sampling = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False)
    llm.reset_prefix_cache()  # the same load a second time would find its own prompts
    with Watch(llm.llm_engine) as watch:
        begin_s = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        duration_s = time.perf_counter() - begin_s
    return Generation(
        duration_s=duration_s,
        requests=timings(watch.handed, watch.arrivals, prompt_tokens=load.prompt_tokens),
        steps=tuple(_since(begin_s, step) for step in watch.steps),
        step_count=len(watch.arrivals),
        driver_s=watch.driver_s,
    )


def _since(begin_s: float, step: Step) -> Step:
    return msgspec.structs.replace(step, time_s=step.time_s - begin_s)


def timings(
    handed: Sequence[tuple[str, float]],
    arrivals: Sequence[tuple[float, Sequence[str], Sequence[int]]],
    *,
    prompt_tokens: int,
) -> tuple[RequestTiming, ...]:
    """Turn what a `Watch` noted into one timing a request.

    Args:
        handed: Request id and time.
        arrivals: Time, request ids, and how many tokens of each, in the order of time.
        prompt_tokens: Of each request.
    """
    times_s: dict[str, list[float]] = {request_id: [] for request_id, _ in handed}
    tokens = dict.fromkeys(times_s, 0)
    for time_s, request_ids, counts in arrivals:
        for request_id, count in zip(request_ids, counts, strict=True):
            if count:
                times_s[request_id].append(time_s)
                tokens[request_id] += count
    return tuple(
        _timing(begin_s, times_s[request_id], prompt_tokens=prompt_tokens, output_tokens=tokens[request_id])
        for request_id, begin_s in handed
    )


def _timing(begin_s: float, times_s: Sequence[float], *, prompt_tokens: int, output_tokens: int) -> RequestTiming:
    return RequestTiming(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft_s=times_s[0] - begin_s if times_s else 0.0,
        latency_s=times_s[-1] - begin_s if times_s else 0.0,
        gaps_s=tuple(after - before for before, after in itertools.pairwise(times_s)),
    )


def profile(llm: Any, load: Load, *, vocab: int, folder: Path, keep: Path | None = None) -> GpuTime:
    """Generate a load under vLLM's torch profiler and read what ran on the GPUs.

    Args:
        llm: Started with `profiler_config`.
        load: What to generate.
        vocab: Token ids are below it.
        folder: The profiler's; its traces are read and removed.
        keep: File for the first of them, compressed; its folder is there.

    Raises:
        MeasurementError: There is no trace, or nothing in it.
    """
    llm.start_profile()
    try:
        generation = generate(llm, load, vocab=vocab)
    finally:
        llm.stop_profile()
    traces = sorted(folder.glob("*.pt.trace.json*"))
    if keep is not None and traces:
        keep_trace(traces[0], keep)
    try:
        return gpu_time(traces, steps=generation.step_count, duration_s=generation.duration_s)
    finally:
        for trace in traces:
            trace.unlink()
