"""Generation with transformers: what runs, what it counts, where its weights are, and what is refused."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pytest_gpuperf import workloads
from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import EngineOutOfMemory, MeasurementError, NotSupported, UsageError
from pytest_gpuperf.testing import fake_machine
from pytest_gpuperf.workloads.models import config_of, presets
from pytest_gpuperf.workloads.placement import Part, refuse_misplaced, split
from pytest_gpuperf.workloads.requests import Generation, Load, RequestTiming
from pytest_gpuperf.workloads.scaling import Alone, Scaling, measure_alone
from pytest_gpuperf.workloads.transformers import (
    Generator,
    half_precision,
    refuse_short,
    require_transformers,
    working_memory_bytes,
)
from pytest_gpuperf.workloads.vllm import EngineConfig
from pytest_gpuperf.workloads.weights import copy_shared, load_config, skeleton_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LOAD = Load(requests=3, prompt_tokens=5, output_tokens=4)
TWO = ("cpu", "cpu")


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the devices have this much free memory, one number each time somebody asks."""

    def set_free(*values: float) -> None:
        left = list(values)
        monkeypatch.setattr(workloads, "_free_bytes", lambda _: left.pop(0) if len(left) > 1 else left[0])

    return set_free


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder with real weights, other than those that would be drawn."""
    with Generator("tiny", devices=["cpu"]) as generator:
        assert generator._model is not None
        with torch.no_grad():
            generator._model.lm_head.weight.fill_(0.125)
        generator._model.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def small(name: str, folder: Path) -> str:
    """A folder with the config.json of a small model of a preset's architecture."""
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "head_dim": 16, "intermediate": 256, "vocab": 512}
    kv_heads = 2 if presets()[name].is_gated else 4
    shape = msgspec.structs.replace(presets()[name], kv_heads=kv_heads, max_positions=64, **sizes)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return str(folder)


def tokens_of(generator: Generator) -> Any:
    """Ten greedy tokens after fixed ones."""
    assert generator._model is not None
    return generator._model.generate(
        input_ids=torch.arange(40).reshape(4, 10), attention_mask=torch.ones(4, 10), max_new_tokens=10, do_sample=False
    )


# Generating


@pytest.mark.parametrize("devices", [("cpu",), TWO], ids=["one", "halves"])
def test_every_request_gets_its_tokens_and_each_is_timed(devices: Sequence[str]) -> None:
    with Generator("tiny", devices=devices) as generator:
        generation = generator.generate(LOAD)
    assert (generation.prompt_tokens, generation.output_tokens, generation.step_count) == (15, 12, 4)
    for request in generation.requests:
        assert len(request.gaps_s) == 3
        assert 0 < request.ttft_s < request.latency_s <= generation.duration_s
        assert request.ttft_s + sum(request.gaps_s) == pytest.approx(request.latency_s)


def test_a_single_token_is_a_generation() -> None:
    with Generator("tiny", devices=["cpu"]) as generator:
        assert generator.generate(msgspec.structs.replace(LOAD, output_tokens=1)).output_tokens == 3


def test_a_sequence_goes_on_after_the_token_that_would_end_it(checkpoint: str) -> None:
    """All rows of the head are equal: the first token, 0, is the likeliest, always."""
    for name in ("config.json", "generation_config.json"):
        file = Path(checkpoint) / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 0}))
    with Generator(checkpoint, devices=["cpu"]) as generator:
        assert generator.generate(LOAD).output_tokens == 12
        assert torch.all(tokens_of(generator)[:, 10:] == 0)


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3, "repetition_penalty": 1.5},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"max_time": 1e-9},
        {"return_dict_in_generate": True},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_checkpoints_own_way_to_generate_changes_nothing(checkpoint: str, own: dict[str, object]) -> None:
    """Every model is measured greedily, one sequence a request, with a cache of keys and values."""
    (Path(checkpoint) / "generation_config.json").write_text(json.dumps(own))
    config = Path(checkpoint) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))  # where old checkpoints have them
    with Generator(checkpoint, devices=["cpu"]) as generator:
        seen: list[tuple[int, ...]] = []
        assert generator._model is not None
        embedding = generator._model.get_input_embeddings()
        embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape[:2])))
        assert generator.generate(LOAD).output_tokens == 12
    assert seen == [(3, 5), (3, 1), (3, 1), (3, 1)]


