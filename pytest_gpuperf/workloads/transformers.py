"""Generation with transformers: random or real weights, on one device or in two halves over two."""

import gc
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import MeasurementError, NotSupported, UsageError
from pytest_gpuperf.units import format_value
from pytest_gpuperf.workloads import require_free_memory
from pytest_gpuperf.workloads.gpu_trace import gpu_time
from pytest_gpuperf.workloads.model_shape import ModelShape
from pytest_gpuperf.workloads.models import has_weights
from pytest_gpuperf.workloads.placement import Part, describe, refuse_misplaced, split
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load, RequestTiming, prompts_of, sampled_gpu_time
from pytest_gpuperf.workloads.weights import draw_weights, load_config, read_weights, shape_of_config, skeleton_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Generator:
    """A causal language model that generates, greedily and to the full length.

    Presets, and folders with a config.json alone, get weights from a normal distribution with a fixed seed, made on
    the device itself: nothing is downloaded. Over two devices the model is split where the halves differ least in
    bytes: the embedding and the first layers on one, the other layers, the last norm and the head on the other. They
    work in turn, so two devices are no faster than one; they hold more.

    Args:
        model: A preset, a folder as `save_pretrained` writes it, or a hub id, which stands for real weights.
        devices: One or two of `"cuda:0"`, `"cpu"`, ...
        dtype: `bfloat16`, `float16` or `float32`.

    Attributes:
        shape: Of the model.
        parts: What each device holds.
        is_random: The weights are drawn, not read.
        load_time_s: Seconds until the weights were in place.

    Raises:
        UsageError: An unknown model or data type, more than two devices, or a checkpoint that cannot be loaded.
        NotSupported: transformers or accelerate are not installed, or a part does not fit on its device.
    """

    def __init__(self, model: str, *, devices: Sequence[str], dtype: str = "bfloat16") -> None:
        if dtype not in _ELEMENT_BYTES:
            raise UsageError(f"Generator knows no dtype {dtype!r}. Valid: {', '.join(_ELEMENT_BYTES)}.")
        if len(devices) not in (1, 2):
            raise UsageError(f"Generator runs on one device or in halves over two, not on {len(devices)}.")
        require_transformers()
        begin_s = time.perf_counter()
        self.dtype = dtype
        self.is_random = not has_weights(model)
        config = load_config(model)
        self.shape: ModelShape = shape_of_config(model, config)
        skeleton = skeleton_of(config, dtype)
        self.parts = split(skeleton, devices)
        self._refuse_too_large()
        self._model: PreTrainedModel | None = self._prepared(
            draw_weights(skeleton, self.parts) if self.is_random else read_weights(model, self.parts, dtype)
        )
        self._synchronize()
        self.load_time_s = time.perf_counter() - begin_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def configuration(self) -> dict[str, str]:
        """What was run, for `perf.configure`: results of different configurations are not compared."""
        return {
            "engine": "transformers",
            "model": self.shape.name,
            "dtype": self.dtype,
            "weights": "random" if self.is_random else "real",
            "layers": " + ".join(str(part.layers) for part in self.parts),
        }

    def describe(self) -> str:
        """Say what is where: one line a device, with its layers, bytes and, of a GPU, its name and id."""
        weights = "random" if self.is_random else "real"
        return "\n".join([f"{self.shape.name}, {self.dtype}, {weights} weights", *map(describe, self.parts)])

    def generate(self, load: Load) -> Generation:
        """Generate for all requests as one batch; the clock runs from the call to the last token.

        Args:
            load: What to generate; the prompts are on the device before the clock starts.

        Raises:
            UsageError: A sequence is longer than the model's limit, or the generator was closed.
            NotSupported: Keys, values and activations do not fit.
            MeasurementError: Fewer tokens came than were asked for.
        """
        import torch
        from transformers import StoppingCriteriaList

        if self._model is None:
            raise UsageError("This Generator was closed. Make another.")
        refuse_too_long(self.shape, load)
        self._require_working_memory(load)
        prompts = torch.tensor(prompts_of(load, self.shape.vocab), device=self.parts[0].device)  # [requests, prompt]
        clock = _Clock()
        self._synchronize(resets_peak=True)
        begin_s = time.perf_counter()
        tokens = self._model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=load.output_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        self._synchronize()
        duration_s = time.perf_counter() - begin_s
        refuse_short(tuple(tokens.shape), len(clock.stamps_s), load)
        return _generation(load, begin_s, clock.stamps_s, duration_s)

    def profile(self, load: Load, *, sample_tokens: int | None = None) -> GpuTime | None:
        """Generate a load under torch's profiler: how long a GPU computed. `None` without a GPU.

        Halves take turns, so the time of two GPUs is that in which either of them computed. A token of an 8B model
        leaves 1,400 kernels: long answers take longer to read than to generate, and a sample of them does.

        Args:
            load: That of the timed pass.
            sample_tokens: Profile so many tokens of an answer, from its middle; `None`, or not fewer than it has: all.

        Raises:
            UsageError: As `generate`.
            MeasurementError: The profiler saw nothing.
        """
        if not self.parts[0].device.startswith("cuda"):
            return None
        if sample_tokens is None or sample_tokens >= load.output_tokens:
            return self._profiled(load)
        return sampled_gpu_time(self._profiled, load, sample_tokens=sample_tokens)

    def _profiled(self, load: Load) -> GpuTime:
        import torch

        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # else it warns of losing them
            generation = self.generate(load)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            return gpu_time([trace], steps=generation.step_count, duration_s=generation.duration_s)

    @property
    def peak_memory_bytes(self) -> tuple[int | None, ...]:
        """Most memory that torch held on each device during the last `generate`; `None` on a CPU."""
        import torch

        return tuple(
            torch.cuda.max_memory_allocated(part.device) if part.device.startswith("cuda") else None
            for part in self.parts
        )

    def close(self) -> None:
        """Give the memory back."""
        import torch

        self._model = None
        gc.collect()
        if any(part.device.startswith("cuda") for part in self.parts):
            torch.cuda.empty_cache()

    def _refuse_too_large(self) -> None:
        for number, part in enumerate(self.parts, 1):
            which = f"part {number} of {len(self.parts)} of " if len(self.parts) > 1 else ""
            what = (
                f"{which}{self.shape.name} ({part.layers} of {self.shape.layers} layers, "
                f"{part.parameters / 1e9:.3g} G parameters x {_ELEMENT_BYTES[self.dtype]} B)"
            )
            require_free_memory(part.weight_bytes, device=part.device, what=what)

    def _require_working_memory(self, load: Load) -> None:
        for part in self.parts:
            kv_bytes, activation_bytes = working_memory_bytes(self.shape, part, load, _ELEMENT_BYTES[self.dtype])
            what = (
                f"{load.requests} x {load.prompt_tokens + load.output_tokens} tokens through {self.shape.name} "
                f"({format_value(kv_bytes, 'B', digits=3)} of keys and values, the rest activations)"
            )
            require_free_memory(kv_bytes + activation_bytes, device=part.device, what=what)

    def _prepared(self, model: "PreTrainedModel") -> "PreTrainedModel":
        from transformers import GenerationConfig

        refuse_misplaced(model, self.parts)
        model.eval()
        # in place of a checkpoint's own, which may ask for beams, penalties, no cache, or an early end
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model

    def _synchronize(self, *, resets_peak: bool = False) -> None:
        import torch

        for device in (part.device for part in self.parts if part.device.startswith("cuda")):
            torch.cuda.synchronize(device)
            if resets_peak:
                torch.cuda.reset_peak_memory_stats(device)


