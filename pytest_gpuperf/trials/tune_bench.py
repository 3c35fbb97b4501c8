"""What `gpuperf tune` runs on: a device, an installed vLLM, engines started on it."""

import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.lease import Lease
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.trials.tune import PAIRS, Bench, Now, RunningEngine, engine_config
from pytest_gpuperf.trials.tune_file import plan_in
from pytest_gpuperf.trials.tune_plan import Kind, Plan, Settings, check_factors
from pytest_gpuperf.workloads.models import shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import Engine
from pytest_gpuperf.workloads.vllm_environment import installed_version

#: Twice as many requests as the most that any level runs at once; 10 s and more of an 8-billion model on an H100.
LOADS: dict[Kind, Load] = {
    "cuda": Load(requests=2048, prompt_tokens=128, output_tokens=128),
    "cpu": Load(requests=16, prompt_tokens=32, output_tokens=32),
}


class Wanted(Record, frozen=True, kw_only=True):
    """What the command line asks for; `None`: what suits the device.

    Attributes:
        model: A preset or a folder.
        requests: Of a measurement.
        prompt_tokens: Of a request.
        output_tokens: Of a request.
        repeats: That count.
        pairs: Of default and best.
        factors: To vary; none: all.
        is_full: All combinations of all levels.
        budget_s: Seconds for everything; `None`: no limit.
        timeout_s: Of one repeat.
    """

    model: str
    requests: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    repeats: int = 3
    pairs: int = PAIRS
    factors: tuple[str, ...] = ()
    is_full: bool = False
    budget_s: float | None = None
    timeout_s: float = 600.0


def machine_of(choice: str) -> Machine:
    """Return the machine as `--device` wants it.

    Raises:
        UsageError: There is no such choice.
    """
    known: dict[str, Literal["auto", "cuda", "cpu"]] = {"auto": "auto", "cuda": "cuda", "cpu": "cpu"}
    if choice not in known:
        raise UsageError(f"--device {choice} does not exist. Valid: {', '.join(known)}.")
    return Machine(known[choice])


def check_wanted(wanted: Wanted, kind: Kind) -> Load:
    """Find mistakes before any engine is started; return what every measurement generates.

    Raises:
        UsageError: An unknown model or factor, a number that makes no sense, a sequence that the model cannot hold.
    """
    shape = shape_of(wanted.model)
    check_factors(wanted.factors, kind)
    if wanted.repeats < 1 or wanted.pairs < 0:
        raise UsageError(f"--repeats {wanted.repeats} --pairs {wanted.pairs}: need 1 repeat or more, 0 pairs or more.")
    for name, seconds in (("budget", wanted.budget_s), ("timeout", wanted.timeout_s)):
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"--{name} {seconds:g} is not a number of seconds above zero.")
    usual, counts = LOADS[kind], {}
    for name in ("requests", "prompt_tokens", "output_tokens"):
        count = getattr(wanted, name)
        counts[name] = getattr(usual, name) if count is None else count
        if counts[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {count}: at least 1 is needed.")
    load = Load(**counts)
    tokens = load.prompt_tokens + load.output_tokens
    if tokens > shape.max_positions:
        raise UsageError(
            f"{load.prompt_tokens} prompt and {load.output_tokens} output tokens are {tokens}, and {shape.name} "
            f"holds {shape.max_positions:,}. Lower --prompt-tokens or --output-tokens."
        )
    return load


def plan_on(device: Device, wanted: Wanted, load: Load) -> Plan:
    """Return the plan of a tuning on this device, with the vLLM that is installed.

    Raises:
        NotSupported: None is installed, or one for another kind of device.
    """
    return Plan(
        model=wanted.model,
        kind=device.kind,
        device=device.name,
        devices=(device.uuid_hash,),
        vllm=installed_version(device),
        load=load,
        repeats=wanted.repeats,
        factors=check_factors(wanted.factors, device.kind),
        is_full=wanted.is_full,
    )


def default_folder(model: str) -> Path:
    """Return where the points of a model go unless told otherwise."""
    return Path(".gpuperf") / f"tune-{re.sub(r'[^A-Za-z0-9.]+', '-', Path(model).name).lower()}"


def device_sets(devices: Sequence[Device], folder: Path) -> list[tuple[Device, ...]]:
    """Return the devices that would do, each by itself: the one that a tuning in this folder began on, or any.

    Raises:
        UsageError: The folder's points cannot be read.
    """
    before = plan_in(folder)
    same = [device for device in devices if before and (device.uuid_hash,) == before.devices]
    return [(device,) for device in same or devices]


def bench_on(lent: Lease, nvml: Nvml | None, wanted: Wanted, show: Callable[[Now], None]) -> Bench:
    """Return what starts engines on a device, which hold it as long as they live.

    Args:
        lent: One device.
        nvml: The driver's library, or `None`.
        wanted: Names the model.
        show: Is told where the tuning is.
    """
    [device] = lent.devices
    uuids = [device.uuid] if device.kind == "cuda" else []

    def start(settings: Settings) -> AbstractContextManager[RunningEngine]:
        config = engine_config(wanted.model, settings)
        return Engine(config, devices=lent.devices, nvml=nvml, descriptors=lent.descriptors)

    return Bench(
        start=start,
        watch=lambda: Monitor(nvml, uuids),
        clock=time.monotonic,
        show=show,
        timeout_s=wanted.timeout_s,
        device=device.uuid_hash,
    )
