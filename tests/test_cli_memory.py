"""`gpuperf memory`: what a user reads, in 80 columns, and what a mistake says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from harness import gpuperf

from pytest_gpuperf.workloads.models import config_of, presets

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def memory(*arguments: str) -> list[str]:
    """Lines of `gpuperf memory` that worked."""
    done = gpuperf("memory", *arguments)
    assert (done.code, done.errors) == (0, "")
    return done.output.splitlines()


def refusal(*arguments: str) -> str:
    """The one line of an error."""
    done = gpuperf("memory", *arguments)
    assert (done.code, done.output) == (1, "")
    (line,) = done.errors.splitlines()
    return line


def row(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.startswith(name)]
    return found


def test_every_part_is_a_line_with_what_it_is_made_of() -> None:
    lines = memory("--model", "llama-3-8b", "--quantization", "fp16", "--sequence-length", "2048", "--batch-size", "4")
    assert lines[:3] == [
        "llama-3-8b: 8.03 B parameters, fp16 weights, 16-bit KV cache, vllm",
        "4 requests of 2048 tokens at a time on 1 GPU, 8192 tokens a step at most",
        "",
    ]
    assert row(lines, "weights") == "weights            16.06 GB"
    assert row(lines, "KV cache") == "KV cache           1.076 GB  513 blocks of 16, 268.4 MB a request"
    assert row(lines, "activations") == "activations        1.174 GB  peak of a step"
    assert "7 graphs" in row(lines, "CUDA graphs")
    assert re.fullmatch(r"total +\d\d\.\d\d GB", row(lines, "total"))


def test_several_gpus_have_a_column_of_their_own() -> None:
    lines = memory("--model", "llama-3-70b", "--gpus", "4", "--batch-size", "32", "--sequence-length", "8192")
    assert row(lines, "            ").split() == ["fullest", "4", "GPUs"]
    assert row(lines, "weights").split()[1:] == ["35.28", "GB", "141.1", "GB"]
    assert row(lines, "KV cache").split()[1:6] == ["cache", "21.48", "GB", "85.90", "GB"]


def test_transformers_has_no_blocks_and_no_graphs() -> None:
    lines = memory("--model", "gpt2", "--engine", "transformers", "--batch-size", "2")
    assert row(lines, "KV cache").endswith("37.75 MB a request")
    assert row(lines, "activations").endswith("peak while all prompts are read")
    assert row(lines, "CUDA graphs").split() == ["CUDA", "graphs", "0", "B"]
    assert row(lines, "allocator").endswith("freed, and kept by torch's allocator")


def test_default_length_is_the_models_limit_where_that_is_short() -> None:
    assert "1 request of 1024 tokens" in memory("--model", "gpt2")[1]
    assert "1 request of 2048 tokens" in memory("--model", "qwen2.5-7b")[1]


def test_eager_vllm_has_no_graphs() -> None:
    assert row(memory("--model", "gpt2", "--enforce-eager"), "CUDA graphs").split() == ["CUDA", "graphs", "0", "B"]


def test_fp8_cache_is_named_and_half() -> None:
    lines = memory("--model", "llama-3-8b", "--kv-dtype", "fp8", "--sequence-length", "2048", "--batch-size", "4")
    assert "fp8 KV cache" in lines[0]
    assert "134.2 MB a request" in row(lines, "KV cache")


def test_smallest_gpus_that_it_fits_are_shown_and_the_others_named() -> None:
    lines = memory("--model", "llama-3-8b", "--quantization", "fp16", "--batch-size", "4")
    text = " ".join(lines)
    assert lines[10].split() == ["GPU", "memory", "needed", "requests", "at", "most"]
    assert lines[11].startswith("A10G ")
    assert "Too small: T4, V100-SXM2-16GB" in lines
    assert "Fits on larger ones too:" in text
    assert "H200-SXM" in text


def test_gpus_without_the_type_are_named_apart() -> None:
    lines = memory("--model", "llama-3-8b")
    assert "no bf16 before compute capability 8.0: T4, V100-SXM2-16GB, V100-SXM2-32GB" in lines


def test_chosen_gpus_are_shown_with_what_they_lack() -> None:
    lines = memory("--model", "llama-2-70b", "--gpu", "l4", "--gpu", "h200-sxm", "--gpu", "t4")
    assert re.match(r"L4 +~23\.7 GB +\d+ % +0  lacks \d+ GB", row(lines, "L4"))
    assert row(lines, "T4").endswith("no bf16 before compute capability 8.0")
    assert re.match(r"H200-SXM +150 GB +9\d % +\d+$", row(lines, "H200-SXM"))
    assert any(line.startswith("Above 92 % tell vLLM: --gpu-memory-utilization") for line in lines)


def test_what_fits_nowhere_says_what_to_try() -> None:
    lines = memory("--model", "llama-3-70b", "--batch-size", "512", "--sequence-length", "8192")
    assert lines[-1] == "Does not fit. Try more --gpus, --quantization fp8, a smaller --batch-size."


@pytest.mark.parametrize(
    ("arguments", "remedies"),
    [
        (["--quantization", "fp8", "--batch-size", "9"], "more --gpus, --quantization int4, a smaller --batch-size"),
        (["--quantization", "int4"], "more --gpus"),
        (["--gpus", "8"], "--quantization fp16"),
    ],
)
def test_what_is_tried_already_is_not_advised(arguments: list[str], remedies: str) -> None:
    lines = memory("--model", "llama-3-70b", "--gpu", "t4", *arguments)
    assert f"Does not fit. Try {remedies}." in lines


def test_advice_for_vllm_is_not_given_to_transformers() -> None:
    lines = memory("--model", "llama-3-70b", "--gpus", "3", "--engine", "transformers", "--gpu", "rtx-a6000")
    assert "98 %" in row(lines, "RTX-A6000")
    assert not any("vLLM" in line for line in lines)


def test_a_quantized_checkpoint_is_named_beside_what_is_counted(tmp_path: Path) -> None:
    stored = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps({**config_of(presets()["llama-3-8b"]), **stored}))
    said = "config.json says awq, 4 bits; counted are int4 weights, as --quantization says."
    assert said in memory("--model", str(tmp_path), "--quantization", "int4")
    (tmp_path / "config.json").write_text(json.dumps(config_of(presets()["llama-3-8b"])))
    assert not any("config.json" in line for line in memory("--model", str(tmp_path)))


def test_sizes_from_the_label_are_marked() -> None:
    assert memory("--model", "gpt2", "--gpu", "l4")[-1].startswith("~ from the vendor's label")
    assert not memory("--model", "gpt2", "--gpu", "h100-sxm-80")[-1].startswith("~")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "llama-3-70b", "--gpus", "8", "--batch-size", "1000", "--sequence-length", "8192"],
        ["--model", "tinyllama-1.1b", "--batch-size", "1024", "--kv-dtype", "fp8"],
        ["--model", "llama-2-70b", "--gpu", "h200-sxm", "--gpu", "rtx-pro-6000-server"],
        ["--model", "opt-1.3b", "--engine", "transformers", "--gpus", "2"],
    ],
    ids=" ".join,
)
def test_every_line_fits_80_columns(arguments: list[str]) -> None:
    assert [line for line in memory(*arguments) if len(line) > 80] == []


def test_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(presets()["llama-3-8b"])))
    assert memory("--model", str(folder))[0].startswith("mine: 8.03 B parameters")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9"], "gpuperf: The model 'llama-9' is no preset and no folder. Presets: gpt2, "),
        (["--model", "gpt2", "--quantization", "fp4"], "Valid: fp16, bf16, fp8, int8, int4."),
        (["--model", "gpt2", "--kv-dtype", "fp4"], "Valid: auto, fp8."),
        (["--model", "gpt2", "--engine", "tgi"], "Valid: vllm, transformers."),
        (["--model", "gpt2", "--batch-size", "0"], "gpuperf: A batch size of 0 is not possible: 1 to 1073741824."),
        (
            ["--model", "gpt2", "--batch-size", "9000"],
            "gpuperf: vLLM takes no batch of 9000 with 8192 tokens a step: each request has one in it.",
        ),
        (["--model", "gpt2", "--sequence-length", "1025"], "gpt2 takes 1024 tokens at most"),
        (["--model", "gpt2", "--gpus", "5"], "do not divide over 5 GPUs."),
        (["--model", "gpt2", "--gpu", "z9"], "No GPU 'z9' in the table."),
        (["--model", "gpt2", "--gpu", "gb300"], "The spec table has no memory size for GB300"),
        (["--batch-size", "1"], "gpuperf: Missing option '--model'. Try: gpuperf memory --help"),
    ],
)
def test_mistake_is_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "the architecture 'MambaForCausalLM' is not known here"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ],
)
def test_config_that_cannot_be_counted_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_of(presets()["llama-3-8b"]), **change}))
    assert message in refusal("--model", str(tmp_path))


@needs_matplotlib
def test_plot_is_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    lines = memory("--model", "llama-3-8b", "--plot", str(picture))
    assert lines[-1] == f"Plot: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_plot_is_where_it_is_said_to_be_though_its_name_has_no_suffix(tmp_path: Path) -> None:
    memory("--model", "gpt2", "--plot", str(tmp_path / "memory"))
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    done = gpuperf("memory", "--model", "gpt2", "--plot", str(tmp_path))
    assert (done.code, done.errors) == (
        1,
        f"gpuperf: The plot cannot be written to {tmp_path}: [Errno 21] Is a directory: '{tmp_path}'.\n",
    )


@needs_matplotlib
def test_plot_has_the_lengths_the_parts_and_the_chosen_gpus(tmp_path: Path) -> None:
    picture = tmp_path / "memory.svg"
    memory("--model", "llama-3-8b", "--gpu", "l4", "--gpu", "h100-sxm-80", "--plot", str(picture))
    drawn = picture.read_text()
    for text in ("512 tokens", "8192 tokens", "KV cache", "activations", "H100-SXM-80", "requests at a time"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- allocator -->" not in drawn  # transformers alone has that part
    assert "<!-- H200-SXM -->" not in drawn


@needs_matplotlib
@pytest.mark.parametrize("name", ["gone/memory.png", "memory.foo"])
def test_plot_that_cannot_be_written_is_an_error(tmp_path: Path, name: str) -> None:
    done = gpuperf("memory", "--model", "gpt2", "--plot", str(tmp_path / name))
    assert done.code == 1
    assert done.errors.startswith(f"gpuperf: The plot cannot be written to {tmp_path / name}: ")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpuperf.report.memory.importlib.util.find_spec", lambda _name: None)
    done = gpuperf("memory", "--model", "gpt2", "--plot", "memory.png")
    assert done.code == 1
    assert "--plot needs matplotlib: pip install 'pytest-gpuperf[report]'" in done.errors