def test_fewer_tokens_than_asked_for_are_no_throughput() -> None:
    refuse_short((3, 9), 4, LOAD)
    with pytest.raises(MeasurementError) as error:
        refuse_short((3, 7), 2, LOAD)
    assert str(error.value) == (
        "3 requests were to produce 4 tokens each, and 3 produced 2 each in 2 steps. "
        "No throughput is computed from them."
    )


def test_a_sequence_over_the_limit_of_the_model_is_refused_with_the_numbers() -> None:
    with Generator("tiny", devices=["cpu"]) as generator, pytest.raises(UsageError) as error:
        generator.generate(Load(requests=1, prompt_tokens=2000, output_tokens=100))
    assert str(error.value) == ("A prompt of 2000 and an output of 100 tokens are 2100, and tiny takes 2048 at most.")


def test_a_closed_generator_says_so() -> None:
    with Generator("tiny", devices=["cpu"]) as generator:
        pass
    with pytest.raises(UsageError, match="This Generator was closed"):
        generator.generate(LOAD)


def test_a_cpu_has_no_gpu_time_and_no_peak_of_torch() -> None:
    with Generator("tiny", devices=["cpu"]) as generator:
        assert generator.profile(LOAD) is None
        assert generator.peak_memory_bytes == (None,)


# Weights


@pytest.mark.parametrize("name", ["gpt2", "opt-1.3b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b"])
def test_a_model_in_halves_gives_the_tokens_of_the_whole(name: str, tmp_path: Path) -> None:
    model = small(name, tmp_path)
    with Generator(model, devices=["cpu"], dtype="float32") as whole:
        expected = tokens_of(whole)
    with Generator(model, devices=TWO, dtype="float32") as halves:
        assert [part.layers for part in halves.parts] == [1, 1]
        assert torch.equal(tokens_of(halves), expected)


def test_random_weights_are_normal_and_the_same_each_time_and_differ_between_layers() -> None:
    first, second = (Generator("tiny", devices=["cpu"], dtype="float32")._model for _ in range(2))
    assert first is not None
    assert second is not None
    for name, values in first.named_parameters():
        assert torch.equal(values, dict(second.named_parameters())[name])
        assert values.mean().item() == pytest.approx(1.0 if "norm" in name else 0.0, abs=0.01)
        assert values.std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, first.model.layers[1].mlp.up_proj.weight)


def test_a_head_that_shares_the_embedding_does_so_in_one_piece_and_is_copied_in_halves() -> None:
    whole, halves = (Generator("tiny", devices=devices)._model for devices in (("cpu",), TWO))
    assert whole is not None
    assert halves is not None
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert halves.lm_head.weight is not halves.model.embed_tokens.weight
    assert torch.equal(halves.lm_head.weight, halves.model.embed_tokens.weight)


def test_a_checkpoints_shared_head_is_copied_in_halves_too(checkpoint: str) -> None:
    """accelerate ties it to the embedding again, on one of the two devices."""
    with Generator(checkpoint, devices=TWO) as generator:
        model = generator._model
        assert model is not None
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        held = sum(one.numel() * one.element_size() for one in model.parameters())
        assert held == sum(part.weight_bytes for part in generator.parts)
    whole = Generator(checkpoint, devices=["cpu"])._model
    assert whole is not None
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_a_tensor_that_halves_share_is_copied_to_the_device_of_each(checkpoint: str) -> None:
    """Wherever the loading left it; one that a single part holds is not moved."""
    model = Generator(checkpoint, devices=["cpu"])._model
    assert model is not None
    first, second = split(model, ("cpu", "meta"))
    copy_shared(model, (first, second))
    assert (model.model.embed_tokens.weight.device.type, model.lm_head.weight.device.type) == ("cpu", "meta")
    assert model.model.norm.weight.device.type == "cpu"


