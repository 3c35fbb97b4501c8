"""One worker a GPU under pytest-xdist, each at home on its own, told before anything imports CUDA."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Suite, assert_readable

from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.interop.xdist import give_homes, has_home, say, tell_home, variables_of, worker_count
from pytest_gpuperf.lease import lease
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.testing import FakeNvml, fake_gpu

pytest.importorskip("xdist")
execnet = pytest.importorskip("execnet")

GPUS = tuple(fake_gpu(index) for index in range(3))
UUIDS = [gpu.uuid for gpu in GPUS]
DEVICES = find_devices(FakeNvml(*GPUS), cuda_visible_devices=None)

#: Three fake GPUs, there as early as real ones.
THREE = """
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import fake_gpu, fake_machine

def pytest_load_initial_conftests(early_config):
    early_config.stash[machine_key] = fake_machine(*map(fake_gpu, range(3)))
"""

#: What each test sees of CUDA, at its import and when it runs.
SEEN = """
AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")

def note(name, devices):
    with open("seen", "a") as file:
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        held = "+".join(str(int(device.uuid[4:12], 16)) for device in devices)
        print(name, worker, held, devices[0].device, AT_IMPORT, file=file, sep="|")
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variables of a host where nothing is assigned, and locks of our own."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTEST_XDIST_AUTO_NUM_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))


def machine_with(*gpus: Any, choice: Any = "auto") -> Machine:
    return Machine(choice, nvml=FakeNvml(*gpus))


def config(numprocesses: object = "auto", device: str = "auto", *, is_off: bool = False) -> Any:
    option = SimpleNamespace(numprocesses=numprocesses, gpuperf_device=device, gpuperf_disable=is_off)
    end = ExitStack()
    return SimpleNamespace(option=option, stash=pytest.Stash(), add_cleanup=end.callback, end=end.close)


def never() -> Machine:
    raise AssertionError("the driver was asked")


# How many


def test_auto_is_one_worker_a_gpu() -> None:
    assert worker_count(config(), lambda: machine_with(*GPUS)) == 3


def test_auto_counts_the_gpus_that_this_run_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert worker_count(config(), lambda: machine_with(*GPUS)) == 2


@pytest.mark.parametrize(
    "asked", [config("logical"), config(4), config(None), config(device="cpu"), config(is_off=True)]
)
def test_what_else_is_asked_for_is_left_alone_and_the_driver_too(asked: Any) -> None:
    assert worker_count(asked, never) is None


def test_a_number_of_workers_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "7")
    assert worker_count(config(), never) is None


def test_without_a_gpu_the_workers_are_as_many_as_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker_count(config(), lambda: machine_with(*GPUS)) is None
    lost = Machine("auto", nvml=FakeNvml(errors={1: DeviceError("GPU 0 is lost")}))
    assert worker_count(config(), lambda: lost) is None


# Who is at home where


def specs(*texts: str) -> list[Any]:
    return [execnet.XSpec(text) for text in texts]


def homes(*texts: str, machine: Machine | None = None, run: Any = None) -> list[str | None]:
    """What each worker sees; the run ends at once, unless it is given."""
    workers, controller = specs(*texts), run or config()
    give_homes(controller, workers, machine or machine_with(*GPUS))
    if run is None:
        controller.end()
    return [worker.env.get("CUDA_VISIBLE_DEVICES") for worker in workers]


