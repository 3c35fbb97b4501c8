"""What a test and those who work for it hold: the host on demand, and the lock where a child measures."""

import sys
from pathlib import Path

import pytest
from harness import CONFIRMING, KERNEL, Suite, assert_readable, statuses_of

from pytest_gpuperf.devices import cpu_device
from pytest_gpuperf.lease import lease, lock_path
from pytest_gpuperf.locks import is_held
from pytest_gpuperf.workloads.vllm_process import HostProcess

HOST = """
from pathlib import Path
from pytest_gpuperf.locks import is_held

def is_host_alone():
    return is_held(Path(os.environ["GPUPERF_LOCK_DIR"]) / "host.lock")

@pytest.mark.gpu(exclusive="host")
def test_alone(gpu):
    assert is_host_alone()

def test_beside_others(gpu):
    assert not is_host_alone()
"""


@pytest.mark.parametrize("options", [(), ("--gpuperf-device=cpu",)], ids=["gpu", "cpu"])
def test_test_may_have_the_host_to_itself(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    conftest = "" if options else Suite().conftest
    Suite(files={"test_suite.py": HOST}, conftest=conftest, options=options).run(pytester).assert_outcomes(passed=2)


def test_unknown_word_for_what_is_exclusive_is_named(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": f"@pytest.mark.gpu(exclusive='node'){KERNEL}"}).run(pytester)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*exclusive='node' in @gpu of test_kernel is not 'gpu' (*) or 'host' (*).*"])
    assert_readable(result)


#: Notes what the test holds in this process, and in the fresh one that confirms it.
INHERITING = """
from pathlib import Path
from pytest_gpuperf.plugin import lease_key
from pytest_gpuperf.locks import is_held

@pytest.mark.gpu(exclusive="host")
def test_kernel(gpu_benchmark, request):
    locks = [os.fstat(one).st_ino for one in request.node.stash[lease_key].descriptors]
    folder = Path(os.environ["GPUPERF_LOCK_DIR"])
    files = [path.name[:6] for path in sorted(folder.iterdir()) if path.stat().st_ino in locks]
    is_passed_on = any(map(os.get_inheritable, request.node.stash[lease_key].descriptors))
    with open("held", "a") as file:
        print(*files, is_passed_on, is_held(folder / "host.lock"), fork_holds(locks), file=file)
    gpu_benchmark(lambda: TIME_S)

def fork_holds(locks):
    child = os.fork()  # as the workers of a torch DataLoader are
    if child == 0:
        opened = [path.stat().st_ino for path in Path("/proc/self/fd").iterdir() if path.exists()]
        os._exit(len(set(opened) & set(locks)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_fresh_process_inherits_the_lease_and_passes_it_on_to_nobody_by_itself(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": INHERITING}).in_subprocess().record(pytester)
    (pytester.path / "held").unlink()
    suite.slower().run(pytester, *CONFIRMING)

    assert statuses_of(pytester)["test_kernel time"] == "REGRESSED"
    held = (pytester.path / "held").read_text().splitlines()
    assert len(held) > 1
    assert set(held) == {"device host.l False True 0"}


def test_engine_inherits_the_lease(tmp_path: Path) -> None:
    device = cpu_device()
    with lease([(device,)], folder=tmp_path) as lent:
        process = HostProcess(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            environment={},
            log=tmp_path / "log",
            name="an engine",
            descriptors=lent.descriptors,
        )
    try:
        assert is_held(lock_path(tmp_path, device.uuid))
    finally:
        process.kill()
    assert not is_held(lock_path(tmp_path, device.uuid))


def test_engine_of_a_test_is_given_its_lease(pytester: pytest.Pytester) -> None:
    source = """
from pytest_gpuperf.plugin import lease_key
from pytest_gpuperf.workloads import vllm

class Engine:
    configuration = {"model": "tiny"}

    def __init__(self, config, *, descriptors, **others):
        self.descriptors = descriptors

    def __enter__(self):
        return self

    def close(self):
        return vllm.Teardown(duration_s=0.0)

@pytest.fixture
def engine_class(monkeypatch):
    monkeypatch.setattr(vllm, "Engine", Engine)

def test_generate(engine_class, vllm_engine, request):
    engine = vllm_engine(vllm.EngineConfig(model="tiny"))
    assert engine.descriptors == request.node.stash[lease_key].descriptors
    assert len(engine.descriptors) == 2
"""
    Suite(files={"test_suite.py": source}).run(pytester).assert_outcomes(passed=1)


#: Two GPUs that differ, which torch numbers in the other order, as CUDA does unless it is told not to.
OTHER_ORDER = """
import sys
from types import SimpleNamespace
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, fake_gpu

GPUS = fake_gpu(0, "NVIDIA T400"), fake_gpu(1)

class Torch:
    __version__ = "2.13.0"
    OutOfMemoryError = MemoryError
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        synchronize=lambda _: None,
        empty_cache=lambda: None,
        get_device_properties=lambda index: SimpleNamespace(uuid=GPUS[1 - index].uuid.removeprefix("GPU-")),
    )

def pytest_configure(config):
    config.stash[machine_key] = Machine("auto", nvml=FakeNvml(*GPUS))
    sys.modules["torch"] = Torch
"""


def test_number_that_was_taken_on_another_gpu_than_the_leased_one_is_no_result(pytester: pytest.Pytester) -> None:
    source = "def test_own_clock(perf):\n    perf.record('time', 1.0, unit='s')\n"
    suite = Suite(files={"test_suite.py": source}, conftest=OTHER_ORDER).in_subprocess()
    result = suite.run(pytester, "--gpuperf-anchors=off", "-p", "no:xdist")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*torch's cuda:0 is GPU-00000001-*, the driver's is GPU-00000000-*"])
    result.stdout.fnmatch_lines(["*Set CUDA_DEVICE_ORDER=PCI_BUS_ID so that both count alike.*"])
    assert_readable(result)
