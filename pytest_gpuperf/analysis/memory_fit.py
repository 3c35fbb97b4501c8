"""On which GPUs a model fits, and how many requests at most. Pure."""

import bisect
from collections.abc import Sequence

from msgspec.structs import replace

from pytest_gpuperf.analysis.memory import Estimate, Use, estimate
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.specs import GpuSpec, load_specs

_MOST_REQUESTS = 2**20

#: Compute capability that vLLM needs on NVIDIA GPUs: bfloat16 is Ampere's, fp8 and the others come with Turing
#: (get_min_capability of its quantizations).
_CAPABILITY = {"bf16": 8.0, "fp8": 7.5, "int8": 7.5, "int4": 7.5}


class Fit(Record, frozen=True, kw_only=True):
    """How an estimate fits on one kind of GPU.

    Attributes:
        gpu: Key of the spec table.
        memory_bytes: That programs can have.
        is_observed: As such a GPU reported it; else worked out from the vendor's label.
        needed_bytes: On the fullest GPU.
        largest_batch: Most requests of this length that fit; 0: not one.
        refusal: Why it cannot run whatever its memory, or `None`.
    """

    gpu: str
    memory_bytes: int
    is_observed: bool
    needed_bytes: int
    largest_batch: int
    refusal: str | None = None

    @property
    def is_fitting(self) -> bool:
        """Whether it runs there."""
        return self.refusal is None and self.needed_bytes <= self.memory_bytes


def fits_on(needed: Estimate, specs: Sequence[GpuSpec]) -> tuple[Fit, ...]:
    """Say of each kind of GPU whether the estimate fits, and how many requests at most; the smallest GPU first.

    Args:
        needed: The estimate.
        specs: Rows of the spec table.

    Raises:
        UsageError: The table does not know the memory of one.
    """
    rows = sorted(((memory_of(spec), spec) for spec in specs), key=lambda row: row[0])
    return tuple(
        Fit(
            gpu=spec.key,
            memory_bytes=memory,
            is_observed=spec.observed_total_memory_mb is not None,
            needed_bytes=needed.fullest.total_bytes,
            largest_batch=largest_batch(needed, memory),
            refusal=_refusal(spec, needed.use),
        )
        for memory, spec in rows
    )


def common_gpus() -> tuple[GpuSpec, ...]:
    """NVIDIA's GPUs whose memory the spec table knows: the overheads are theirs."""
    return tuple(spec for spec in load_specs().gpus if spec.vendor == "NVIDIA" and spec.vram_gb is not None)


def memory_of(spec: GpuSpec) -> int:
    """Bytes that programs can have: as observed, else the label less what its kind keeps for itself.

    The observed GPUs of the table report 92 to 94 % of the label with GDDR (ECC takes its part) and 99 % with HBM.

    Raises:
        UsageError: The table knows neither.
    """
    if spec.observed_total_memory_mb is not None:
        return spec.observed_total_memory_mb * 2**20
    if spec.vram_gb is None:
        raise UsageError(f"The spec table has no memory size for {spec.key}: there are several, or none is published.")
    share = 0.985 if (spec.memory_type or "").startswith("HBM") else 0.92
    return int(spec.vram_gb * 2**30 * share)


def largest_batch(needed: Estimate, memory_bytes: int) -> int:
    """Count the most requests of this length that fit into the memory of each GPU."""

    def total(batch_size: int) -> int:
        use = replace(needed.use, batch_size=batch_size)
        return estimate(needed.shape, use, overheads=needed.overheads).fullest.total_bytes

    return bisect.bisect_right(range(1, _MOST_REQUESTS), memory_bytes, key=total)


def _refusal(spec: GpuSpec, use: Use) -> str | None:
    needed = _CAPABILITY.get(use.quantization, 0.0)
    if use.engine != "vllm" or spec.vendor != "NVIDIA" or float(spec.compute_capability) >= needed:
        return None
    return f"no {use.quantization} before compute capability {needed}"