def test_each_worker_has_a_home_and_sees_the_other_gpus_behind_it() -> None:
    a, b, c = UUIDS
    assert homes("popen", "popen", "popen", "popen") == [f"{a},{b},{c}", f"{b},{c},{a}", f"{c},{a},{b}", f"{a},{b},{c}"]
    assert variables_of(DEVICES, DEVICES[1])["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_gpu_that_is_held_becomes_a_home_last() -> None:
    with lease([DEVICES[:1]]):
        assert [text[:12] for text in homes("popen", "popen", "popen") if text] == [
            "GPU-00000001",
            "GPU-00000002",
            "GPU-00000000",
        ]


def test_runs_at_the_same_time_have_homes_of_their_own_while_there_are_some() -> None:
    first, second, third = config(), config(), config()
    assert [(text or "")[:12] for text in homes("popen", run=first)] == ["GPU-00000000"]
    assert [(text or "")[:12] for text in homes("popen", "popen", "popen", run=second)] == [
        "GPU-00000001",
        "GPU-00000002",
        "GPU-00000000",  # the other run's: three workers want three GPUs
    ]
    assert [(text or "")[:12] for text in homes("popen", run=third)] == ["GPU-00000000"]  # nothing is left
    for run in (first, second, third):
        run.end()
    assert [(text or "")[:12] for text in homes("popen")] == ["GPU-00000000"]


def test_mig_instances_are_homes_like_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0,MIG-1")
    whole = fake_gpu(0, mig_enabled=True)
    parts = [fake_gpu(i, uuid=f"MIG-{i}abc") for i in range(2)]
    machine = Machine("auto", nvml=FakeNvml(whole, instances={whole.uuid: parts}))
    assert worker_count(config(), lambda: machine) == 2
    assert homes("popen", "popen", machine=machine) == ["MIG-0abc,MIG-1abc", "MIG-1abc,MIG-0abc"]


@pytest.mark.parametrize("text", ["ssh=host", "socket=host:1", "popen//via=gw0", "popen//env:CUDA_VISIBLE_DEVICES=1"])
def test_a_worker_elsewhere_or_set_by_the_user_is_left_alone(text: str) -> None:
    [worker] = specs(text)
    before = dict(worker.env)
    give_homes(config(), [worker], machine_with(*GPUS))
    assert worker.env == before


def test_where_there_is_no_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert homes("popen") == [None]


def test_a_lock_folder_that_is_none_leaves_the_complaint_to_the_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "file"))
    assert homes("popen") == [",".join(UUIDS)]


def test_a_worker_knows_its_home_when_it_replaces_one_that_died() -> None:
    controller, [ours, theirs] = config(), specs("popen", "popen//env:CUDA_VISIBLE_DEVICES=1")
    give_homes(controller, [ours, theirs], machine_with(*GPUS))
    told = []
    for spec in (ours, theirs, ours):
        node = SimpleNamespace(workerinput={}, gateway=SimpleNamespace(spec=spec))
        tell_home(controller, node)
        told.append(has_home(SimpleNamespace(workerinput=node.workerinput)))  # type: ignore[arg-type]
    assert told == [True, False, True]
    assert not has_home(SimpleNamespace())  # type: ignore[arg-type]


# As its user


def suite(source: str, *options: str) -> Suite:
    files = {"test_suite.py": SEEN + source, "early.py": THREE}
    return Suite(files=files, conftest="", options=("-p", "early", *options), is_subprocess=True)


def seen(pytester: pytest.Pytester) -> list[list[str]]:
    return [line.split("|") for line in (pytester.path / "seen").read_text().splitlines()]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pytester.path), os.environ.get("PYTHONPATH", "")]))
    return lambda source, *options: suite(source, *options).run(pytester)


ONE_AND_TWO = """
import time

@pytest.mark.parametrize("n", range(9))
def test_one(gpus, n):
    note("one", gpus)
    time.sleep(0.05)

@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("n", range(3))
def test_two(gpus, n):
    note("two", gpus)
"""


def test_n_auto_starts_a_worker_a_gpu_and_each_test_of_one_gpu_stays_at_home(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]
) -> None:
    result = run(ONE_AND_TWO, "-n", "auto", "--dist", "each")
    rows = seen(pytester)

    result.assert_outcomes(passed=3 * 12)
    assert {(row[1], row[2]) for row in rows if row[0] == "one"} == {("gw0", "0"), ("gw1", "1"), ("gw2", "2")}
    assert all(row[3] == "cuda:0" for row in rows if row[0] == "one")
    assert all(row[2].startswith(row[1][2:]) for row in rows if row[0] == "two" and row[3] == "cuda:0")
    for row in rows:
        home = int(row[1][2:])
        assert row[4].split(",") == [*UUIDS[home:], *UUIDS[:home]]  # when the test's module was imported
    assert_readable(result)


HOME_IS_BUSY = """
import threading
from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.lease import lease
from pytest_gpuperf.testing import FakeNvml, fake_gpu

HOME = find_devices(FakeNvml(*map(fake_gpu, range(3))), cuda_visible_devices=AT_IMPORT)[:1] if AT_IMPORT else ()

@pytest.fixture
def busy():
    other = lease([HOME])
    other.__enter__()
    timer = threading.Timer(0.5, lambda: other.__exit__(None, None, None))
    timer.start()
    yield
    timer.join()

def test_one(busy, gpus):
    note("one", gpus)
"""


