"""The calculator's weights against the layers that the installed vLLM builds, to the byte. A CPU build of it will do.

    python benchmarks/llm/memory_layers.py [--gpus 1,2,8] [MODEL ...]

Layers are built on the meta device, as the first of so many ranks: vLLM asks its tensor-parallel group for the number,
and that alone is changed, so no second process is needed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pytest_gpuperf.analysis.memory import Use
from pytest_gpuperf.analysis.memory_parts import refuse_impossible, vllm_weight_bytes
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.workloads.models import model_folder, presets

_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def layers_bytes(folder: Path, gpus: int) -> int:
    """Parameters and the rotary table of one rank; a tensor that two modules share counts once."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
        distributed_executor_backend="uni",
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
        parallel_state.get_tp_group().world_size = gpus
        rotary_embedding._ROPE_DICT.clear()  # noqa: SLF001 - shared by all models of a process, so it would count once
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model: Any = initialize_model(config)
        torch.set_default_dtype(torch.float32)
    rotary = {id(buffer): buffer for name, buffer in model.named_buffers() if name.endswith("cos_sin_cache")}
    tensors = {**{id(parameter): parameter for parameter in model.parameters()}, **rotary}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def is_equal(model: str, gpus: int, root: Path) -> bool:
    """Compare one model on one of so many GPUs, and print it; what cannot be divided so is equal."""
    shape, use = presets()[model], Use(sequence_tokens=16, gpus=gpus)
    try:
        refuse_impossible(shape, use)
    except UsageError as error:
        print(f"{model:<15} {gpus}  {error}", flush=True)
        return True
    ours, theirs = vllm_weight_bytes(shape, use), layers_bytes(model_folder(model, root), gpus)
    said = "equal" if ours == theirs else f"{ours - theirs:+} B"
    print(f"{model:<15} {gpus}  vLLM {theirs:>15,}  ours {ours:>15,}  {said}", flush=True)
    return ours == theirs


def main() -> int:
    """Compare, a line a model and number of GPUs; exit code 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*presets()])
    parser.add_argument("--gpus", default="1,2,8")
    options = parser.parse_args()
    os.environ.update({**_ENVIRONMENT, **_QUIET})
    numbers = [int(number) for number in options.gpus.split(",")]
    with tempfile.TemporaryDirectory() as root:
        found = [is_equal(model, gpus, Path(root)) for model in options.models for gpus in numbers]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
