"""Is the GPU waiting for the host? Then the verdict says so, and gates nothing that the host alone decides. Pure.

A small model on a fast GPU is fed by one thread of Python: the same code differs by 1.8 times between processes while a
neighbour works. What such a metric does is noted; what the GPU does for it, its time for each step, is a metric of its
own, and that one is gated.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from pytest_gpuperf.curves import lost_end
from pytest_gpuperf.records import Measurement, MetricBaseline, Verdict
from pytest_gpuperf.stats import mean_of_known
from pytest_gpuperf.units import format_percent

#: Below this share of the time with a kernel running, the host sets the pace.
BUSY_SHARE = 0.9


def is_host_limited(gpu_busy_share: float | None) -> bool:
    """Whether the host set the pace, as far as is known."""
    return gpu_busy_share is not None and gpu_busy_share < BUSY_SHARE


def limited(verdict: Verdict, runs: Sequence[Measurement], baseline: MetricBaseline | None) -> Verdict:
    """Say of a verdict that the host was the limit, and take back a REGRESSED that is the host's alone.

    Where the GPU was kept busy in the baseline and is not any more, the host became the limit with the change: such a
    REGRESSED stays, and the remark says what happened. That of a curve which gave out early stays too: memory is no
    matter of the host's pace.

    Args:
        verdict: Of the judge.
        runs: In order.
        baseline: What they were compared with.
    """
    before = baseline.runs if baseline else ()
    now, then = (mean_of_known(run.gpu_busy_share for run in some) for some in (runs, before))
    if now is None or not is_host_limited(now):
        return verdict
    words = f"limited by the host: GPU busy {format_percent(now)} of the time"
    if then is not None and not is_host_limited(then):
        return replace(verdict, remark=_joined(verdict.remark, f"{words}, {format_percent(then)} in the baseline"))
    if verdict.status == "REGRESSED" and lost_end(runs, before):
        return replace(verdict, remark=_joined(verdict.remark, words))
    verdict = replace(verdict, is_host_limited=True, remark=_joined(verdict.remark, words))
    if verdict.status not in ("REGRESSED", "INCONCLUSIVE"):
        return verdict
    return replace(verdict.saying(f"{words}, so this is noted and gates nothing"), status="INCONCLUSIVE")


def _joined(remark: str | None, words: str) -> str:
    return f"{remark}; {words}" if remark else words
