"""Sizes: large enough to fill a GPU, small enough for a laptop's CPU."""

from pathlib import Path

import pytest

from pytest_gpuperf.plugin import device_kind, settings_key

MATMUL_SIZES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (256, 512)}
BUFFER_BYTES = {"cuda": 2**30, "cpu": 2**26}
LLMS = {"cuda": ("llama-3-8b",), "cpu": ("tiny",)}
BATCH_SIZES = {"cuda": (1, 4, 8, 16, 32, 64, 128, 256), "cpu": (1, 2, 4, 8)}
#: Of the prompt, and of the answer.
TOKENS = {"cuda": 128, "cpu": 16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in sizes and models by what is measured on, and by --gpuperf-model."""
    kind = device_kind(metafunc.config)
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", MATMUL_SIZES[kind])
    if "size_bytes" in metafunc.fixturenames:
        metafunc.parametrize("size_bytes", [BUFFER_BYTES[kind]], ids=[f"{BUFFER_BYTES[kind] // 2**20}MiB"])
    if "model" in metafunc.fixturenames:
        given = metafunc.config.stash[settings_key].model
        models = (given,) if given else getattr(metafunc.module, "MODELS", LLMS)[kind]
        metafunc.parametrize("model", models, ids=[Path(model).name for model in models])
    if "batch_sizes" in metafunc.fixturenames:
        metafunc.parametrize("batch_sizes", [BATCH_SIZES[kind]], ids=[f"1-{BATCH_SIZES[kind][-1]}"])
    if "tokens" in metafunc.fixturenames:
        metafunc.parametrize("tokens", [TOKENS[kind]], ids=[f"{TOKENS[kind]}-tokens"])
