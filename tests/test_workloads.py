"""Workloads: they compute what they say, count what they do, and refuse what does not run or does not fit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pytest_gpuperf import workloads
from pytest_gpuperf.errors import NotSupported, UsageError
from pytest_gpuperf.workloads import Workload, require_free_memory
from pytest_gpuperf.workloads.bandwidth import HostTransfer, MemoryBandwidth
from pytest_gpuperf.workloads.matmul import DTYPES, Matmul, _operands, memory_bytes

torch = pytest.importorskip("torch")

N = 48
#: Relative error of a product of normal numbers: the type's rounding, and for small types that of the result.
ERRORS = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 1e-5, "float8": 5e-2, "int8": 0.0}


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let every device have this much free memory."""

    def set_free(value: float) -> None:
        monkeypatch.setattr(workloads, "_free_bytes", lambda _: value)

    return set_free


def reference(dtype: str, *, depth: int = N) -> Any:
    """The same operands, multiplied in float64."""
    a, b = _operands(N, depth, dtype, "cpu", torch.Generator("cpu").manual_seed(0))
    return a.to(torch.float64).numpy() @ b.to(torch.float64).numpy()


def product(work: Matmul) -> Any:
    result = work()
    assert isinstance(result, torch.Tensor)
    return result.to(torch.float64).numpy()


def supported(dtype: str, *, slowdown: float = 0.0) -> Matmul:
    try:
        return Matmul(N, dtype=dtype, device="cpu", slowdown=slowdown)
    except NotSupported as error:
        pytest.skip(str(error))


# Matmul


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("slowdown", [0.0, 1 / 3])
def test_a_matmul_multiplies(dtype: str, slowdown: float) -> None:
    work = supported(dtype, slowdown=slowdown)
    expected = reference(dtype, depth=round(N * (1 + slowdown)))
    error = np.abs(product(work) - expected).max() / np.abs(expected).max()
    assert error <= ERRORS[dtype]


@pytest.mark.parametrize("dtype", ERRORS)
def test_a_matmul_gives_the_same_each_time(dtype: str) -> None:
    work = supported(dtype)
    first = product(work).copy()
    assert np.array_equal(first, product(work))


def test_the_operands_are_normal_numbers_and_no_zeros() -> None:
    for operand in _operands(256, 256, "float32", "cpu", torch.Generator("cpu").manual_seed(0)):
        assert abs(float(operand.mean())) < 0.02
        assert float(operand.std()) == pytest.approx(1.0, abs=0.02)


def test_every_dtype_is_tried_here() -> None:
    assert {*ERRORS, "tf32"} == set(DTYPES)


@pytest.mark.parametrize("n", [16, 48])
def test_a_matmul_counts_two_n_cubed(n: int) -> None:
    work = Matmul(n, dtype="float32", device="cpu")
    assert work.flop == 2 * n * n * n
    assert (work.bytes_moved, work.dtype, work.kind, work.mode) == (None, "float32", "compute", "sustained")


