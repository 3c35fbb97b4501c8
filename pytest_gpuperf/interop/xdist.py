"""pytest-xdist: one worker a GPU, each with a home GPU of its own from its first import on.

A worker sees all GPUs of the run with its home first, so that plain `"cuda"` is home. Tests of one GPU stay there:
no worker leaves a CUDA context on the GPU of another.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpuperf.assignment import ORDER, VISIBLE
from pytest_gpuperf.errors import GpuperfError

if TYPE_CHECKING:
    from pytest_gpuperf.devices import Device
    from pytest_gpuperf.machine import Machine

#: The lists of devices that this plugin gave to workers, by which it knows them again.
homes_key = pytest.StashKey[frozenset[str]]()
_HAS_HOME = "gpuperf_has_home"


def worker_count(config: pytest.Config, machine: "Callable[[], Machine]") -> int | None:
    """How many workers `-n auto` starts: one a GPU; `None` leaves it to pytest-xdist.

    Args:
        config: Before `pytest_configure`, with the options as they were written.
        machine: Looked up only if it matters.
    """
    option = config.option
    is_asked = vars(option).get("numprocesses") == "auto" and not os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    if not is_asked or option.gpuperf_disable or option.gpuperf_device == "cpu":
        return None
    return len(_gpus(machine())) or None


def give_homes(config: pytest.Config, specs: Sequence[Any], machine: "Machine") -> None:
    """Give each worker on this host a home GPU; one whose variables the user has set is left alone.

    Args:
        config: Of the controller.
        specs: execnet's, one a worker, whose `env` the worker starts with.
        machine: Of this run.
    """
    from pytest_gpuperf.lease import lock_folder

    gpus = _gpus(machine)
    mine = [one for one in specs if one.popen and not one.via and VISIBLE not in one.env]
    if not gpus or not mine:
        return
    taken = ExitStack()
    config.add_cleanup(taken.close)
    try:
        homes = _homes(gpus, len(mine), lock_folder(), taken)
    except GpuperfError:  # the test that leases will say so
        homes = list(gpus)
    for number, spec in enumerate(mine):
        spec.env |= variables_of(gpus, homes[number % len(homes)])
    config.stash[homes_key] = frozenset(spec.env[VISIBLE] for spec in mine)


def _homes(gpus: "Sequence[Device]", count: int, folder: Path, taken: ExitStack) -> "list[Device]":
    """Order GPUs for workers: those first that are the home of no other run's, and are this run's from now on."""
    from pytest_gpuperf.lease import home_path, is_free
    from pytest_gpuperf.locks import try_lock

    free_first = sorted(gpus, key=lambda gpu: not is_free(gpu, folder))
    ours: list[Device] = []
    for gpu in free_first:
        if len(ours) < count and try_lock(home_path(folder, gpu.uuid), taken) is not None:
            ours.append(gpu)
    return [*ours, *(gpu for gpu in free_first if gpu not in ours)]


def variables_of(gpus: "Sequence[Device]", home: "Device") -> dict[str, str]:
    """Make CUDA show all GPUs, beginning with one and going round.

    >>> variables_of((a, b, c), b)["CUDA_VISIBLE_DEVICES"]  # doctest: +SKIP
    'GPU-b,GPU-c,GPU-a'
    """
    start = gpus.index(home)
    return {VISIBLE: ",".join(gpu.uuid for gpu in (*gpus[start:], *gpus[:start])), ORDER: "PCI_BUS_ID"}


def tell_home(config: pytest.Config, node: Any) -> None:
    """Tell a worker whether it has a home, when it starts or one that died is replaced."""
    node.workerinput[_HAS_HOME] = node.gateway.spec.env.get(VISIBLE) in config.stash.get(homes_key, ())


def has_home(config: pytest.Config) -> bool:
    """Whether this process is a worker whose first GPU is its own."""
    told: Mapping[str, object] = config.__dict__.get("workerinput", {})
    return bool(told.get(_HAS_HOME))


def say(config: pytest.Config, line: str) -> None:
    """Print a line at once, whatever is captured, and from a worker, too."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # none in a worker
    if capture is None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - seen while a test waits
        return
    with capture.global_and_fixture_disabled():
        if reporter is not None:
            reporter.ensure_newline()
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - as above


def _gpus(machine: "Machine") -> "tuple[Device, ...]":
    try:
        return machine.gpus
    except GpuperfError:  # a GPU is lost, which the collection will say
        return ()
