"""Sizes: large enough to fill a GPU, small enough for a laptop's CPU."""

import pytest

from pytest_gpuperf.plugin import device_kind

MATMUL_SIZES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (256, 512)}
BUFFER_BYTES = {"cuda": 2**30, "cpu": 2**26}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in `n` and `size_bytes` by what is measured on."""
    kind = device_kind(metafunc.config)
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", MATMUL_SIZES[kind])
    if "size_bytes" in metafunc.fixturenames:
        metafunc.parametrize("size_bytes", [BUFFER_BYTES[kind]], ids=[f"{BUFFER_BYTES[kind] // 2**20}MiB"])
