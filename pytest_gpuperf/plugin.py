"""Hooks and fixtures for pytest. Each forwards to a function that needs no pytest."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import pytest

from pytest_gpuperf.errors import GpuperfError, NotSupported, UsageError
from pytest_gpuperf.interop.utilisation import SendingHooks, UseLog, ended, while_held
from pytest_gpuperf.options import (
    MARKERS,
    Settings,
    add_options,
    criterion_of,
    read_settings,
    requirement_of,
    silent_verdicts,
)

if TYPE_CHECKING:  # imported where a test measures: a run without such tests does not pay for them
    from pytest_gpuperf.confirm import Order  # noqa: F401 - in the type of order_key
    from pytest_gpuperf.deferred import Deferred
    from pytest_gpuperf.devices import Device
    from pytest_gpuperf.lease import Lease
    from pytest_gpuperf.machine import Machine
    from pytest_gpuperf.monitor import Monitor
    from pytest_gpuperf.recorder import Recorder
    from pytest_gpuperf.records import ClockName, Measurement, Mode, TestKey, TestRecord
    from pytest_gpuperf.report.controller import Controller
    from pytest_gpuperf.run import Run
    from pytest_gpuperf.workloads.vllm import EngineConfig, StartEngine

settings_key = pytest.StashKey[Settings]()
#: Set by a conftest's `pytest_configure` to measure on something else, such as `testing.fake_machine()`.
machine_key = pytest.StashKey["Machine"]()
run_key = pytest.StashKey["Run"]()
recorder_key = pytest.StashKey["Recorder"]()
deferred_key = pytest.StashKey["Deferred"]()
order_key = pytest.StashKey["Order"]()
environment_key = pytest.StashKey[Mapping[str, str]]()
deselected_key = pytest.StashKey[bool]()
lease_key = pytest.StashKey["Lease"]()

_FIXTURES = frozenset({"gpu", "gpus", "gpu_benchmark", "gpu_monitor", "perf"})
_MEASURING = frozenset({"gpu_benchmark", "perf"})
_PACKAGE = str(Path(__file__).parent) + os.sep


class GpuBenchmark(Protocol):
    """The `gpu_benchmark` fixture: measure a callable on the device's clock."""

    def __call__(  # noqa: PLR0913 - all optional; a workload needs none of them
        self,
        call: Callable[[], object],
        *,
        metric: str | None = None,
        flops: float | None = None,
        bytes: float | None = None,  # noqa: A002 - the word that reads best in a test
        dtype: str | None = None,
        mode: "Mode | None" = None,
        clock: "ClockName | None" = None,
        tolerance: float | str | None = None,
    ) -> "Measurement":
        """Measure `call` and return the measurement, not the callable's value.

        Args:
            call: Takes no arguments; works on the current stream of the leased device. A workload such as `Matmul`
                brings the values of `flops`, `bytes`, `dtype` and `mode`.
            metric: Its name; default: `throughput`, `bandwidth` or `time`, by what is counted.
            flops: Floating-point operations of one call; the value is then in FLOP/s.
            bytes: Bytes read plus bytes written by one call; the value is then in B/s.
            dtype: Name of the type whose peak applies, such as `"bfloat16"`.
            mode: `"sustained"`, `"cold"` or `"hot"`; default by duration.
            clock: `"cuda-events"` or `"cuda-graph"`; default by duration.
            tolerance: Largest slowdown accepted: `0.03` or `"3%"`.

        Raises:
            UsageError: A wrong argument, or the metric was recorded before.
            MeasurementError: No work was seen, or more than 102 % of the hardware's peak.
        """
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Narrow what CUDA shows to what a container or Slurm has given us, before anything imports CUDA."""
    from pytest_gpuperf.assignment import may_narrow

    option = early_config.known_args_namespace
    if may_narrow(os.environ) and option.gpuperf_device != "cpu" and not option.gpuperf_disable:
        with suppress(GpuperfError):  # what needs the GPUs will say so
            machine_of(early_config).adopt_assignment(os.environ)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Start one worker a GPU for `-n auto`."""
    from pytest_gpuperf.interop.xdist import worker_count

    return worker_count(config, lambda: machine_of(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Give each worker a home GPU."""
    from pytest_gpuperf.interop.xdist import give_homes

    if not config.option.gpuperf_disable and config.option.gpuperf_device != "cpu":
        give_homes(config, specs, machine_of(config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker that it has one."""
    from pytest_gpuperf.interop.xdist import tell_home

    tell_home(node.config, node)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """In a fresh process that measures some tests again, run these alone."""
    path = os.environ.pop("GPUPERF_ORDER", None)  # a pytest that a test starts is not meant
    if path is None:
        return
    import msgspec

    from pytest_gpuperf.confirm import Order
    from pytest_gpuperf.deferred import confine

    config.stash[order_key] = msgspec.json.decode(Path(path).read_bytes(), type=Order)
    confine(config, config.stash[order_key])


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, read the options, and let the controller alone collect and write."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[settings_key] = read_settings(config)
    config.stash[environment_key] = dict(os.environ)
    if order_key in config.stash and hasattr(config.option, "dist"):
        config.option.dist, config.option.tx = "no", []  # pytest-xdist may have set them after our first word
    config.pluginmanager.register(SendingHooks(), "gpuperf-utilisation")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(ControllerHooks(config), "gpuperf-controller")


def machine_of(config: pytest.Config) -> "Machine":
    """What this process can measure on; made when it is first asked for."""
    if machine_key not in config.stash:
        from pytest_gpuperf.machine import Machine

        settings = config.stash.get(settings_key, None)  # none before pytest_configure
        options = {**vars(config.known_args_namespace), **vars(config.option)}  # the first lack those of a conftest's
        config.stash[machine_key] = Machine(settings.device if settings else options["gpuperf_device"])
    return config.stash[machine_key]


def run_of(config: pytest.Config) -> "Run":
    """What the hooks of this process share; made when the first test that measures is met."""
    if run_key not in config.stash:
        from pytest_gpuperf.interop.xdist import has_home
        from pytest_gpuperf.run import Run

        config.stash[run_key] = Run(
            config.stash[settings_key],
            machine_of(config),
            config.rootpath,
            order=config.stash.get(order_key, None),
            has_home=has_home(config),
        )
    return config.stash[run_key]


def device_kind(config: pytest.Config) -> Literal["cuda", "cpu"]:
    """What tests are measured on, for a `pytest_generate_tests` that chooses sizes by it.

    Raises:
        pytest.UsageError: The devices cannot be looked up.
    """
    machine = run_of(config).machine
    try:
        return "cpu" if machine.is_unusable else machine.devices[0].kind
    except GpuperfError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Find the user's mistakes, and baselines that cannot be read, before GPU time is spent."""
    mine = [item for item in items if _is_mine(item)]
    try:
        for item in mine:
            _refuse_holding_nothing(item, requirement_of(item).exclusive)
            criterion_of(item)
            _refuse_unittest(item)
        if mine and not config.option.collectonly:
            _read_baselines(run_of(config), mine)
    except GpuperfError as error:
        _refuse_run(config, items, str(error))


def _refuse_holding_nothing(item: pytest.Item, exclusive: str) -> None:
    if exclusive == "host" and _FIXTURES.isdisjoint(_fixture_names(item)):
        raise UsageError(
            f"exclusive='host' in @gpu of {item.name} keeps nobody away, because the test holds no device. "
            "Add the fixture gpu to its arguments."
        )


def _refuse_unittest(item: pytest.Item) -> None:
    if type(item).__name__ == "TestCaseFunction" and not _MEASURING.isdisjoint(_fixture_names(item)):
        raise UsageError(
            f"{item.nodeid} is a method of a unittest.TestCase, whose measurements are not judged. "
            "Write it as a function, or as a method of a plain class."
        )


def _refuse_run(config: pytest.Config, items: list[pytest.Item], message: str) -> None:
    """Stop before anything runs. A worker of pytest-xdist cannot raise, so it runs nothing and tells the controller."""
    workeroutput = config.__dict__.get("workeroutput")
    if workeroutput is None:
        raise pytest.UsageError(message) from None
    workeroutput["gpuperf_mistake"] = message
    items.clear()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note that the run is not whole, so that nothing is taken for gone."""
    for config in {item.config for item in items}:
        config.stash[deselected_key] = True
        if "workeroutput" in config.__dict__:
            config.__dict__["workeroutput"]["gpuperf_deselected"] = True


def _read_baselines(run: "Run", items: list[pytest.Item]) -> None:
    """Read every baseline file that the items may be compared with."""
    if run.machine.is_unusable:
        return
    for item in items:
        requirement = requirement_of(item)
        if run.shortfall(requirement) is None:
            devices = run.candidates(requirement)[0]
            run.read_common(devices)
            run.compared += len(run.baselines_of(key_of(item), devices))
    run.notes += [f"{absent.reason} This run goes on without it." for absent in run.machine.absent]


def _is_mine(item: pytest.Item) -> bool:
    marked = any(item.get_closest_marker(name) for name in ("gpu", "perf"))
    return marked or not _FIXTURES.isdisjoint(_fixture_names(item))


def _fixture_names(item: pytest.Item) -> tuple[str, ...]:
    return tuple(item.fixturenames) if isinstance(item, pytest.Function) else ()


def key_of(item: pytest.Item) -> "TestKey":
    """The test's key in the baselines: its module from the root, then classes, name and parameters.

    Built from the names of the collection tree, because pytest-xdist appends `@group` to node ids.
    """
    from pytest_gpuperf.records import TestKey

    module = Path(os.path.relpath(item.path, item.config.rootpath)).as_posix()
    names = [node.name for node in item.listchain() if isinstance(node, (pytest.Class, pytest.Item))]
    return TestKey(module=module, test="::".join(names))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test that measures, and hold its report back if its verdict needs more runs."""
    if not _is_mine(item) or not _can_wait(item):
        return None
    _deferred_of(item.config).run_protocol(item, nextitem)
    return True


def _can_wait(item: pytest.Item) -> bool:
    """Whether a test may be measured again: not in a process that does so, and not where others run tests their way."""
    config, settings = item.config, item.config.stash[settings_key]
    is_wanted = settings.budget_s != 0 and settings.accept is None and not settings.disable
    others = [vars(config.option).get(name) for name in ("reruns", "retries", "forked", "stepwise")]
    others += [item.get_closest_marker(name) for name in ("flaky", "forked")]
    return is_wanted and order_key not in config.stash and not any(others)


def _deferred_of(config: pytest.Config) -> "Deferred":
    if deferred_key not in config.stash:
        from pytest_gpuperf.confirm import Invocation
        from pytest_gpuperf.deferred import Deferred
        from pytest_gpuperf.interop.xdist import say

        given = config.invocation_params
        arguments = (*map(str, given.args), *(("--no-cov",) if config.pluginmanager.hasplugin("_cov") else ()))
        invocation = Invocation(
            arguments=arguments, folder=given.dir, root=config.rootpath, environment=config.stash[environment_key]
        )
        run = run_of(config)
        config.stash[deferred_key] = Deferred(
            run, invocation, tell=partial(say, config), metered=lambda devices: while_held(config, run.machine, devices)
        )
    return config.stash[deferred_key]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """When all tests have run, measure again in fresh processes what they left unsettled."""
    try:
        result = yield
    except BaseException:
        if deferred_key in session.config.stash:
            session.config.stash[deferred_key].release("the run ended early")
        raise
    deferred = session.config.stash.get(deferred_key, None)
    if deferred is not None and deferred.held:
        if session.shouldfail or session.shouldstop:
            deferred.release("the run ended early")
        else:
            unsettled = _tests(len(deferred.held), "unsettled ")
            _say(session.config, f"gpuperf: measuring {unsettled} again, in fresh processes")
            deferred.settle()
    if not session.shouldfail and not session.shouldstop:
        _profile_recorded(session.config)
    if run_key in session.config.stash and "workeroutput" in session.config.__dict__:
        session.config.__dict__["workeroutput"]["gpuperf_notes"] = run_of(session.config).notes
        session.config.__dict__["workeroutput"]["gpuperf_uses"] = ended(session.config)
    return result


def _profile_recorded(config: pytest.Config) -> None:
    """Profile what becomes a baseline and has no kernels beside it yet, in a fresh process, and hand it over."""
    settings = config.stash[settings_key]
    is_recording = settings.update or settings.accept is not None or settings.patch is not None
    if not is_recording or settings.budget_s == 0 or run_key not in config.stash or order_key in config.stash:
        return
    deferred = _deferred_of(config)
    lacking = deferred.without_kernels()
    if not lacking:
        return
    _say(config, f"gpuperf: profiling {_tests(len(lacking))} in a fresh process")
    lines = deferred.profile(lacking)
    if "workeroutput" in config.__dict__:
        config.__dict__["workeroutput"]["gpuperf_kernels"] = lines
    else:
        controller = config.pluginmanager.get_plugin("gpuperf-controller")
        assert controller is not None, "registered by pytest_configure"
        controller.take_profiles(lines)


def _tests(count: int, kind: str = "") -> str:
    return f"{count} {kind}test{'s' * (count > 1)}"


def _say(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # none in a worker of pytest-xdist
    if reporter is not None:
        if reporter._tw.width_of_current_line:  # noqa: SLF001 - [100%] may stand there, which ensure_newline() overlooks
            reporter.line("")
        reporter.write_line(text)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or under --gpuperf-require-gpu fail, what this machine cannot run."""
    if not _is_mine(item):
        return
    from pytest_gpuperf.deferred import record_key

    if recorder_key in item.stash:  # of an earlier try, when a plugin runs tests again
        del item.stash[recorder_key]
    if record_key in item.stash:
        del item.stash[record_key]
    run = run_of(item.config)
    if run.settings.disable:
        pytest.skip("--gpuperf-disable")
    requirement = requirement_of(item)
    with _as_failure():
        run.examine(requirement, item.name)
        reason = run.shortfall(requirement)
        if reason and run.machine.hidden and run.machine.hidden not in reason:
            reason = f"{reason} {run.machine.hidden}"
    if reason and run.must_run(requirement):
        pytest.fail(f"{item.name}: {reason}", pytrace=False)
    if reason:
        pytest.skip(f"{item.name}: {reason}")


@pytest.fixture
def gpus(request: pytest.FixtureRequest) -> "Iterator[tuple[Device, ...]]":
    """The devices that this test holds exclusively, as asked for by `@pytest.mark.gpu`; without a GPU: the CPU.

    Each has `name`, `uuid`, `vram_gb`, `compute_capability`, `device` (for torch: `"cuda:0"`), and its peaks:
    `peak_flops_per_s[dtype]` and `peak_bandwidth_bytes_per_s`.
    """
    item: pytest.Item = request.node
    run = run_of(item.config)
    with (
        _as_failure(),
        _leased(item, run) as lent,
        run.quarantine.watch(lent.devices, item.name),
        run.machine.current(lent.devices[0]),
        nullcontext() if run.is_leased(lent.devices) else while_held(item.config, run.machine, lent.devices),
    ):
        item.stash[lease_key] = lent
        yield lent.devices


def _leased(item: pytest.Item, run: "Run") -> "AbstractContextManager[Lease]":
    """Hold what a test asks for, if no other process holds it for this one."""
    from pytest_gpuperf.interop.xdist import say
    from pytest_gpuperf.lease import Lease, lease_patiently

    requirement = requirement_of(item)
    candidates = run.candidates(requirement)
    if run.is_leased(candidates[0]):
        return nullcontext(Lease(devices=candidates[0], descriptors=run.order.descriptors if run.order else ()))
    stay = 1 if run.stays_home(requirement) else len(candidates)
    return lease_patiently(
        candidates[:stay],
        candidates[stay:],
        exclusive=requirement.exclusive,
        on_wait=lambda words: say(item.config, f"gpuperf: {item.nodeid} {words}"),
    )


@pytest.fixture
def gpu(gpus: "tuple[Device, ...]") -> "Device":
    """The first device that this test holds. See `gpus`."""
    return gpus[0]


@pytest.fixture
def perf(request: pytest.FixtureRequest, gpus: "tuple[Device, ...]") -> "Recorder":
    """Record end-to-end metrics: `perf.record(name, value, unit=...)`, and watch a stretch: `perf.region()`."""
    item: pytest.Item = request.node
    with _as_failure():
        item.stash[recorder_key] = run_of(item.config).recorder(key_of(item), gpus, criterion_of(item))
    return item.stash[recorder_key]


@pytest.fixture
def gpu_benchmark(request: pytest.FixtureRequest, perf: "Recorder") -> GpuBenchmark:
    """Measure a callable on the device's clock: `gpu_benchmark(call)`; returns the `Measurement`."""
    from pytest_gpuperf.recorder import Work

    with _as_failure():
        run_of(request.config).check_anchors(perf.devices)

    def benchmark(  # noqa: PLR0913 - see GpuBenchmark
        call: Callable[[], object],
        *,
        metric: str | None = None,
        flops: float | None = None,
        bytes: float | None = None,  # noqa: A002
        dtype: str | None = None,
        mode: "Mode | None" = None,
        clock: "ClockName | None" = None,
        tolerance: float | str | None = None,
    ) -> "Measurement":
        work = Work(flop=flops, bytes_moved=bytes, dtype=dtype, mode=mode)
        return perf.benchmark(call, metric=metric, work=work, clock=clock, tolerance=tolerance)

    return benchmark


@pytest.fixture
def gpu_monitor(
    request: pytest.FixtureRequest, gpus: "tuple[Device, ...]"
) -> "Callable[[], AbstractContextManager[Monitor]]":
    """Watch the devices: `with gpu_monitor() as monitor: ...`, then `monitor.telemetry`."""
    from pytest_gpuperf.monitor import Monitor

    machine = run_of(request.config).machine
    uuids = [device.uuid for device in gpus if device.kind == "cuda"]
    return lambda: Monitor(machine.nvml, uuids, vitals=machine.vitals)


@pytest.fixture
def vllm_engine(
    request: pytest.FixtureRequest, perf: "Recorder", gpus: "tuple[Device, ...]"
) -> "Iterator[StartEngine]":
    """Start vLLM on the devices of the test: `engine = vllm_engine(EngineConfig(model="llama-3-8b"))`.

    It runs in a process of its own and is closed when the test ends; its settings become part of the results' identity.
    `vllm_engine(config, devices=gpus[:1])` starts it on some of them.
    """
    from pytest_gpuperf.workloads.vllm import Engine
    from pytest_gpuperf.workloads.vllm_config import with_options

    run = run_of(request.config)

    def start(config: "EngineConfig", *, devices: "Sequence[Device] | None" = None) -> Engine:
        config = with_options(config, run.settings.vllm_args)
        held = _held(devices, gpus)
        engine = Engine(
            config,
            devices=held,
            nvml=run.machine.nvml,
            folder=request.config.rootpath / ".gpuperf",
            descriptors=request.node.stash[lease_key].descriptors,
        )
        engines.callback(_close, engine)
        engine.__enter__()
        perf.is_elsewhere = True
        perf.configure(engine.configuration)
        return engine

    def _close(engine: Engine) -> None:
        if note := engine.close().note:
            run.notes.append(f"{request.node.name}: {note}")

    with _as_failure(), ExitStack() as engines:  # each is closed, whatever the others do
        yield start


def _held(devices: "Sequence[Device] | None", gpus: "tuple[Device, ...]") -> "Sequence[Device]":
    """Refuse devices that the test has not leased: somebody else may have."""
    if devices is None:
        return gpus
    strangers = [f"{device.name} ({device.uuid})" for device in devices if device not in gpus]
    if strangers or not devices:
        named = strangers[0] if strangers else "no device"
        raise UsageError(f"vllm_engine(devices=...) names {named}, and this test holds others. Take them from `gpus`.")
    return devices


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Judge what a passing test measured, so that a regression fails that very test, in its call phase."""
    if not _is_mine(pyfuncitem):
        return (yield)
    start_s = time.perf_counter()
    try:
        result = yield
    except BaseException as error:  # noqa: BLE001 - reported or raised again, with what was measured kept
        _conclude(pyfuncitem, time.perf_counter() - start_s, passed=False)
        _raise_for_user(error)
    record = _conclude(pyfuncitem, time.perf_counter() - start_s, passed=True)
    run = run_of(pyfuncitem.config)
    if record is None or (_waits(pyfuncitem) and run.is_open(record, 1)):
        return result
    if message := run.failure(record):
        pytest.fail(message, pytrace=False)
    return result


def _waits(item: pytest.Item) -> bool:
    from pytest_gpuperf.deferred import can_wait_key

    return item.stash.get(can_wait_key, False)


def _conclude(item: pytest.Function, duration_s: float, *, passed: bool) -> "TestRecord | None":
    """Judge the item's measurements and keep the record for the report."""
    if not passed:
        _add_errors_of_gpus(item)
    recorder = _recorder_of(item) if passed else item.stash.get(recorder_key, None)
    if recorder is not None:
        recorder.close()
    if recorder is None or not recorder.measurements:
        return None
    from pytest_gpuperf.deferred import record_key

    run = run_of(item.config)
    run.keep_profiles(key_of(item), recorder)
    if run.is_profiling:
        return None
    with _as_failure():
        record = run.conclude(
            key_of(item), recorder, duration_s=duration_s, passed=passed, can_confirm=passed and _waits(item)
        )
    item.stash[record_key] = record
    if not (_waits(item) and run.is_open(record, 1)):
        run.rejected += sum(verdict.status == "REGRESSED" for verdict in record.verdicts)
    return record


def _add_errors_of_gpus(item: pytest.Function) -> None:
    """Let a failing test's report say what the driver reported of its GPUs, and take sick ones out of use."""
    if lease_key not in item.stash:  # a suite's own fixture may be called `gpus`
        return
    devices = item.stash[lease_key].devices
    quarantine = run_of(item.config).quarantine
    quarantine.examine(devices, f"in {item.name}")
    if errors := quarantine.errors(devices):
        item.add_report_section("call", "GPU errors", errors)


def _recorder_of(item: pytest.Function) -> "Recorder | None":
    """The item's recorder, with what pytest-benchmark's fixture measured in a test that carries `perf`."""
    recorder = item.stash.get(recorder_key, None)
    if "benchmark" not in item.funcargs or not item.get_closest_marker("perf"):
        return recorder
    from pytest_gpuperf.interop.pytest_benchmark import measurement_of

    criterion = criterion_of(item)
    measurement = measurement_of(item.funcargs["benchmark"], tolerance=criterion.tolerance)
    if measurement is not None:
        run = run_of(item.config)
        with _as_failure():
            recorder = recorder or run.recorder(key_of(item), run.machine.devices[:1], criterion)
            recorder.add_foreign(measurement)
    return recorder


def _raise_for_user(error: BaseException) -> NoReturn:
    """Raise a test's error again as the user should see it: without our frames, our own errors as plain messages."""
    from pytest_gpuperf.recorder import without_frames_of

    match error:
        case NotSupported():
            raise pytest.skip.Exception(str(error)) from None
        case GpuperfError():
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        case _:
            raise error.with_traceback(without_frames_of(error, _PACKAGE))


class _as_failure:  # noqa: N801 - reads as the context manager that it is
    """Turn our errors into failures with their message alone."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, GpuperfError):
            raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand the record to the controller on the report, and the figures to JUnit as properties."""
    if call.when == "setup" and run_key in item.config.stash and run_of(item.config).unsent:
        return (yield from _with_anchors(run_of(item.config)))
    if call.when != "call" or not _is_mine(item):
        return (yield)
    from pytest_gpuperf.deferred import record_key
    from pytest_gpuperf.records import encode

    record = item.stash.get(record_key, None)
    item.user_properties.extend(properties(record) if record else ())
    report = yield
    if record is not None:
        report.__dict__["gpuperf_record"] = encode(record).decode()
    if run_key in item.config.stash:
        run, key = run_of(item.config), key_of(item)
        report.__dict__["gpuperf_kernels"] = run.profile_lines({entry for entry in run.profiles if entry[0] == key})
    return report


def _with_anchors(run: "Run") -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report carry the anchors that were measured before its test."""
    from pytest_gpuperf.records import encode

    report = yield
    report.__dict__["gpuperf_anchors"] = [encode(record).decode() for record in run.unsent]
    run.unsent.clear()
    return report


def properties(record: "TestRecord") -> list[tuple[str, object]]:
    """What JUnit shows of a test.

    `gpuperf.METRIC.value`, `unit`, `verdict`, `change`, `change_low`, `change_high`, `limited_by` (the host).
    """
    rows: list[tuple[str, object]] = []
    for measurement, verdict in zip(record.measurements, record.verdicts, strict=True):
        is_own = verdict.value is None or (verdict.runs == 1 and not measurement.curve)
        figures = {
            "value": measurement.value if is_own else verdict.value,
            "unit": measurement.unit,
            "verdict": verdict.status,
            "change": verdict.change,
            "change_low": verdict.change_low,
            "change_high": verdict.change_high,
            "limited_by": "host" if verdict.is_host_limited else None,
        }
        rows += [
            (f"gpuperf.{measurement.metric}.{name}", value) for name, value in figures.items() if value is not None
        ]
    return rows


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name GPU, driver and CUDA in pytest-benchmark's JSON."""
    from pytest_gpuperf.interop.pytest_benchmark import add_gpus

    add_gpus(machine_info, run_of(config).machine)


class ControllerHooks:
    """Hooks of the one process that sees all reports and writes all files."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._controller: Controller | None = None
        self._seen: set[str] = set()
        self._mistakes: set[str] = set()
        self._notes: list[str] = []
        self._waiting: set[str] = set()
        self._is_selection = False
        self._uses = UseLog()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Hear what a worker of pytest-xdist could not raise, or did not run."""
        output: dict[str, Any] = vars(node).get("workeroutput") or {}  # none after a crash
        self._mistakes |= {output["gpuperf_mistake"]} if "gpuperf_mistake" in output else set()
        self._notes += output.get("gpuperf_notes", [])
        self.take_profiles(output.get("gpuperf_kernels", ()))
        self._uses.take(output.get("gpuperf_uses", ()), self._controller)
        self._is_selection |= bool(output.get("gpuperf_deselected"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Put what arrives on disk at once."""
        if report.__dict__.pop("gpuperf_waits", False):
            self._waiting.add(report.nodeid)
        elif report.when == "teardown":
            self._waiting.discard(report.nodeid)
        self._seen.add(report.nodeid)  # whatever the phase: a worker that dies in a fixture reports no setup
        for anchor in report.__dict__.pop("gpuperf_anchors", ()):
            self.controller.add(anchor)
        text = report.__dict__.pop("gpuperf_record", None)
        if text is not None:
            from pytest_gpuperf.interop.pytest_benchmark import export

            export(self._config, self.controller.add(text))
        self.take_profiles(report.__dict__.pop("gpuperf_kernels", ()))
        self._uses.take(report.__dict__.pop("gpuperf_uses", ()), self._controller)

    def take_profiles(self, texts: Sequence[str]) -> None:
        """Put on disk what profilers saw."""
        for text in texts:
            self.controller.add_profile(text)

    @property
    def controller(self) -> "Controller":
        """Made when the first result arrives."""
        if self._controller is None:
            from pytest_gpuperf.report.controller import Controller

            settings = self._config.stash[settings_key]
            self._controller = Controller(self._config.rootpath, settings, silent=silent_verdicts(settings))
        return self._controller

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Close the results and update the baselines; a problem with either is not a pass."""
        is_over = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if is_over and self._waiting:
            names = ", ".join(sorted(self._waiting)[:3])
            self._mistakes.add(
                f"Their worker died while these tests waited for more runs; they have no verdict: {names}"
            )
        if self._mistakes:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        self._uses.take(ended(self._config), self._controller)
        if self._controller is None:
            return
        is_whole = is_over and not session.shouldstop and not session.shouldfail and self._runs_everything()
        self._controller.end(self._seen, is_whole=is_whole, is_interrupted=not is_over)
        if self._controller.problems and is_over:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def _runs_everything(self) -> bool:
        option = self._config.option
        chosen = (option.keyword, option.markexpr, option.deselect, vars(option).get("lf"))
        is_selection = self._is_selection or self._config.stash.get(deselected_key, False)
        return not is_selection and not any(chosen) and not any("::" in argument for argument in self._config.args)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        for mistake in sorted(self._mistakes):
            terminalreporter.write_line(f"ERROR: {mistake}", red=True)
        if self._controller is not None:
            width = terminalreporter._tw.fullwidth  # noqa: SLF001 - no public way to ask for the width
            names = sorted({record.environment.hardware.name for record in self._controller.records})
            terminalreporter.section(f"GPU performance: {', '.join(names)}")
            for line in self._controller.lines(width, run_of(self._config).machine.problem):
                terminalreporter.write_line(line.text, **({line.colour: True} if line.colour else {}))
        own = run_of(self._config).notes if run_key in self._config.stash else ()
        for note in dict.fromkeys((*self._notes, *own)):
            terminalreporter.write_line(note, yellow=True)
        for text in self._uses.lines(self._config.stash[settings_key].price):
            terminalreporter.write_line(text)
