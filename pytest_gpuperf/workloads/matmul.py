"""Square matrix products in every precision that the device has."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_gpuperf.errors import NotSupported, UsageError
from pytest_gpuperf.records import Kind, Mode
from pytest_gpuperf.workloads import require_free_memory

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32", "tf32", "float8", "int8")
#: Bytes of one element of an operand, and of the result.
_ELEMENT_BYTES = {
    "float16": (2, 2),
    "bfloat16": (2, 2),
    "float32": (4, 4),
    "tf32": (4, 4),
    "float8": (1, 2),
    "int8": (1, 4),
}


def memory_bytes(n: int, dtype: str) -> int:
    """Bytes of the operands and the result of one product of n x n matrices."""
    operand, result = _ELEMENT_BYTES[dtype]
    return n * n * (2 * operand + result)


class Matmul:
    """C = A B with A, B: [n, n], from a normal distribution with a fixed seed (zeros run 15 % faster).

    Small products rotate over as many operands as fill the last-level cache twice, so that each call finds its operands
    in memory, and no single placement in it decides the time.

    Args:
        n: Rows and columns.
        dtype: `float16`, `bfloat16`, `float32`, `tf32`, `float8` (e4m3, by `torch._scaled_mm`) or `int8`
            (by `torch._int_mm`).
        device: `"cuda:0"`, `"cpu"`, ...
        slowdown: Extra work as a fraction: columns of A and rows of B beyond n, in steps of 16, which keep the fast
            kernels. For planting a slowdown of known size.

    Raises:
        UsageError: An unknown data type.
        NotSupported: The data type does not run on this device, or the matrices do not fit.
    """

    kind: Kind = "compute"
    mode: Mode | None = "sustained"
    bytes_moved = None

    def __init__(self, n: int, *, dtype: str, device: str, slowdown: float = 0.0) -> None:
        import torch

        if dtype not in DTYPES:
            raise UsageError(f"Matmul knows no dtype {dtype!r}. Valid: {', '.join(DTYPES)}.")
        if dtype == "tf32" and not device.startswith("cuda"):
            raise NotSupported("tf32 is a mode of GPUs: on a CPU it is float32.")
        self.n = n
        self.dtype: str | None = dtype
        #: 2 n^3: one multiplication and one addition for each of n^3 terms.
        self.flop: float | None = 2.0 * n**3
        count = _set_count(n, dtype, device)
        # randn fills float32 first where the type is smaller, and the libraries take a workspace
        require_free_memory(1.5 * count * memory_bytes(n, dtype) + 2e8, device=device, what=f"{dtype} matmul of {n}")
        depth = n + round(n * slowdown / 16) * 16
        generator = torch.Generator(device).manual_seed(0)
        sets = [_operands(n, depth, dtype, device, generator) for _ in range(count)]
        self._products = itertools.cycle([_product(dtype, a, b) for a, b in sets])
        self._run_once(dtype, device)

    def __call__(self) -> object:
        """Multiply once."""
        return next(self._products)()

    def _run_once(self, dtype: str, device: str) -> None:
        try:
            self()
        except RuntimeError as error:
            if _is_fault(str(error)):
                raise
            raise NotSupported(f"{dtype} matrix products do not run on {device} here: {error}".split("\n")[0]) from None


def _is_fault(message: str) -> bool:
    """Whether torch reports a broken or full device, which must fail the test, and not a product that it lacks."""
    is_lacking = "CUBLAS_STATUS_NOT_SUPPORTED" in message or "CUBLAS_STATUS_ARCH_MISMATCH" in message
    return "out of memory" in message or ("CUDA error" in message and not is_lacking)


def _set_count(n: int, dtype: str, device: str) -> int:
    import torch

    if not device.startswith("cuda"):
        return 1
    cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return -(-2 * cache_bytes // memory_bytes(n, dtype))


def _operands(
    n: int, depth: int, dtype: str, device: str, generator: "torch.Generator"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """A: [n, depth] and B: [depth, n]."""
    import torch

    if dtype == "int8":
        a = torch.randint(-128, 128, (n, depth), dtype=torch.int8, device=device, generator=generator)
        b = torch.randint(-128, 128, (n, depth), dtype=torch.int8, device=device, generator=generator)
        return a, b.t()  # both kernels of small types want B column by column
    stored = {"tf32": "float32", "float8": "float16"}.get(dtype, dtype)
    a = torch.randn(n, depth, dtype=getattr(torch, stored), device=device, generator=generator)
    b = torch.randn(n, depth, dtype=getattr(torch, stored), device=device, generator=generator)
    if dtype == "float8":
        return a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return a, b.reshape(depth, n)


def _product(dtype: str, a: "torch.Tensor", b: "torch.Tensor") -> Callable[[], object]:
    """The product as a call without arguments; the result's memory is written anew by each."""
    import torch

    if dtype == "int8":
        return lambda: torch._int_mm(a, b)  # noqa: SLF001 - the only integer product that torch has
    if dtype == "float8":
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: SLF001
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    if dtype not in ("float32", "tf32") or a.device.type == "cpu":
        return lambda: torch.matmul(a, b, out=out)
    return lambda: _float32_product(a, b, out, allow_tf32=dtype == "tf32")


def _float32_product(a: "torch.Tensor", b: "torch.Tensor", out: "torch.Tensor", *, allow_tf32: bool) -> object:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return torch.matmul(a, b, out=out)