def half_precision(device: Device) -> str:
    """Choose the 16-bit type that a device is fast in: GPUs older than 8.0 have no bfloat16."""
    capability = (device.compute_capability or "8.0").split(".")
    return "bfloat16" if int(capability[0]) >= 8 else "float16"


def dtype_on(device: Device) -> str:
    """Name the type that models and products use: 16 bit on a GPU."""
    return "float32" if device.kind == "cpu" else half_precision(device)


class _Clock:
    """Takes the time of every token: a stopping criterion that never stops."""

    def __init__(self) -> None:
        self.stamps_s: list[float] = []

    def __call__(self, tokens: "torch.Tensor", _scores: "torch.Tensor", **_: object) -> "torch.Tensor":
        import torch

        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)  # costs nothing: generate() itself looks at the answer next
        self.stamps_s.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def require_transformers() -> None:
    """Skip a test that needs transformers where it is not installed.

    Raises:
        NotSupported: With the extra to install.
    """
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotSupported(
            f"Generating with transformers needs {' and '.join(missing)}: pip install 'pytest-gpuperf[llm]'"
        )


def working_memory_bytes(shape: ModelShape, part: Part, load: Load, element_bytes: int) -> tuple[int, int]:
    """Estimate what generating needs beside the weights: keys and values, and the widest activations.

    The activations are those of one layer over all prompts at once: the residual stream four times, the MLP's width
    three times.

    Returns:
        Bytes of keys and values of every token in the part's layers; bytes of activations.
    """
    tokens = load.requests * (load.prompt_tokens + load.output_tokens)
    kv_bytes = tokens * shape.kv_bytes_per_token(element_bytes) * part.layers // shape.layers
    width = 4 * shape.hidden + 3 * shape.intermediate
    return kv_bytes, load.requests * load.prompt_tokens * width * element_bytes


def refuse_too_long(shape: ModelShape, load: Load) -> None:
    """Refuse sequences over the model's limit.

    Raises:
        UsageError: With both numbers.
    """
    length = load.prompt_tokens + load.output_tokens
    if length > shape.max_positions:
        raise UsageError(
            f"A prompt of {load.prompt_tokens} and an output of {load.output_tokens} tokens are {length}, "
            f"and {shape.name} takes {shape.max_positions} at most."
        )


def refuse_short(shape: tuple[int, ...], steps: int, load: Load) -> None:
    """Refuse an output that is not what was asked for: its speed would be of other work.

    Args:
        shape: Of the tokens: requests, prompt and output.
        steps: In which they came.
        load: What was asked for.

    Raises:
        MeasurementError: With both numbers.
    """
    wanted = (load.requests, load.prompt_tokens + load.output_tokens)
    if shape != wanted or steps != load.output_tokens:
        raise MeasurementError(
            f"{load.requests} requests were to produce {load.output_tokens} tokens each, and {shape[0]} produced "
            f"{shape[1] - load.prompt_tokens} each in {steps} steps. No throughput is computed from them."
        )


def _generation(load: Load, begin_s: float, stamps_s: Sequence[float], duration_s: float) -> Generation:
    """One batch: its requests have their tokens at the same times."""
    request = RequestTiming(
        prompt_tokens=load.prompt_tokens,
        output_tokens=len(stamps_s),
        ttft_s=stamps_s[0] - begin_s,
        latency_s=stamps_s[-1] - begin_s,
        gaps_s=tuple(after - before for before, after in itertools.pairwise(stamps_s)),
    )
    return Generation(duration_s=duration_s, requests=(request,) * load.requests, step_count=len(stamps_s))