def test_the_rotary_frequencies_are_those_of_the_formula() -> None:
    model = Generator("tiny", devices=["cpu"])._model
    assert model is not None
    expected = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("devices", [("cpu",), TWO], ids=["one", "halves"])
def test_a_checkpoint_brings_its_own_weights(checkpoint: str, devices: Sequence[str]) -> None:
    with Generator(checkpoint, devices=devices) as generator:
        assert generator.configuration["weights"] == "real"
        assert generator._model is not None
        assert torch.all(generator._model.lm_head.weight == 0.125)
        assert generator.generate(LOAD).output_tokens == 12


def test_a_folder_with_a_config_alone_gets_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(presets()["tiny"])))
    with Generator(str(tmp_path), devices=["cpu"]) as generator:
        assert generator.configuration["weights"] == "random"


def test_a_checkpoint_that_is_not_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def absent(model: str) -> None:
        raise OSError(f"{model} is not a local folder and is not a valid model identifier\nand more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", absent)
    with pytest.raises(UsageError) as error:
        Generator("nobody/nothing", devices=["cpu"])
    assert str(error.value) == (
        "The model 'nobody/nothing' cannot be loaded: "
        "nobody/nothing is not a local folder and is not a valid model identifier"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": "256"}, "hidden_size='256' is not a whole number"),
        ({"model_type": "llama-9", "architectures": ["Llama9ForCausalLM"]}, "'Llama9ForCausalLM' is not known here"),
        ({"model_type": "llama-9"}, r"cannot be loaded: .*`llama-9`"),
        ({"model_type": None}, "cannot be loaded: Unrecognized model"),
    ],
)
def test_a_checkpoint_with_a_config_that_makes_no_sense_is_refused(
    checkpoint: str, changes: dict[str, object], text: str
) -> None:
    file = Path(checkpoint) / "config.json"
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(UsageError, match=text):
        Generator(checkpoint, devices=["cpu"])


def test_a_quantized_checkpoint_is_left_to_vllm(checkpoint: str) -> None:
    """Its bytes are not those that would be counted and reported."""
    file = Path(checkpoint) / "config.json"
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **quantized}))
    with pytest.raises(NotSupported, match=r"quantized \(awq\).* vLLM"):
        Generator(checkpoint, devices=["cpu"])