def test_a_worker_whose_home_is_busy_waits_for_it_and_takes_no_other(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]
) -> None:
    run(HOME_IS_BUSY, "-n", "2", "--dist", "each").assert_outcomes(passed=2)
    assert {(row[1], row[2]) for row in seen(pytester)} == {("gw0", "0"), ("gw1", "1")}


def test_n_auto_works_where_a_conftest_loads_the_plugin(pytester: pytest.Pytester) -> None:
    suite = Suite(
        files={"test_suite.py": "def test_a(): pass\n"},
        conftest="pytest_plugins = ['pytest_gpuperf.plugin']\n",
        environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        is_subprocess=True,
    )
    result = suite.run(pytester, "-p", "xdist", "-n", "auto", "--maxprocesses", "1")
    result.assert_outcomes(passed=1)
    assert_readable(result)


def test_the_driver_is_not_asked_where_there_is_no_worker(pytester: pytest.Pytester) -> None:
    source = "import sys\ndef test_gpus():\n    assert 'pynvml' not in sys.modules\n"
    suite = Suite(files={"test_suite.py": source}, conftest="").in_subprocess()
    suite.run(pytester, "-p", "no:benchmark").assert_outcomes(passed=1)


#: Four GPUs that the driver shows to everybody.
DRIVER = """
from pytest_gpuperf import machine
from pytest_gpuperf.testing import FakeNvml, fake_gpu

machine.open_nvml = lambda: FakeNvml(*map(fake_gpu, range(4)))
"""


def test_slurm_narrows_what_cuda_shows_before_a_conftest_is_loaded(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pytester.path), os.environ.get("PYTHONPATH", "")]))
    source = "def test_a(gpus):\n    note('a', gpus)\n    assert os.environ['CUDA_DEVICE_ORDER'] == 'PCI_BUS_ID'\n"
    conftest = "import os\nassert os.environ['CUDA_VISIBLE_DEVICES'].startswith('GPU-00000001')\n"
    suite = Suite(
        files={"test_suite.py": SEEN + source, "early.py": DRIVER},
        conftest=conftest,
        options=("-p", "early"),
        environment={"SLURM_JOB_GPUS": "1"},
        is_subprocess=True,
    )
    suite.run(pytester).assert_outcomes(passed=1)
    assert seen(pytester) == [["a", "None", "1", "cuda:0", UUIDS[1]]]


def test_an_entry_that_ends_the_list_is_named_by_the_skip(pytester: pytest.Pytester) -> None:
    source = "@pytest.mark.gpu(count=2)\ndef test_two(gpus): pass\n"
    one = Suite(files={"test_suite.py": source}, environment={"CUDA_VISIBLE_DEVICES": "0,5"})
    one.run(pytester, "-rs").stdout.fnmatch_lines(
        ["*entry 2, '5', ends the list: there is no such GPU here, only GPU 0*"]
    )


def test_an_entry_that_leaves_no_gpu_is_named_once(pytester: pytest.Pytester) -> None:
    one = Suite(environment={"CUDA_VISIBLE_DEVICES": "0,0"})
    result = one.run(pytester, "--gpuperf-require-gpu")
    result.assert_outcomes(errors=1)
    [line] = [line for line in result.stdout.lines if line.startswith("test_kernel: ")]
    assert line.count("names a GPU a second time") == 1


# Words while a test waits

LONG = """
from pytest_gpuperf import lease
lease.FIRST_WORD_S = 0.1
lease.TIMEOUT_S = 30

def test_waits(gpu):
    pass
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "worker"])
def test_a_long_wait_is_told_through_the_capture(
    pytester: pytest.Pytester, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    locks = pytester.path / ".locks"
    locks.mkdir()
    holder = lease([DEVICES[:1]], folder=locks)
    holder.__enter__()
    timer = threading.Timer(3.0, lambda: holder.__exit__(None, None, None))
    timer.start()
    result = Suite(files={"test_suite.py": LONG}).in_subprocess().run(pytester, *options)
    timer.join()
    result.assert_outcomes(passed=1)
    told = [line for line in result.stderr.lines if line.startswith("gpuperf: test_suite.py::test_waits has waited ")]
    assert len(told) == 1
    assert re.search(rf"s for NVIDIA H100 80GB HBM3: held by pid {os.getpid()} \(", told[0])


def test_a_line_is_said_where_nothing_captures(capsys: pytest.CaptureFixture[str]) -> None:
    manager = SimpleNamespace(get_plugin={}.get)
    say(SimpleNamespace(pluginmanager=manager), "a line")  # type: ignore[arg-type]
    assert capsys.readouterr().err == "a line\n"
