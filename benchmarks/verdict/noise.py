"""Noise that is known exactly: runs of unchanged code whose values vary by device, session, process and iteration."""

import math
from typing import Literal

import numpy as np

from pytest_gpuperf.records import Record

#: Timed iterations of a run.
ITERATIONS = 50
#: Of the median of normal values, over that of their mean, for many of them.
_MEDIAN_OVER_MEAN = math.sqrt(math.pi / 2)
_STRAGGLER_SHARE, _STRAGGLER_LOG = 0.02, math.log(1.3)
_MODES_APART = 0.03


class Noise(Record, frozen=True, kw_only=True):
    """Relative standard deviations, as fractions.

    Attributes:
        session: Between visits to one device.
        process: Between runs of one visit.
        iteration: Between the iterations of a run.
        device: Between devices of a model.
        tail: Of the processes: `t3` is Student t with 3 degrees of freedom and the same standard deviation;
            `stragglers` makes 2 % of the processes 30 % slower.
        drift: Correlation of a run with the one before it in the same visit.
        modes: The clock has two modes 3 % apart, chosen by each process or by each session.
    """

    session: float
    process: float
    iteration: float
    device: float = 0.0
    tail: Literal["normal", "t3", "stragglers"] = "normal"
    drift: float = 0.0
    modes: Literal["none", "process", "session"] = "none"

    @property
    def run_variance(self) -> float:
        """Of a run's value around its session: its process and what is left of its iterations in their median."""
        return self.process**2 + (_MEDIAN_OVER_MEAN * self.iteration) ** 2 / ITERATIONS


QUIET = Noise(session=0.007, process=0.003, iteration=0.004)
SERVING = Noise(session=0.02, process=0.015, iteration=0.03)
POOL = Noise(session=0.05, process=0.015, iteration=0.02)


def draw(noise: Noise, shape: tuple[int, int, int], random: np.random.Generator, *, devices: np.ndarray) -> np.ndarray:
    """Draw logarithms of the times of iterations: [repetitions, sessions, runs, iterations].

    Args:
        noise: How much they vary.
        shape: Repetitions, sessions, runs of each.
        random: Source of chance.
        devices: Which device each session is on: [sessions], numbered from 0.
    """
    repetitions, sessions, runs = shape
    of_devices = noise.device * random.standard_normal((repetitions, int(devices.max()) + 1))
    of_sessions = noise.session * random.standard_normal((repetitions, sessions))
    if noise.modes == "session":
        of_sessions += _mode(of_sessions.shape, random)
    levels = (of_devices[:, devices] + of_sessions)[:, :, None] + _processes(noise, shape, random)
    iterations = random.standard_normal((repetitions, sessions, runs, ITERATIONS), dtype=np.float32)
    return np.asarray(levels[..., None] + noise.iteration * iterations)


def run_logs(iterations: np.ndarray) -> np.ndarray:
    """Logarithm of a run's value, the median of its iterations."""
    return np.asarray(np.median(iterations, axis=-1))


def _processes(noise: Noise, shape: tuple[int, int, int], random: np.random.Generator) -> np.ndarray:
    fresh = random.standard_t(3, shape) / math.sqrt(3) if noise.tail == "t3" else random.standard_normal(shape)
    if noise.drift:  # AR(1) with the same standard deviation at every run
        for run in range(1, shape[2]):
            fresh[:, :, run] = noise.drift * fresh[:, :, run - 1] + math.sqrt(1 - noise.drift**2) * fresh[:, :, run]
    logs = noise.process * fresh
    if noise.tail == "stragglers":
        logs += _STRAGGLER_LOG * (random.random(shape) < _STRAGGLER_SHARE)
    if noise.modes == "process":
        logs += _mode(shape, random)
    return np.asarray(logs)


def _mode(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return np.asarray(_MODES_APART * (random.random(shape) < 0.5))
