"""One finding of `gpuperf doctor`, and how a finding names GPUs."""

from collections.abc import Sequence
from typing import Literal

from pytest_gpuperf.analysis.host import Topic
from pytest_gpuperf.records import Record

Level = Literal["ok", "note", "warning", "problem"]


class Finding(Record, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        level: `problem`: measuring will fail or be wrong; `warning`: it may; `note`: good to know.
        text: What was found, with numbers.
        mend: What to do, a command where there is one; `None` where all is well.
    """

    level: Level
    topic: Topic
    text: str
    mend: str | None = None


def ok(topic: Topic, text: str) -> Finding:
    """Say that all is well."""
    return Finding(level="ok", topic=topic, text=text)


def note(topic: Topic, text: str, mend: str) -> Finding:
    """Say what is good to know."""
    return Finding(level="note", topic=topic, text=text, mend=mend)


def warning(topic: Topic, text: str, mend: str) -> Finding:
    """Say what may spoil measurements."""
    return Finding(level="warning", topic=topic, text=text, mend=mend)


def problem(topic: Topic, text: str, mend: str) -> Finding:
    """Say what makes measurements fail, or wrong."""
    return Finding(level="problem", topic=topic, text=text, mend=mend)


def split_message(message: str, *, mend: str = "Run `nvidia-smi` to see the state of the GPUs.") -> tuple[str, str]:
    """Divide the message of an error into what happened and what to do about it: after its first sentence.

    Args:
        message: Of the error.
        mend: What to do where the message does not say it.
    """
    happened, _, told = message.partition(". ")
    return happened.rstrip("."), told or mend


def gpu_names(indices: Sequence[int]) -> str:
    """Name GPUs by NVML's index: `GPU 3`, `GPUs 0-3, 6`."""
    return f"GPU{'s' if len(indices) > 1 else ''} {_ranges(indices)}"


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
