"""Models: presets as large as published, config.json in and out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.workloads.models import (
    ModelShape,
    config_of,
    has_weights,
    is_hub_id,
    model_folder,
    preset_of,
    preset_table,
    presets,
    refuse_uneven_heads,
    shape_from_config,
    shape_of,
)

#: Written out here too: the data could be changed together with the code.
PUBLISHED = {
    "gpt2": 124_439_808,
    "opt-1.3b": 1_315_758_080,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3-8b": 8_030_261_248,
    "llama-2-70b": 68_976_648_192,
    "llama-3-70b": 70_553_706_496,
}
NAMES = (*PUBLISHED, "tiny")


def config_file(folder: Path, **changes: object) -> str:
    """A folder with tiny's config.json and changes; `None` takes a field away."""
    fields = {**config_of(presets()["tiny"]), **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return str(folder)


# Sizes


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_preset_has_as_many_parameters_as_published(name: str, parameters: int) -> None:
    assert presets()[name].parameters == parameters


def test_the_presets_are_those_and_tiny_and_say_where_their_count_is_from() -> None:
    assert tuple(presets()) == NAMES
    for preset in preset_table():
        assert preset.shape.parameters == preset.published_parameters
        assert preset.source
        assert preset.hub_ids or preset.shape.name == "tiny"


def test_the_parts_of_gpt2_are_those_computed_by_hand() -> None:
    shape = presets()["gpt2"]
    assert shape.embedding_parameters == (50257 + 1024) * 768
    assert shape.attention_parameters == 4 * 768**2 + 4 * 768
    assert shape.mlp_parameters == 8 * 768**2 + 5 * 768
    assert shape.layer_parameters == 12 * 768**2 + 13 * 768
    assert shape.head_parameters == 0
    assert not shape.is_gated


def test_the_parts_of_llama_3_8b_are_those_computed_by_hand() -> None:
    shape = presets()["llama-3-8b"]
    assert shape.attention_parameters == 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert shape.mlp_parameters == 3 * 4096 * 14336
    assert shape.head_parameters == shape.embedding_parameters == 128256 * 4096
    assert shape.is_gated


@pytest.mark.parametrize("name", NAMES)
def test_transformers_builds_a_preset_with_exactly_its_parameters(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = presets()[name]
    config = transformers.AutoConfig.from_pretrained(model_folder(name, tmp_path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model).__name__ == shape.architecture
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    assert sum(parameter.numel() for parameter in layers[0].parameters()) == shape.layer_parameters
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_is_read_as_the_same_shape(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.from_pretrained(model_folder(name, tmp_path)).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert shape_from_config(saved, name=name, place="saved") == presets()[name]


# Keys and values


def test_keys_and_values_of_a_70b_model_are_those_of_its_8_heads_not_of_all_64() -> None:
    shape = presets()["llama-3-70b"]
    assert shape.kv_bytes_per_token(2) * 131072 == 42_949_672_960
    everyone = msgspec.structs.replace(shape, kv_heads=shape.heads)
    assert everyone.kv_bytes_per_token(2) * 131072 == 343_597_383_680


def test_a_rank_holds_its_heads_and_at_least_one() -> None:
    shape = presets()["llama-3-8b"]  # 8 heads of keys and values
    assert [shape.kv_bytes_per_token(2, tensor_parallel=count) for count in (1, 2, 8, 16)] == [
        131072,
        65536,
        16384,
        16384,
    ]


def test_a_vllm_block_has_the_bytes_that_were_measured() -> None:
    """2 layers, 2 heads of 64, bfloat16, a block of 128 tokens: 131,072 B; half of it on each of two ranks."""
    assert 128 * presets()["tiny"].kv_bytes_per_token(2) == 131072
    assert 128 * presets()["tiny"].kv_bytes_per_token(2, tensor_parallel=2) == 65536


@given(bits=st.sampled_from([4, 8, 16, 32]), name=st.sampled_from(NAMES))
def test_keys_and_values_are_proportional_to_their_element(bits: int, name: str) -> None:
    assert presets()[name].kv_bytes_per_token(bits / 8) * 32 == presets()[name].kv_bytes_per_token(4) * bits


@pytest.mark.parametrize(
    ("name", "count", "text"),
    [
        ("qwen2.5-7b", 8, "qwen2.5-7b has 28 heads and 4 of keys and values, which do not divide over 8 GPUs."),
        ("llama-3-8b", 3, "llama-3-8b has 32 heads and 8 of keys and values, which do not divide over 3 GPUs."),
        ("llama-3-8b", 0, "A tensor-parallel size of 0 is not a number of GPUs, 1 or more."),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_the_numbers(name: str, count: int, text: str) -> None:
    with pytest.raises(UsageError) as error:
        presets()[name].kv_bytes_per_token(2, tensor_parallel=count)
    assert str(error.value) == text


@given(name=st.sampled_from(NAMES), count=st.integers(1, 64))
def test_a_division_that_is_allowed_shares_the_heads_evenly(name: str, count: int) -> None:
    shape = presets()[name]
    try:
        refuse_uneven_heads(shape, count)
    except UsageError:
        return
    assert shape.heads % count == 0
    assert shape.kv_heads % count == 0 or count % shape.kv_heads == 0


# Names


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("llama-3-8b", "llama-3-8b"),
        ("LLaMA-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("openai-community/GPT2", "gpt2"),
    ],
)
def test_a_preset_is_found_by_its_name_or_a_hub_id_in_any_case(written: str, name: str) -> None:
    assert shape_of(written).name == name


def test_a_model_that_is_not_known_is_refused_with_the_presets() -> None:
    assert preset_of("llama-9-8b") is None
    with pytest.raises(UsageError, match=r"'llama-9-8b' is no preset and no folder. Presets: gpt2, opt-1.3b, .*, tiny"):
        shape_of("llama-9-8b")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder without a config\.json\. Presets: gpt2"):
        shape_of(str(tmp_path))


def test_a_folder_is_its_own_model_even_with_the_name_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file(tmp_path / "gpt2", num_hidden_layers=7)
    monkeypatch.chdir(tmp_path)
    assert shape_of("gpt2").layers == 7
    assert model_folder("gpt2", tmp_path / "root") == Path("gpt2")


def test_weights_are_real_in_a_folder_that_holds_some_and_on_the_hub(tmp_path: Path) -> None:
    folder = config_file(tmp_path / "model")
    assert not has_weights(folder)
    (tmp_path / "model/model.safetensors").touch()
    assert has_weights(folder)
    assert has_weights("meta-llama/Meta-Llama-3-8B")
    assert not has_weights("llama-3-8b")


@pytest.mark.parametrize(
    ("text", "expected"), [("org/name", True), ("a/b/c", False), ("name", False), ("../up", False), ("", False)]
)
def test_a_hub_id_is_a_name_in_an_organisation(text: str, expected: bool) -> None:
    assert is_hub_id(text) is expected


# Folders


def test_a_preset_gets_a_folder_with_its_config_and_keeps_it(tmp_path: Path) -> None:
    folder = model_folder("llama-3.2-1b", tmp_path / "models")
    file = folder / "config.json"
    assert json.loads(file.read_text())["rope_scaling"]["rope_type"] == "llama3"
    written = file.stat().st_mtime_ns
    assert model_folder("meta-llama/Llama-3.2-1B", tmp_path / "models") == folder
    assert file.stat().st_mtime_ns == written
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_config_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    file = model_folder("tiny", tmp_path) / "config.json"
    file.write_text('{"archi')
    assert shape_of(str(model_folder("tiny", tmp_path))).layers == 2


# config.json


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_survives_its_config(name: str) -> None:
    shape = presets()[name]
    assert shape_from_config(config_of(shape), name=name, place="here") == shape


sizes = st.integers(1, 9)
shapes = st.builds(
    ModelShape,
    name=st.just("some"),
    architecture=st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"]),
    layers=sizes,
    hidden=sizes,
    heads=sizes,
    kv_heads=sizes,
    head_dim=sizes,
    intermediate=sizes,
    vocab=sizes,
    max_positions=sizes,
    is_tied=st.booleans(),
    rope_theta=st.floats(1, 1e6),
).map(lambda shape: msgspec.structs.replace(shape, heads=shape.heads * shape.kv_heads))


@given(shapes)
def test_any_shape_survives_its_config_and_is_the_sum_of_its_parts(shape: ModelShape) -> None:
    assert shape_from_config(config_of(shape), name="some", place="here") == shape
    parts = shape.embedding_parameters + shape.final_norm_parameters + shape.head_parameters
    assert shape.parameters == parts + shape.layers * shape.layer_parameters


def test_fields_that_may_be_left_out_have_the_values_of_their_architecture(tmp_path: Path) -> None:
    shape = shape_of(config_file(tmp_path, num_key_value_heads=None, head_dim=None, tie_word_embeddings=None))
    assert (shape.kv_heads, shape.head_dim, shape.is_tied) == (4, 64, False)
    assert shape_of(config_file(tmp_path, rope_theta=None)).rope_theta == 10000.0
    gpt2 = {**config_of(presets()["gpt2"]), "n_inner": None, "tie_word_embeddings": True}
    assert shape_from_config(gpt2, name="gpt2", place="here") == presets()["gpt2"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": None}, "lacks hidden_size: the size of the model depends on it."),
        ({"vocab_size": None, "num_hidden_layers": None}, "lacks num_hidden_layers, vocab_size: the size"),
        ({"hidden_size": 0}, "hidden_size=0 is not a whole number, 1 or more."),
        ({"hidden_size": "256"}, "hidden_size='256' is not a whole number, 1 or more."),
        ({"hidden_size": 250, "head_dim": None}, "hidden_size=250 does not divide into 4 heads."),
        ({"num_key_value_heads": 3}, "4 heads do not share 3 of keys and values evenly."),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is neither true nor false."),
        ({"rope_theta": "10000"}, "rope_theta='10000' is not a number above zero."),
        ({"rope_theta": [1]}, "rope_theta=[1] is not a number above zero."),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 is not a number above zero."),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not known here, and its size is not guessed."),
        ({"architectures": None}, "lacks 'architectures'. Known: LlamaForCausalLM,"),
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not known here, and its size is not gu"),
        ({"architectures": [["LlamaForCausalLM"]]}, "the architecture ['LlamaForCausalLM'] is not known here"),
        ({"attention_bias": True}, "attention_bias=True of LlamaForCausalLM is not known here, only False."),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta='high' is not a number above zero."),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta=nan is not a number above zero."),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object of fields."),
    ],
)
def test_a_config_that_leaves_the_size_open_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError) as error:
        shape_of(config_file(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert text in str(error.value)


def test_the_projection_of_opt_350m_is_refused_by_name() -> None:
    config = {**config_of(presets()["opt-1.3b"]), "word_embed_proj_dim": 512}
    with pytest.raises(UsageError, match="word_embed_proj_dim other than hidden_size"):
        shape_from_config(config, name="opt", place="here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read: Expecting"),
        ("[]", "holds list, not an object"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        shape_of(str(tmp_path))
