"""What language-model requests are asked for and how long they took: the definitions of TTFT, ITL, TPOT and the rest.

The same words as vLLM's own benchmark, `vllm.benchmarks.serve.calculate_metrics`; docs/llm.md has the other tools'.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

import msgspec

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.records import KernelSummary, Record


class Load(Record, frozen=True, kw_only=True):
    """What to generate: prompts of token ids from a fixed seed, answered greedily and to the full length.

    Attributes:
        requests: How many; all are there from the beginning.
        prompt_tokens: Of each.
        output_tokens: Of each: the end-of-sequence token does not end it.
        shared_prefix_tokens: So many first tokens are the same in all prompts.
        seed: Of the tokens.

    Raises:
        UsageError: A count that is no whole number or below one, or a prefix longer than the prompt.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"requests": 1, "prompt_tokens": 1, "output_tokens": 1, "shared_prefix_tokens": 0, "seed": 0}
        for name, lowest in least.items():
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"Load({name}={value!r}): a whole number is needed.")
            if value < lowest:
                raise UsageError(f"Load({name}={value}): at least {lowest} is needed.")
        if self.shared_prefix_tokens > self.prompt_tokens:
            raise UsageError(
                f"Load(shared_prefix_tokens={self.shared_prefix_tokens}) is not between 0 and "
                f"the {self.prompt_tokens} tokens of the prompt."
            )


def prompts_of(load: Load, vocab: int) -> list[list[int]]:
    """Draw the load's prompts: the same load gives the same tokens.

    Args:
        load: How many and how long.
        vocab: Token ids are below it.
    """
    import numpy as np

    random = np.random.default_rng(load.seed)
    prefix: list[int] = random.integers(vocab, size=load.shared_prefix_tokens).tolist()
    rest: list[list[int]] = random.integers(
        vocab, size=(load.requests, load.prompt_tokens - load.shared_prefix_tokens)
    ).tolist()
    return [prefix + one for one in rest]


