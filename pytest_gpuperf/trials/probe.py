"""A question asked in a thread of its own, so that what hangs, a driver or a disk, holds up nobody else."""

import time
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

from pytest_gpuperf.analysis.host import Topic, Trouble
from pytest_gpuperf.errors import DeviceError

T = TypeVar("T")


class Probe(Generic[T]):
    """Ask at once, and take the answer later.

    Args:
        topic: Of the trouble, should there be no answer.
        ask: The question.
        limit_s: Most seconds from now. A thread that hangs is left behind; it does not keep the process from ending.
    """

    def __init__(self, topic: Topic, ask: Callable[[], T], *, limit_s: float) -> None:
        self._topic: Topic = topic
        self._ask = ask
        self._limit_s = limit_s
        self._end_s = time.monotonic() + limit_s
        self._answers: list[T | Trouble] = []
        self._thread = Thread(target=self._run, name=f"gpuperf doctor: {topic}", daemon=True)
        self._thread.start()

    def answer(self) -> T | Trouble:
        """Wait for the answer, or for the time to be up."""
        self._thread.join(max(self._end_s - time.monotonic(), 0))
        if not self._answers:
            return Trouble(topic=self._topic, text=f"no answer within {self._limit_s:g} s")
        return self._answers[0]

    def _run(self) -> None:
        self._answers.append(answer_of(self._topic, self._ask))


def answer_of(topic: Topic, ask: Callable[[], T]) -> T | Trouble:
    """Ask here and now; whatever goes wrong is the answer."""
    try:
        return ask()
    except DeviceError as error:
        return Trouble(topic=topic, text=str(error), is_device=True)
    except Exception as error:  # noqa: BLE001 - whatever fails here is a finding, never a crash
        return Trouble(topic=topic, text=f"{type(error).__name__}: {error}")
