"""Energy per token, from the GPU's energy counter."""

import math
from typing import Protocol

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.records import Measurement, Record


class Watched(Protocol):
    """A stretch of a test whose energy was counted, such as a `Region`."""

    @property
    def energy_j(self) -> float | None:
        """Energy of all its devices in joules; `None` under 5 s, where the counter is too coarse, or without NVML."""
        ...


class Recording(Protocol):
    """What `perf` offers."""

    def record(self, metric: str, value: float, *, unit: str, gpu_busy_share: float | None = None) -> Measurement:
        """Record a metric."""
        ...


class TokenEnergy(Record, frozen=True, kw_only=True):
    """What some tokens took.

    Attributes:
        tokens: How many.
        energy_j: Of all GPUs together, idle power included.
    """

    tokens: int
    energy_j: float

    @property
    def joules_per_token(self) -> float:
        """Energy of one token."""
        return self.energy_j / self.tokens

    @property
    def tokens_per_joule(self) -> float:
        """Tokens a second per watt: (tokens / s) / (J / s), so that the time cancels."""
        return self.tokens / self.energy_j


def token_energy(tokens: int, energy_j: float | None) -> TokenEnergy | None:
    """Say what tokens took, where their energy is known.

    Args:
        tokens: Produced in the stretch that the energy is of.
        energy_j: From the energy counter, such as `region.energy_j`; `None` where it cannot say.

    Returns:
        `None` without an energy, and where the counter stood still, as it does on some virtual GPUs.

    Raises:
        UsageError: Not a whole number of tokens above 0.
        MeasurementError: The counter went back.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens <= 0:
        raise UsageError(f"tokens={tokens!r} is not a whole number above 0, so there is no energy of a token.")
    if not energy_j:
        return None
    if not (math.isfinite(energy_j) and energy_j > 0):
        raise MeasurementError(f"{tokens} tokens took {energy_j:g} J: the GPU's energy counter went back.")
    return TokenEnergy(tokens=tokens, energy_j=energy_j)


def record_energy(
    perf: Recording, tokens: int, region: Watched, *, gpu_busy_share: float | None = None
) -> TokenEnergy | None:
    """Record `energy` in J/tok and `efficiency` in tok/s/W of a region that has ended, if it took 5 s or more.

    Args:
        perf: The fixture.
        tokens: Produced in the region.
        region: From `perf.region()`.
        gpu_busy_share: As for `perf.record`: a GPU that waits for the host takes energy meanwhile.

    Returns:
        What was recorded; `None` where the energy is not known.

    Raises:
        UsageError: See `token_energy`, as for `MeasurementError`.

    >>> record_energy(perf, generation.output_tokens, region)  # doctest: +SKIP
    """
    found = token_energy(tokens, region.energy_j)
    if found is not None:
        perf.record("energy", found.joules_per_token, unit="J/tok", gpu_busy_share=gpu_busy_share)
        perf.record("efficiency", found.tokens_per_joule, unit="tok/s/W", gpu_busy_share=gpu_busy_share)
    return found
