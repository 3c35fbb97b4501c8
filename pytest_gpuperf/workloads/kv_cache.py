"""How well a generation used the blocks of the KV cache, and why not better."""

import itertools
import math

from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_percent
from pytest_gpuperf.workloads.requests import Generation, Load, Step

#: Share of the blocks that should be in use under load.
USE_GOAL = 0.9


class KvUse(Record, frozen=True, kw_only=True):
    """What the scheduler's steps say of the KV cache.

    Attributes:
        blocks: That requests can have: all but the null block, which vLLM keeps.
        block_size: Tokens of a block.
        peak: The step with most blocks in use.
        filled_share: Slots that hold a token, of those in the blocks in use; the rest is fragmentation. `None` where
            no step could tell: see `filled_share_of`.
        hit_rate: Tokens found in the prefix cache, of those looked up; `None` without prefix caching.
        preemptions: Requests thrown out to be computed again.
    """

    blocks: int
    block_size: int
    peak: Step
    filled_share: float | None
    hit_rate: float | None
    preemptions: int

    @property
    def peak_blocks(self) -> int:
        """Most blocks in use."""
        return round(self.peak.kv_share * self.blocks)


def kv_use(generation: Generation, load: Load, *, blocks: int, block_size: int) -> KvUse | None:
    """Read the use of the KV cache from the steps; `None` where this version of vLLM gave none.

    Args:
        generation: Of the load.
        load: What was generated.
        blocks: The engine's, the null block included.
        block_size: Tokens of a block.
    """
    steps = generation.steps
    if not steps:
        return None
    queries = sum(step.prefix_queries for step in steps)
    return KvUse(
        blocks=blocks - 1,
        block_size=block_size,
        peak=max(steps, key=lambda step: step.kv_share),
        filled_share=filled_share_of(generation, load, blocks=blocks, block_size=block_size),
        hit_rate=sum(step.prefix_hits for step in steps) / queries if queries else None,
        preemptions=sum(step.preemptions for step in steps),
    )


def filled_share_of(generation: Generation, load: Load, *, blocks: int, block_size: int) -> float | None:
    """Share of the slots in use that hold a token, at the last step at which all tokens are known to be in the cache.

    That is the last one before the first request can have ended, and before requests were thrown out, which is seen by
    fewer of them running: vLLM reports a preemption with the request's next token only. Each token is in the cache but
    the newest of each request, which the next step writes. A step after which a prompt is half read does not count, nor
    one whose blocks vLLM has given to the next step's prompts already (async scheduling): fewer requests have got a
    token in it than are running. Blocks that prompts share are counted once and their tokens for each, so that with
    shared prefixes there is no such number.

    Args:
        generation: Of the load.
        load: What was generated.
        blocks: The engine's, the null block included.
        block_size: Tokens of a block.
    """
    early = generation.steps[: max(load.output_tokens - 1, 0)]
    running = itertools.accumulate((step.running for step in early), max)
    pairs = zip(early, running, strict=True)
    known = [step for step, _ in itertools.takewhile(lambda pair: _is_growing(*pair), pairs)]
    while known and known[-1].output_tokens < known[-1].running:
        known.pop()
    if not known or not known[-1].kv_share:
        return None
    tokens = sum(step.prompt_tokens + step.output_tokens for step in known) - known[-1].output_tokens
    slots = round(known[-1].kv_share * (blocks - 1)) * block_size
    return tokens / slots


def _is_growing(step: Step, most_running: int) -> bool:
    """Whether all tokens so far are in the cache, each in a slot of its own."""
    return step.running == most_running and step.preemptions == 0 and step.prefix_hits == 0


def cause_of_low_use(use: KvUse, load: Load, *, max_num_seqs: int | None, goal: float = USE_GOAL) -> str | None:
    """Say why fewer blocks than the goal were in use, with the numbers, and what mends it; `None` if it was reached.

    Args:
        use: From `kv_use`.
        load: What was generated.
        max_num_seqs: The engine's; `None` where it is not known.
        goal: Share of the blocks.
    """
    peak = use.peak
    if peak.kv_share >= goal:
        return None
    what = f"{use.peak_blocks} of {use.blocks} blocks ({format_percent(peak.kv_share)}) were in use at most: "
    each = math.ceil((load.prompt_tokens + load.output_tokens) / use.block_size)
    needed = math.ceil(goal * use.blocks / each)
    if max_num_seqs is not None and peak.running >= max_num_seqs:
        return (
            f"{what}max_num_seqs={max_num_seqs} was reached, with {peak.waiting} requests waiting. "
            f"From about {max(needed, max_num_seqs + 1)} requests of {each} blocks on they fill {format_percent(goal)}."
        )
    if peak.waiting == 0:
        return (
            f"{what}too few requests, all {peak.running} ran at once and none waited. "
            f"{needed} of {each} blocks each fill {format_percent(goal)}: raise Load(requests=...)."
        )
    return (
        f"{what}{peak.waiting} requests waited while {peak.running} ran: the blocks that were free did not hold the "
        "next prompt, or max_num_batched_tokens let no more in. Shorter prompts or a larger budget fill them."
    )