@pytest.mark.parametrize(("slowdown", "depth"), [(0.0, 48), (1 / 3, 64), (2 / 3, 80), (1.0, 96)])
def test_a_slowdown_makes_the_sums_longer_and_counts_nothing_more(
    slowdown: float, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    matmul = torch.matmul

    def watched(a: Any, b: Any, *, out: Any) -> Any:
        shapes.append((*a.shape, *b.shape))
        return matmul(a, b, out=out)

    monkeypatch.setattr(torch, "matmul", watched)
    work = Matmul(N, dtype="float32", device="cpu", slowdown=slowdown)
    work()
    assert set(shapes) == {(N, depth, depth, N)}
    assert work.flop == 2 * N**3


def test_the_memory_of_a_product_is_that_of_two_operands_and_a_result() -> None:
    sizes = {dtype: memory_bytes(1000, dtype) for dtype in DTYPES}
    assert sizes == {
        "float16": 6_000_000,
        "bfloat16": 6_000_000,
        "float32": 12_000_000,
        "tf32": 12_000_000,
        "float8": 4_000_000,
        "int8": 6_000_000,
    }


def test_a_dtype_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        Matmul(N, dtype="float13", device="cpu")
    assert str(error.value) == (
        "Matmul knows no dtype 'float13'. Valid: float16, bfloat16, float32, tf32, float8, int8."
    )


def test_tf32_does_not_exist_on_a_cpu() -> None:
    with pytest.raises(NotSupported, match=r"^tf32 is a mode of GPUs: on a CPU it is float32\.$"):
        Matmul(N, dtype="tf32", device="cpu")


def test_a_product_that_the_device_cannot_do_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("addmm_impl_cpu_ not implemented for 'Half'\nwith a second line")

    monkeypatch.setattr(torch, "matmul", refuse)
    with pytest.raises(NotSupported) as error:
        Matmul(N, dtype="float16", device="cpu")
    assert str(error.value) == (
        "float16 matrix products do not run on cpu here: addmm_impl_cpu_ not implemented for 'Half'"
    )


def test_running_out_of_memory_is_no_matter_of_support(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(torch, "matmul", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        Matmul(N, dtype="float16", device="cpu")


def test_matrices_that_do_not_fit_are_refused_with_both_numbers(free_bytes: Callable[[float], None]) -> None:
    free_bytes(1e9)
    with pytest.raises(NotSupported) as error:
        Matmul(16384, dtype="float32", device="cpu")
    needed_gb = (1.5 * 3 * 4 * 16384**2 + 2e8) / 1e9
    assert str(error.value) == f"float32 matmul of 16384 needs {needed_gb:.2f} GB, and 1.00 GB are free on cpu."


# Memory


def test_what_just_fits_is_allowed(free_bytes: Callable[[float], None]) -> None:
    free_bytes(1e9)
    require_free_memory(1e9, device="cpu", what="all of it")
    with pytest.raises(NotSupported):
        require_free_memory(1e9 + 1, device="cpu", what="a byte more")


def test_the_free_memory_of_this_machine_is_known() -> None:
    assert 2**20 < workloads._free_bytes("cpu") < 2**50


# Bandwidth


@pytest.mark.parametrize(("direction", "factor"), [("copy", 2), ("read", 1), ("write", 1)])
@pytest.mark.parametrize("size_bytes", [4096, 4098])
def test_bytes_are_counted_once_in_each_direction(direction: Any, factor: int, size_bytes: int) -> None:
    work = MemoryBandwidth(direction, size_bytes=size_bytes, device="cpu")
    assert work.bytes_moved == 4096 * factor
    assert (work.flop, work.dtype, work.kind, work.mode) == (None, None, "memory", "cold")


def test_a_copy_copies() -> None:
    work = MemoryBandwidth("copy", size_bytes=4096, device="cpu")
    result = work()
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, torch.randn(1024, generator=torch.Generator().manual_seed(0)))


def test_a_read_sums_all_that_it_reads() -> None:
    result = MemoryBandwidth("read", size_bytes=4096, device="cpu")()
    assert isinstance(result, torch.Tensor)
    source = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    assert float(result) == pytest.approx(float(source.sum()), rel=1e-4)


def test_a_write_fills_the_buffer() -> None:
    result = MemoryBandwidth("write", size_bytes=4096, device="cpu")()
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, torch.ones(1024))


@pytest.mark.parametrize("direction", ["copy", "write"])
def test_a_slowdown_moves_more_bytes_and_counts_nothing_more(direction: Any) -> None:
    work = MemoryBandwidth(direction, size_bytes=4000, device="cpu", slowdown=0.05)
    result = work()
    assert isinstance(result, torch.Tensor)
    assert result.numel() == 1050
    assert work.bytes_moved == 4000 * (2 if direction == "copy" else 1)


def test_a_direction_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        MemoryBandwidth("sideways", size_bytes=4096, device="cpu")  # type: ignore[arg-type]
    assert str(error.value) == "MemoryBandwidth knows no direction 'sideways'. Valid: copy, read, write."


def test_a_direction_that_does_not_exist_is_a_mistake_however_large_the_buffer(
    free_bytes: Callable[[float], None],
) -> None:
    free_bytes(1e6)
    with pytest.raises(UsageError):
        MemoryBandwidth("sideways", size_bytes=10**9, device="cpu")  # type: ignore[arg-type]


def test_a_buffer_that_does_not_fit_is_refused_with_both_numbers(free_bytes: Callable[[float], None]) -> None:
    free_bytes(2e9)
    with pytest.raises(NotSupported) as error:
        MemoryBandwidth("copy", size_bytes=10**9, device="cpu")
    assert str(error.value) == "copy of 1.0 GB needs 2.20 GB, and 2.00 GB are free on cpu."


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_direction_with_one_buffer_needs_the_memory_of_one(
    direction: Any, free_bytes: Callable[[float], None]
) -> None:
    free_bytes(6000.0)
    MemoryBandwidth(direction, size_bytes=4096, device="cpu")


@pytest.mark.parametrize("direction", ["host_to_device", "device_to_host"])
def test_a_cpu_has_nothing_to_transfer_to(direction: Any) -> None:
    with pytest.raises(NotSupported) as error:
        HostTransfer(direction, size_bytes=4096, device="cpu", pinned=False)
    assert str(error.value) == f"{direction} needs a GPU: on a CPU there is nothing to cross."


def test_a_transfer_in_an_unknown_direction_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        HostTransfer("up", size_bytes=4096, device="cpu", pinned=False)  # type: ignore[arg-type]
    assert str(error.value) == "HostTransfer knows no direction 'up'. Valid: device_to_host, host_to_device."


@pytest.mark.parametrize(("pinned", "kind"), [(True, "transfer"), (False, "host")])
def test_a_transfer_through_pageable_memory_is_a_matter_of_the_host(
    pinned: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which needs a GPU
    work = HostTransfer("host_to_device", size_bytes=4098, device="meta", pinned=pinned)
    assert (work.kind, work.mode, work.bytes_moved) == (kind, "cold", 4096)


def test_a_transfer_that_does_not_fit_is_refused(free_bytes: Callable[[float], None]) -> None:
    free_bytes(1e9)
    with pytest.raises(
        NotSupported, match=r"^host_to_device of 1\.0 GB needs 1\.10 GB, and 1\.00 GB are free on cuda:0\."
    ):
        HostTransfer("host_to_device", size_bytes=10**9, device="cuda:0", pinned=True)


@pytest.mark.parametrize(
    "work",
    [
        lambda: Matmul(16, dtype="float32", device="cpu"),
        lambda: MemoryBandwidth("copy", size_bytes=4096, device="cpu"),
    ],
)
def test_a_workload_is_one(work: Callable[[], object]) -> None:
    assert isinstance(work(), Workload)
    assert not isinstance(lambda: None, Workload)


@pytest.mark.parametrize(
    ("message", "is_skipped"),
    [
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`", True),
        ("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0", True),
    ],
)
def test_a_broken_device_fails_the_test_and_only_a_product_that_it_lacks_skips_it(
    monkeypatch: pytest.MonkeyPatch, message: str, is_skipped: bool
) -> None:
    def broken(_: Matmul) -> object:
        raise RuntimeError(message)

    monkeypatch.setattr(Matmul, "__call__", broken)
    with pytest.raises(NotSupported if is_skipped else RuntimeError) as error:
        Matmul(64, dtype="float32", device="cpu")
    assert isinstance(error.value, NotSupported) == is_skipped
