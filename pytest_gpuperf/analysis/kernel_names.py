"""Names of kernels: short enough to be read, and what they give away about how a library computes."""

import re

_LONGEST = 60
#: torch names the operation of a generic kernel in the template's arguments: a functor, or a lambda's function.
_OPERATION = re.compile(r"\b(\w*Functor\w*|\w+_functor|\w+Ops?|\w+_kernel(?:_cuda|_impl)?(?=\(at::Tensor))\b")
#: Heads that say nothing: the template's first argument is the kernel.
_GENERIC = re.compile(r"(?:^|::)(?:Kernel2?|device_kernel|kernel)<\s*([\w:]+)")
_WRAPPERS = frozenset({"AUnaryFunctor", "BUnaryFunctor", "BinaryFunctor", "UnaryFunctor", "BUnaryFunctorOnSelf"})
#: What a name shows -> what it means; the first that is found counts.
_TRAITS = (
    (re.compile(r"tf32"), "tf32 tensor cores"),
    (re.compile(r"(?:^|_)sgemm|f32f32_f32f32|simt_sgemm|_ffma_"), "fp32 without tensor cores"),
    (re.compile(r"align1\b"), "operands aligned to 1 element"),
    (re.compile(r"align2\b"), "operands aligned to 2 elements"),
    (re.compile(r"splitK|split_k|splitk", re.IGNORECASE), "split over K"),
    (re.compile(r"e4m3|e5m2|fp8"), "fp8"),
)
#: torch.compile numbers the kernels of a graph in their order: one more at its beginning renames all.
_NUMBER = re.compile(r"^(triton_\w+?)_\d+$")
#: Products of matrices, by cuBLAS, cuBLASLt, CUTLASS, Triton (`triton_tem_fused_addmm_2`, `matmul_kernel`) and others.
_PRODUCT = re.compile(
    r"gemm|nvjet|cutlass|xmma|wgmma|splitk|gemv|matmul|(?<![a-z])(?:add|badd)?b?mm(?![a-z])", re.IGNORECASE
)


def short_name(name: str) -> str:
    """Cut a kernel's name to what tells it from others, at most 60 characters.

    >>> short_name("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>(int)")
    'vectorized_elementwise_kernel (CUDAFunctor_add)'
    >>> short_name("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32")
    'sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32'
    """
    if _is_transfer(name):
        return name
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    inner = _GENERIC.match(plain) or _GENERIC.search(plain.split("(", maxsplit=1)[0])
    head = _without_namespaces(inner[1] if inner else _until_bracket(plain))
    detail = _detail(plain, head)
    text = f"{head} ({detail})" if detail else head
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def trait(name: str) -> str | None:
    """What a kernel's name says of how it computes, such as `tf32 tensor cores`; `None`: nothing that is known."""
    return next((meaning for pattern, meaning in _TRAITS if pattern.search(name)), None)


def is_product(name: str) -> bool:
    """Whether a kernel multiplies matrices."""
    return _PRODUCT.search(name) is not None


def family(name: str) -> str:
    """What kind of work a kernel does, as far as its name tells: kernels of one family may replace each other.

    >>> family("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32")
    'product'
    """
    if is_product(name):
        return "product"
    short = _NUMBER.sub(r"\1", short_name(name))
    return short if _is_transfer(name) else short[:-1].partition(" (")[2] or short


def _is_transfer(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))


def _until_bracket(name: str) -> str:
    return re.split(r"[<(]", name, maxsplit=1)[0].strip() or name


def _without_namespaces(name: str) -> str:
    return name.rsplit("::", 1)[-1]


def _detail(plain: str, head: str) -> str | None:
    """Which operation a generic kernel stands for."""
    found = [match[1] for match in _OPERATION.finditer(plain)]
    return next((name for name in found if name != head and name not in _WRAPPERS), None)