class RequestTiming(Record, frozen=True, kw_only=True):
    """How one request went.

    Attributes:
        prompt_tokens: Read.
        output_tokens: Produced.
        ttft_s: Time to first token: from handing the request over to holding its first token; includes the queue.
        latency_s: End to end: from handing the request over to holding its last token.
        gaps_s: Times between one arrival of tokens and the next. One token an arrival, unless the engine decodes
            several at once.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    latency_s: float
    gaps_s: tuple[float, ...] = ()

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (latency - TTFT) / (tokens - 1); `None` of a single token."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Step(Record, frozen=True, kw_only=True):
    """One step of the engine, as its scheduler saw it.

    Attributes:
        time_s: Since generation began.
        running: Requests in the batch.
        waiting: Requests in the queue.
        kv_share: Blocks of the KV cache in use, 0 to 1.
        preemptions: Requests thrown out in this step, to be computed again.
        prompt_tokens: Read in this step.
        output_tokens: Produced in this step.
        prefix_queries: Tokens looked up in the prefix cache in this step.
        prefix_hits: Those of them that were found.
    """

    time_s: float
    running: int
    waiting: int
    kv_share: float
    preemptions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Generation(Record, frozen=True, kw_only=True):
    """All requests of a load, from handing over the first to holding the last token.

    Percentiles are numpy's linear ones, over requests; ITL's over the gaps of all requests together.

    Attributes:
        duration_s: The whole.
        requests: In the order of the load.
        steps: One a step of the engine; empty where this version of vLLM does not tell.
        step_count: Steps of the engine that brought tokens.
        driver_s: Host time that our own loop added within `duration_s`.
    """

    duration_s: float
    requests: tuple[RequestTiming, ...]
    steps: tuple[Step, ...] = ()
    step_count: int
    driver_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens over the whole duration."""
        return self.output_tokens / self.duration_s

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens over the whole duration."""
        return (self.prompt_tokens + self.output_tokens) / self.duration_s

    @property
    def requests_per_s(self) -> float:
        """Requests over the whole duration."""
        return len(self.requests) / self.duration_s

    @property
    def driver_share(self) -> float:
        """Host time that our own loop added, as a share of the duration."""
        return self.driver_s / self.duration_s

    def ttft_s(self, percent: float = 50) -> float:
        """Percentile of the time to first token."""
        return percentile([request.ttft_s for request in self.requests], percent)

    def latency_s(self, percent: float = 50) -> float:
        """Percentile of the end-to-end latency."""
        return percentile([request.latency_s for request in self.requests], percent)

    def itl_s(self, percent: float = 50) -> float:
        """Percentile of the inter-token latency: the gaps of all requests, pooled.

        Raises:
            MeasurementError: No request has two tokens.
        """
        return percentile(
            [gap for request in self.requests for gap in request.gaps_s] or self._refuse_single(), percent
        )

    def tpot_s(self, percent: float = 50) -> float:
        """Percentile of the time per output token, one value a request.

        Raises:
            MeasurementError: No request has two tokens.
        """
        known = [request.tpot_s for request in self.requests if request.tpot_s is not None]
        return percentile(known or self._refuse_single(), percent)

    def goodput_requests_per_s(
        self, *, ttft_s: float = math.inf, tpot_s: float = math.inf, latency_s: float = math.inf
    ) -> float:
        """Count the requests a second that meet all limits, each in seconds; a single token meets any TPOT."""
        good = [
            one.ttft_s <= ttft_s and (one.tpot_s or 0.0) <= tpot_s and one.latency_s <= latency_s
            for one in self.requests
        ]
        return sum(good) / self.duration_s

    def _refuse_single(self) -> list[float]:
        raise MeasurementError(
            f"ITL and TPOT are times between tokens, and none of the {len(self.requests)} requests produced two. "
            "Ask for output_tokens of 2 or more."
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the two nearest values in order, as `numpy.percentile` does.

    Args:
        values: At least one.
        percent: 0 to 100.

    Raises:
        UsageError: No values, or a percentage outside of 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise UsageError(f"percentile({percent}) of {len(values)} values: give values, and a number from 0 to 100.")
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below = min(int(place), max(len(ordered) - 2, 0))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class GpuTime(Record, frozen=True, kw_only=True):
    """What the profiler saw the GPUs do while a load was generated; with several, the mean of them.

    Attributes:
        busy_s: Time in which at least one kernel or copy ran.
        steps: Steps of the engine.
        kernels: Kernels and copies.
        summary: What ran in one step, on the busiest of them: for `perf.record(..., kernels=...)`.
    """

    busy_s: float
    steps: int
    kernels: int
    summary: KernelSummary | None = None

    @property
    def step_s(self) -> float:
        """GPU time of one step."""
        return self.busy_s / self.steps


def gpu_busy_share(gpu: GpuTime, generation: Generation) -> float:
    """Share of a timed generation in which the GPU computed: profiled GPU time a step x steps / duration, at most 1.

    The profiler slows the host down, not the kernels: the time is taken from one pass and the duration from another.
    Both have to be of the same load, or of loads whose steps are alike, such as one and several full batches.

    Args:
        gpu: From the profiled pass.
        generation: The timed pass.
    """
    return min(gpu.step_s * generation.step_count / generation.duration_s, 1.0)


class RequestGpuTime(Record, frozen=True, kw_only=True):
    """What the GPUs computed for a request that had them to itself.

    Attributes:
        first_token_s: Until its first token.
        token_s: For each of the others, on average.
        whole_s: For all of it.
    """

    first_token_s: float
    token_s: float
    whole_s: float


def request_gpu_time(whole: GpuTime, first: Sequence[GpuTime], *, output_tokens: int) -> RequestGpuTime:
    """Tell apart what the GPUs computed for the first token of a request, and for the others.

    Args:
        whole: Of one request, alone.
        first: Of such a request that ends with its first token, once or more: the median counts.
        output_tokens: Of the first argument's request; 2 or more.

    Raises:
        UsageError: One token alone, or no profile of a first one.
    """
    if output_tokens < 2 or not first:
        raise UsageError(
            f"request_gpu_time() of {output_tokens} output tokens and {len(first)} profiles of a first token: "
            "it needs 2 or more, and 1 or more."
        )
    first_s = median(one.busy_s for one in first)
    others_s = max(whole.busy_s - first_s, 0.0) / (output_tokens - 1)
    return RequestGpuTime(first_token_s=first_s, token_s=others_s, whole_s=whole.busy_s)


def sampled_gpu_time(profile: Callable[[Load], GpuTime], load: Load, *, sample_tokens: int) -> GpuTime:
    """Profile the first tokens of a load's answers, and some from their middle that stand for all others.

    A token takes the longer the more there are before it, nearly in proportion: those of the middle take the mean. What
    ran in a step is not summed up: the loads have other shares of reading.

    Args:
        profile: Of the engine.
        load: Whose answers are longer than the sample.
        sample_tokens: From the middle; 2 or more.
    """
    middle = msgspec.structs.replace(load, prompt_tokens=load.prompt_tokens + (load.output_tokens - sample_tokens) // 2)
    first = profile(msgspec.structs.replace(load, output_tokens=1))
    before = profile(msgspec.structs.replace(middle, output_tokens=1))
    some = profile(msgspec.structs.replace(middle, output_tokens=sample_tokens))
    part = request_gpu_time(some, [before], output_tokens=sample_tokens)
    rest = load.output_tokens - 1
    return GpuTime(
        busy_s=first.busy_s + part.token_s * rest,
        steps=load.output_tokens,
        kernels=first.kernels + round((some.kernels - before.kernels) / (sample_tokens - 1) * rest),
    )


def busy_share(gpu_s: float, time_s: float) -> float:
    """Share of a time in which the GPU computed; at most 1.

    It does the same for every request, so what a slow one takes longer is the host's.

    Args:
        gpu_s: What it computes, by the profiler.
        time_s: What the request took, without one.

    >>> round(busy_share(6.4e-3, 10.0e-3), 2), round(busy_share(6.4e-3, 18.0e-3), 2)  # a first token on two hosts
    (0.64, 0.36)
    """
    return min(gpu_s / time_s, 1.0)


def in_sequence(generations: Sequence[Generation]) -> Generation:
    """Put generations that ran one after the other together; the time between them does not count.

    Raises:
        UsageError: There is none.
    """
    if not generations:
        raise UsageError("in_sequence() needs at least one generation.")
    starts = itertools.accumulate((one.duration_s for one in generations), initial=0.0)
    steps = [
        msgspec.structs.replace(step, time_s=step.time_s + start_s)
        for one, start_s in zip(generations, starts, strict=False)
        for step in one.steps
    ]
    return Generation(
        duration_s=sum(one.duration_s for one in generations),
        requests=tuple(request for one in generations for request in one.requests),
        steps=tuple(steps),
        step_count=sum(one.step_count for one in generations),
        driver_s=sum(one.driver_s for one in generations),
    )