def test_a_checkpoint_without_its_weights_is_refused(checkpoint: str) -> None:
    (Path(checkpoint) / "model.safetensors").write_bytes(b"cut off")  # as by a full disk
    with pytest.raises(UsageError, match=r"cannot be loaded: .*header too small"):
        Generator(checkpoint, devices=["cpu"])


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint: str) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(checkpoint) / "model.safetensors"
    kept = {name: values for name, values in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 3 of its weights, such as model\.layers\.1\.mlp\.down_proj\.weight"):
        Generator(checkpoint, devices=["cpu"])


# Halves


@pytest.mark.parametrize("name", presets())
def test_halves_hold_every_parameter_once_and_differ_by_less_than_a_layer(name: str) -> None:
    shape = presets()[name]
    skeleton = skeleton_of(load_config(name), "bfloat16")
    first, second = split(skeleton, ("cuda:0", "cuda:1"))
    copied = shape.vocab * shape.hidden if shape.is_tied else 0
    assert first.parameters + second.parameters == shape.parameters + copied
    assert first.layers + second.layers == shape.layers
    assert abs(first.weight_bytes - second.weight_bytes) <= 2 * shape.layer_parameters
    (whole,) = split(skeleton, ("cuda:0",))
    assert (whole.parameters, whole.weight_bytes) == (shape.parameters, 2 * shape.parameters)


def test_the_halves_of_llama_3_8b_are_equal_but_for_the_last_norm() -> None:
    first, second = split(skeleton_of(load_config("llama-3-8b"), "bfloat16"), ("cuda:0", "cuda:1"))
    assert second.weight_bytes - first.weight_bytes == 4096 * 2
    assert (first.layers, second.layers) == (16, 16)
    assert first.modules[:3] == ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    assert second.modules[-3:] == ("model.layers.31", "model.norm", "lm_head")


def test_the_last_norm_of_opt_is_in_the_second_half() -> None:
    first, second = split(skeleton_of(load_config("opt-1.3b"), "bfloat16"), ("cuda:0", "cuda:1"))
    assert "model.decoder.embed_positions" in first.modules
    assert second.modules[-2:] == ("model.decoder.final_layer_norm", "lm_head")


def test_what_is_where_is_said_a_line_a_device() -> None:
    with Generator("tiny", devices=TWO) as generator:
        said = generator.describe()
        assert generator.configuration == {
            "engine": "transformers",
            "model": "tiny",
            "dtype": "bfloat16",
            "weights": "random",
            "layers": "1 + 1",
        }
    assert said.splitlines() == [
        "tiny, bfloat16, random weights",
        "  cpu: 1,114,624 parameters, 2.23 MB: embed_tokens, rotary_emb, layers 0 to 0",
        "  cpu: 1,114,880 parameters, 2.23 MB: layers 1 to 1, norm, lm_head",
    ]


def test_a_gpu_is_named_with_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from pytest_gpuperf.workloads.placement import describe

    properties = SimpleNamespace(name="NVIDIA H200", uuid="11-22")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    part = Part(device="cuda:1", modules=("lm_head",), layers=0, parameters=7, weight_bytes=14)
    assert describe(part) == "  cuda:1 (NVIDIA H200, GPU-11-22): 7 parameters, 14.0 B: lm_head"


def test_weights_that_are_not_where_they_were_planned_are_refused() -> None:
    skeleton = skeleton_of(load_config("tiny"), "bfloat16")
    with pytest.raises(MeasurementError, match=r"embed_tokens\.weight is on meta, and was planned for cpu\."):
        refuse_misplaced(skeleton, split(skeleton, ("cpu",)))


# What does not fit


def test_a_half_that_does_not_fit_is_refused_before_it_is_made(free_bytes: Callable[..., None]) -> None:
    free_bytes(80e9, 42e9)
    with pytest.raises(NotSupported) as error:
        Generator("llama-2-70b", devices=TWO)
    assert str(error.value) == (
        "part 2 of 2 of llama-2-70b (40 of 80 layers, 34.5 G parameters x 2 B) needs 69.0 GB, "
        "and 42.0 GB are free on cpu."
    )


def test_a_model_that_does_not_fit_on_one_device_is_refused(free_bytes: Callable[..., None]) -> None:
    free_bytes(42e9)
    with pytest.raises(NotSupported, match=r"^llama-2-70b \(80 of 80 layers, 69 G parameters x 2 B\) needs 138 GB, "):
        Generator("llama-2-70b", devices=["cpu"])


def test_keys_and_values_that_do_not_fit_are_refused_before_they_are_made(free_bytes: Callable[..., None]) -> None:
    with Generator("tiny", devices=["cpu"]) as generator:
        free_bytes(1e6)
        with pytest.raises(NotSupported) as error:
            generator.generate(Load(requests=1000, prompt_tokens=10, output_tokens=10))
    assert str(error.value) == (
        "1000 x 20 tokens through tiny (20.5 MB of keys and values, the rest activations) needs 71.7 MB, "
        "and 1.00 MB are free on cpu."
    )


def test_a_half_needs_the_keys_and_values_of_its_own_layers() -> None:
    shape = presets()["llama-3-8b"]
    part = Part(device="cuda:0", modules=(), layers=16, parameters=0, weight_bytes=0)
    kv_bytes, activation_bytes = working_memory_bytes(shape, part, LOAD, 2)
    assert kv_bytes == 3 * 9 * 131072 // 2
    assert activation_bytes == 3 * 5 * 2 * (4 * 4096 + 3 * 14336)


@pytest.mark.parametrize(
    ("devices", "dtype", "text"),
    [
        (("cpu",), "int4", "Generator knows no dtype 'int4'. Valid: bfloat16, float16, float32."),
        (("cpu",) * 3, "bfloat16", "Generator runs on one device or in halves over two, not on 3."),
        ((), "bfloat16", "Generator runs on one device or in halves over two, not on 0."),
    ],
)
def test_wrong_arguments_are_refused(devices: Sequence[str], dtype: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        Generator("tiny", devices=devices, dtype=dtype)
    assert str(error.value) == text


def test_without_transformers_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("transformers", "accelerate") else known(name)
    )
    with pytest.raises(NotSupported) as error:
        require_transformers()
    assert str(error.value) == (
        "Generating with transformers needs transformers and accelerate: pip install 'pytest-gpuperf[llm]'"
    )


@pytest.mark.parametrize(
    ("capability", "dtype"), [("7.0", "float16"), ("7.5", "float16"), ("9.0", "bfloat16"), ("12.0", "bfloat16")]
)
def test_gpus_without_bfloat16_use_float16(capability: str, dtype: str) -> None:
    (gpu,) = fake_machine().gpus
    assert half_precision(msgspec.structs.replace(gpu, compute_capability=capability)) == dtype
    assert half_precision(cpu_device()) == "bfloat16"


# Several GPUs


def test_scaling_is_the_throughput_together_over_that_of_each_alone() -> None:
    """By hand: 27,000 / (14,000 + 16,000) = 0.9; against their mean of 15,000 it is 1.8."""
    found = Scaling(together_tokens_per_s=27e3, alone_tokens_per_s=(14e3, 16e3))
    assert found.figures() == pytest.approx({"scaling efficiency": 0.9, "speedup": 1.8})
    assert str(found) == "together 27,000 tok/s; alone 14,000, 16,000 tok/s; efficiency 90.0%, 1.80 x one GPU"


def test_a_model_that_fits_on_no_single_gpu_has_no_efficiency() -> None:
    found = Alone(why_not="138 GB on 80 GB").with_together(5e3)
    assert found.figures() == {}
    assert str(found) == "together 5,000 tok/s; alone: 138 GB on 80 GB"


class EngineOfTwoSpeeds:
    """Stands for a started vLLM: slower the first time, and as fast as the number of its device says."""

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self.is_warm = False
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def generate(self, load: Load) -> Generation:
        duration_s = self.duration_s if self.is_warm else 99.0
        self.is_warm = True
        request = RequestTiming(prompt_tokens=5, output_tokens=load.output_tokens, ttft_s=1, latency_s=2)
        return Generation(duration_s=duration_s, requests=(request,) * load.requests, step_count=4)


@dataclass
class Starter:
    """Stands for the fixture `vllm_engine`; what starts is to find the engine before it closed."""

    error: Exception | None = None
    started: list[tuple[str, int]] = field(default_factory=list)
    engines: list[EngineOfTwoSpeeds] = field(default_factory=list)

    def __call__(self, config: EngineConfig, *, devices: Sequence[Device] | None = None) -> Any:
        assert all(engine.is_closed for engine in self.engines)
        if self.error:
            raise self.error
        assert devices is not None
        self.started.append((devices[0].uuid, config.tensor_parallel_size))
        self.engines.append(EngineOfTwoSpeeds(10.0 * len(self.started)))
        return self.engines[-1]


def test_each_gpu_is_measured_alone_and_warm() -> None:
    gpus = [msgspec.structs.replace(fake_machine().gpus[0], uuid=uuid) for uuid in ("GPU-a", "GPU-b")]
    start = Starter()
    alone = measure_alone(start, EngineConfig(model="tiny", tensor_parallel_size=2), LOAD, devices=gpus)
    assert start.started == [("GPU-a", 1), ("GPU-b", 1)]
    assert alone == Alone(tokens_per_s=(12 / 10, 12 / 20))
    assert start.engines[-1].is_closed


@pytest.mark.parametrize("error", [NotSupported("138 GB on 80 GB"), EngineOutOfMemory("138 GB on 80 GB")])
def test_what_does_not_fit_alone_is_kept_as_the_reason(error: Exception) -> None:
    alone = measure_alone(Starter(error), EngineConfig(model="tiny"), LOAD, devices=fake_machine().gpus)
    assert alone == Alone(why_not="138 GB on 80 GB")


def test_measuring_alone_needs_devices() -> None:
    with pytest.raises(UsageError, match="needs the devices"):
        measure_alone(Starter(), EngineConfig(model="tiny"), LOAD, devices=())
