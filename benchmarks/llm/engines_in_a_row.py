"""Does an engine leave the GPU as it found it? Engines one after the other in one process, memory by the driver.

    python benchmarks/llm/engines_in_a_row.py OUT.json [--engines 10] [--model gpt2]

Each generates a load and is closed. Prints memory in use before it, while it runs and after it, by NVML, and what is
left of the first engine's beginning; the goal is 100 MiB. Writes OUT.json after every engine.
"""

import argparse
import json
from pathlib import Path

from pytest_gpuperf.machine import Machine
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig

MIB = 2**20
WHEN = ("before", "while it ran", "after")
GOAL_BYTES = 100 * MIB
LOAD = Load(requests=32, prompt_tokens=128, output_tokens=32)


def used_bytes(machine: Machine) -> int:
    """Memory in use on the first GPU, by all processes."""
    assert machine.nvml is not None, machine.gpu_problem
    found = machine.nvml.state(machine.gpus[0].uuid).memory_used_bytes
    assert found is not None
    return found


def main() -> None:
    """Start, use and close the engines, print a line each, and fail if one left more than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engines", type=int, default=10)
    parser.add_argument("--model", default="gpt2")
    given = parser.parse_args()
    machine = Machine("cuda")
    begin_bytes = used_bytes(machine)
    rows: list[dict[str, int]] = []
    for number in range(1, given.engines + 1):
        config = EngineConfig(model=given.model, max_model_len=512, enforce_eager=True)
        with Engine(config, devices=machine.devices, nvml=machine.nvml) as engine:
            rate = engine.generate(LOAD).output_tokens_per_s
            during_bytes = used_bytes(machine)
        left = engine.close()
        before, after = left.before_bytes[0], left.after_bytes[0]
        rows.append({"before_bytes": before, "during_bytes": during_bytes, "after_bytes": after})
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
        memory = ", ".join(f"{one / MIB:.0f} MiB {when}" for when, one in zip(WHEN, rows[-1].values(), strict=True))
        times = f"load {engine.load_time_s:.1f} s, close {left.duration_s:.1f} s"
        print(f"engine {number:2}: {memory}; {times}; {rate:.0f} tok/s {left.problem or ''}", flush=True)
    most = max(row["after_bytes"] for row in rows) - begin_bytes
    print(f"left at most {most / MIB:.0f} MiB of {given.engines} engines, {GOAL_BYTES / MIB:.0f} MiB allowed")
    raise SystemExit(most > GOAL_BYTES)


if __name__ == "__main__":
    main()
