"""One pytest process: its machine, the baselines it compares with, and what becomes of each test's measurements."""

import os
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from pytest_gpuperf.anchors import MODULE, AnchorVerdict, best_covariate, check_anchors, is_wanted, judge_anchors
from pytest_gpuperf.baseline_file import baseline_path, read
from pytest_gpuperf.confirm import Order
from pytest_gpuperf.covariate import Adjusted
from pytest_gpuperf.curves import judge_curve
from pytest_gpuperf.devices import Device, slug
from pytest_gpuperf.environment import visit_id
from pytest_gpuperf.hostlimit import limited
from pytest_gpuperf.judge import ALPHA, CONFIRMED, LOOKS, ONCE, alpha_of, is_settled, judge
from pytest_gpuperf.kernel_store import kernels_of
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.monitor import health
from pytest_gpuperf.options import PerfCriterion, Policy, Settings
from pytest_gpuperf.priors import Priors, read_priors
from pytest_gpuperf.profiling import Profiler, TorchProfiler
from pytest_gpuperf.quarantine import Quarantine
from pytest_gpuperf.recorder import Recorder
from pytest_gpuperf.records import (
    BaselineFile,
    KernelRecord,
    KernelSummary,
    Measurement,
    MetricBaseline,
    Results,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
    encode,
)
from pytest_gpuperf.report.terminal import baseline_command, regression_message
from pytest_gpuperf.requirement import GpuRequirement, groups, shortfall
from pytest_gpuperf.stats import mean_of_known


class Run:
    """What the hooks share.

    Args:
        settings: The options.
        machine: What can be measured on.
        root: pytest's root folder, which test modules are named from.
        order: What another process wants to be done, which holds the devices for it; `None`: nobody started this one.
        has_home: The first GPU is this process's own among the workers of pytest-xdist: tests of one GPU stay on it.
    """

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        root: Path,
        *,
        order: Order | None = None,
        has_home: bool = False,
    ) -> None:
        self.has_home = has_home
        self.visit = visit_id(datetime.now(UTC))
        self.order = order
        #: What profilers saw, by test and metric; and of what one in a further process would see something.
        self.profiles: dict[tuple[TestKey, str], KernelSummary] = {}
        self.profilable: set[tuple[TestKey, str]] = set()
        self.settings = settings
        self.machine = machine
        self.root = root
        #: Hashed UUIDs of devices that another process holds for this one.
        self.leased = order.leased if order else ()
        #: Metrics of the collected tests that have a baseline, and how many are REGRESSED so far.
        self.compared = 0
        self.rejected = 0
        #: What tests measured, at their first look, and what the summary is to say of the run as a whole.
        self.records: list[TestRecord] = []
        self.notes: list[str] = []
        self.quarantine = Quarantine(machine, self.notes)
        #: Devices -> what their anchors say; and those that no report has carried yet.
        self.anchors: dict[tuple[str, ...], AnchorVerdict] = {}
        self.unsent: list[TestRecord] = []
        self._shortfalls: dict[GpuRequirement, str | None] = {}
        self._priors: dict[str, Priors] = {}
        self._files: dict[tuple[str, str], BaselineFile | None] = {}

    def file(self, folder: str, module: str) -> BaselineFile | None:
        """The baselines of a module on one kind of device, read once.

        Raises:
            BaselineError: The file is there and cannot be trusted.
        """
        if (folder, module) not in self._files:
            self._files[folder, module] = _read(self.settings.baselines, folder, module)
        return self._files[folder, module]

    def priors(self, folder: str) -> Priors:
        """What is known of noise on one kind of device, read once.

        Raises:
            BaselineError: The file is there and cannot be trusted.
        """
        if folder not in self._priors:
            self._priors[folder] = read_priors(self.settings.baselines, folder)
        return self._priors[folder]

    def read_common(self, devices: tuple[Device, ...]) -> None:
        """Read what the tests on these devices share: the noise to expect, and the anchors' baselines.

        Raises:
            BaselineError: One of the files is there and cannot be trusted.
        """
        folder = slug(devices, self.settings.key)
        self.priors(folder)
        self.file(folder, MODULE)

    def baselines_of(self, key: TestKey, devices: tuple[Device, ...]) -> dict[str, MetricBaseline]:
        """Metric -> baseline of one test on these devices."""
        file = self.file(slug(devices, self.settings.key), key.module)
        return file.tests.get(key.test, {}) if file else {}

    def shortfall(self, requirement: GpuRequirement) -> str | None:
        """Why this machine cannot run a test; `None` if it can."""
        if self.settings.require_gpu and self.machine.is_cpu:
            return f"--gpuperf-require-gpu, but there is no GPU. {self.machine.gpu_problem or ''}".strip()
        if requirement not in self._shortfalls:  # kept from when all GPUs could be asked
            self._shortfalls[requirement] = shortfall(requirement, self.machine.devices, self.machine.nvml)
        return self._shortfalls[requirement] or self._shortfall_of_fit(requirement)

    def _shortfall_of_fit(self, requirement: GpuRequirement) -> str | None:
        """Why the GPUs that are still in use do not do for a test."""
        devices = [one for one in self.machine.devices if not self.leased or one.uuid_hash in self.leased]
        fit = self.quarantine.fit(devices)
        if len(fit) == len(devices) or (fit and shortfall(requirement, fit, self.machine.nvml) is None):
            return None
        reason = self.quarantine.reason([device.uuid_hash for device in devices])
        sick = len(devices) - len(fit)
        rest = ", and the rest will not do" if fit else ""
        return f"{sick} of the {len(devices)} GPUs here {'is' if sick == 1 else 'are'} out of use{rest}. {reason}"

    def examine(self, requirement: GpuRequirement, test: str) -> None:
        """Take GPUs that a test would get out of use if they are sick, before it has them."""
        for _ in self.machine.devices:  # each time round takes one out, or ends
            if self.shortfall(requirement) is not None:
                break
            if self.quarantine.examine(self.candidates(requirement)[0], f"before {test}") is None:
                break

    def must_run(self, requirement: GpuRequirement) -> bool:
        """Whether it is a failure that a test cannot run here: where GPUs are insisted on, or all that do are sick."""
        is_sick = self._shortfalls.get(requirement) is None
        return self.settings.require_gpu or (is_sick and self.settings.invalid == "fail")

    def candidates(self, requirement: GpuRequirement) -> tuple[tuple[Device, ...], ...]:
        """Sets of devices that would do for a test; those held for this process alone, where there are any."""
        sets = groups(requirement, self.quarantine.fit(self.machine.devices), self.machine.nvml)
        return tuple(devices for devices in sets if self.is_leased(devices)) or sets

    def stays_home(self, requirement: GpuRequirement) -> bool:
        """Whether a test should be on the first of its candidates, and elsewhere only if that is held for long."""
        return self.has_home and requirement.count == 1

    def is_leased(self, devices: tuple[Device, ...]) -> bool:
        """Whether another process holds these devices for this one."""
        return {device.uuid_hash for device in devices} <= set(self.leased)

    def check_anchors(self, devices: tuple[Device, ...]) -> None:
        """Measure the anchors of devices that a test holds, once in this process, and judge them."""
        hashes = tuple(device.uuid_hash for device in devices)
        if hashes in self.anchors or self.leased or not is_wanted(self.settings.anchors, devices):
            return
        if self.quarantine.reason(hashes):
            return
        folder = slug(devices, self.settings.key)
        found = check_anchors(
            self.machine,
            devices,
            self.file(folder, MODULE),
            visit=self.visit,
            label=self.settings.key,
            priors=self.priors(folder),
        )
        self.anchors[hashes] = found
        self.unsent += found.records
        if found.reason:
            self.notes.append(f"INVALID run: {found.reason}. {found.advice}")
        elif found.note:
            self.notes.append(found.note)

    def recorder(self, key: TestKey, devices: tuple[Device, ...], criterion: PerfCriterion) -> Recorder:
        """What measures and records for one test."""
        preferred = {metric: baseline.method for metric, baseline in self.baselines_of(key, devices).items()}
        return Recorder(
            devices,
            nvml=self.machine.nvml,
            vitals=self.machine.vitals,
            stopwatch=lambda: self.machine.stopwatch(devices[0]),
            synchronize=lambda: self.machine.synchronize(devices),
            preferred=preferred,
            tolerance=criterion.tolerance,
            mode=criterion.mode,
            profiler=self._profiler(key, devices),
        )

    @property
    def is_profiling(self) -> bool:
        """Whether this process is there to profile, and measures nothing."""
        return self.order is not None and self.order.purpose == "profile"

    def _profiler(self, key: TestKey, devices: tuple[Device, ...]) -> Profiler | None:
        if self.order is None or self.order.purpose != "profile":
            return None
        return self.machine.given_profiler or TorchProfiler(
            devices[0].kind,
            synchronize=lambda: self.machine.synchronize(devices),
            keep=Path(self.order.traces) if self.order.traces else None,
            label=key.test,
            most_calls=self.order.most_calls,
        )

    def keep_profiles(self, key: TestKey, recorder: Recorder) -> None:
        """Keep what the profiler saw of a test's metrics, its own profiles included."""
        self.profiles |= {(key, metric): kernels for metric, kernels in recorder.kernels.items()}
        self.profilable |= {(key, metric) for metric in recorder.profilable}

    def profile_lines(self, entries: Collection[tuple[TestKey, str]]) -> list[str]:
        """What was seen of some metrics, as lines of results.jsonl."""
        return [
            encode(KernelRecord(key=key, metric=metric, kernels=kernels)).decode()
            for (key, metric), kernels in self.profiles.items()
            if (key, metric) in entries
        ]

    def can_profile(self, record: TestRecord, metrics: Collection[str] | None = None) -> bool:
        """Whether a further process may see what nothing has been seen of yet, of some metrics of a test or of any."""
        names = [measurement.metric for measurement in record.measurements] if metrics is None else metrics
        entries = {(record.key, name) for name in names}
        return self.machine.can_profile and bool(entries & self.profilable - self.profiles.keys())

    def conclude(
        self, key: TestKey, recorder: Recorder, *, duration_s: float, passed: bool, can_confirm: bool = False
    ) -> TestRecord:
        """Judge what a test measured, for good or until it is confirmed.

        Raises:
            DeviceError: The test has passed on other devices than those that were leased.
        """
        devices = recorder.devices
        if passed:
            self.machine.check_used(devices)
        record = TestRecord(
            key=key,
            slug=slug(devices, self.settings.key),
            devices=tuple(device.uuid_hash for device in devices),
            environment=self.machine.environment(devices),
            measurements=tuple(recorder.measurements),
            verdicts=(),
            duration_s=duration_s,
            passed=passed,
            worker=os.environ.get("PYTEST_XDIST_WORKER"),
        )
        if reason := self.quarantine.examine(devices, f"in {key.test}"):
            record = _of_sick_gpu(record, reason)
        spending = CONFIRMED if can_confirm else ONCE
        verdicts = tuple(self._judge(record, measurement.metric, 1, spending) for measurement in record.measurements)
        self.records.append(self.explained(replace(record, verdicts=verdicts)))
        return self.records[-1]

    def explained(self, record: TestRecord) -> TestRecord:
        """The record with the causes of what is slower."""
        if all(verdict.status != "REGRESSED" for verdict in record.verdicts):
            return record
        from pytest_gpuperf.analysis.causes import explained

        def stored(metric: str) -> KernelSummary | None:
            found = kernels_of(self.settings.baselines, record, metric)
            return found.kernels if found else None

        return explained(record, self.file(record.slug, record.key.module), self.profiles, stored)

    def _judge(self, record: TestRecord, metric: str, look: int, spending: tuple[float, ...]) -> Verdict:
        anchors = self.anchors.get(record.devices)
        return judge_one(
            record,
            metric,
            self.file(record.slug, record.key.module),
            anchors=anchors,
            anchor_file=self.file(record.slug, MODULE) if anchors else None,
            visit=self.visit,
            look=look,
            spending=spending,
            alpha=alpha_of(self.compared, self.rejected),
            priors=self.priors(record.slug),
        )

    def is_open(self, record: TestRecord, look: int) -> bool:
        """Whether more runs may settle a test after a look; heat and other processes pass, so INVALID may, too."""
        if self.quarantine.reason(record.devices):
            return False
        anchors = self.anchors.get(record.devices)
        if anchors and anchors.reason:
            return False
        statuses = [verdict.status for verdict in record.verdicts]
        return "INVALID" in statuses or not all(is_settled(verdict, look) for verdict in record.verdicts)

    def judge_again(self, record: TestRecord, look: int) -> TestRecord:
        """Judge all metrics of a test from all its runs."""
        unwell = [verdict.reason for verdict in record.verdicts if verdict.status == "INVALID"]
        before = {v.metric for v in record.verdicts if v.status == "REGRESSED" and is_settled(v, look - 1)}
        if unwell:  # the first run is set aside, and the next one takes its place
            first, *more = record.more
            record = replace(record, measurements=first.measurements, more=tuple(more))
        verdicts = tuple(
            self._judge(record, measurement.metric, look, CONFIRMED) for measurement in record.measurements
        )
        if unwell:
            words = f"a run was set aside: {unwell[0].rstrip('.')}"
            verdicts = tuple(verdict.saying(words) for verdict in verdicts)
        self.rejected += len({one.metric for one in verdicts if one.status == "REGRESSED"} - before)
        return replace(record, verdicts=verdicts)

    def illness(self, record: TestRecord) -> str | None:
        """Why the device cannot be trusted in the last run of a test."""
        file = self.file(record.slug, record.key.module)
        metrics = file.tests.get(record.key.test, {}) if file else {}
        for measurement in record.more[-1].measurements if record.more else record.measurements:
            usual = _usual_clock_mhz(measurement, metrics.get(measurement.metric))
            if measurement.telemetry and (
                reason := health(measurement.telemetry, usual_clock_mhz=usual, kind=measurement.kind)
            ):
                return reason
        return None

    def failure(self, record: TestRecord) -> str | None:
        """The message with which a test fails for what it measured; `None` if it does not."""
        for verdict in record.verdicts:
            if verdict.status == "REGRESSED" and self.settings.accept is None:
                return self._regression(record, verdict)
        failing = [v for v in record.verdicts if self.consequence(v) == "fail"]
        if not failing:
            return self._shortfall(record)
        rows = [f"{record.key.test} on {record.environment.hardware.name}:"]
        rows += [f"  {v.metric} {_name(v)}: {v.reason}" for v in failing[:8]]
        return "\n".join(rows)

    def _shortfall(self, record: TestRecord) -> str | None:
        """What is worse than everything published, where the options say that this fails."""
        if self.settings.expectations != "fail":
            return None
        from pytest_gpuperf.analysis.expectations import shortfall as published_shortfall

        return published_shortfall(record)

    def consequence(self, verdict: Verdict) -> Policy:
        """What a verdict that is no regression does to its test."""
        settings = self.settings
        is_recording = settings.update or settings.accept is not None
        match verdict.status:
            case "NEW" | "INCOMPARABLE":
                return "pass" if is_recording else settings.missing
            case "INCONCLUSIVE" | "PASS" if verdict.is_host_limited:  # gates nothing, not even under strict
                return "pass"
            case "INCONCLUSIVE":
                return settings.inconclusive
            case "INVALID":
                return settings.invalid
            case "PASS" if verdict.is_low_power and settings.strict:
                return settings.inconclusive
            case _:
                return "pass"

    def _regression(self, record: TestRecord, verdict: Verdict) -> str:
        file = self.file(record.slug, record.key.module)
        assert file is not None, "a regression was judged against a file"
        baseline = file.tests[record.key.test][verdict.metric]
        then = file.environments.get(baseline.sessions[-1].environment)
        accept = baseline_command("accept", self.settings.baselines, self.settings.json)
        return regression_message(record, verdict, baseline, then, accept=accept)


def judge_one(  # noqa: PLR0913 - what judge.judge needs besides the record
    record: TestRecord,
    metric: str,
    file: BaselineFile | None,
    *,
    visit: str,
    look: int = 1,
    spending: tuple[float, ...] = ONCE,
    alpha: float = ALPHA,
    priors: Priors | None = None,
    anchors: AnchorVerdict | None = None,
    anchor_file: BaselineFile | None = None,
) -> Verdict:
    """Judge all runs of one metric against its module's file, with the health of the devices taken into account.

    Args:
        record: The test; its verdicts are not looked at.
        metric: Name of the metric.
        file: Baselines of the test's module on this kind of device.
        visit: See `judge.judge`, as `look`, `spending`, `alpha` and `priors`.
        anchors: What the anchors of this run say of its devices.
        anchor_file: Baselines of the anchors.
    """
    baseline = file.tests.get(record.key.test, {}).get(metric) if file else None
    runs = record.runs_of(metric)
    adjusted = None
    if anchors and baseline and baseline.unit == runs[0].unit and not runs[0].curve:
        adjusted = best_covariate(baseline, runs[0].value, anchors.records, anchor_file)

    compared = partial(
        judge,
        environments=file.environments if file else {},
        environment=record.environment,
        devices=record.devices,
        visit=visit,
        health=_health(runs, baseline, anchors),
        look=look,
        spending=spending,
        priors=priors,
    )
    if runs[0].curve:
        verdict = judge_curve(runs, baseline, lambda ours, then, share: compared(ours, then, alpha=alpha * share))
    elif adjusted:
        corrected = [replace(run, value=run.value * adjusted.factor) for run in runs]
        verdict = _uncorrected(compared(corrected, adjusted.baseline, alpha=alpha), adjusted)
    else:
        verdict = compared(runs, baseline, alpha=alpha)
    return limited(verdict, runs, baseline)


def _health(runs: Sequence[Measurement], baseline: MetricBaseline | None, anchors: AnchorVerdict | None) -> str | None:
    """Why the devices cannot be trusted: what one of the runs says, or else the anchors."""
    usual = _usual_clock_mhz(runs[0], baseline)
    reasons = [health(run.telemetry, usual_clock_mhz=usual, kind=run.kind) for run in runs if run.telemetry]
    return next((reason for reason in (*reasons, anchors.reason if anchors else None) if reason), None)


def _of_sick_gpu(record: TestRecord, reason: str) -> TestRecord:
    """The test with the sickness of its GPU on all that it measured, so that no judge takes it for the code's."""
    measurements = tuple(
        replace(
            one,
            telemetry=replace(one.telemetry or Telemetry(duration_s=record.duration_s), sickness=reason.rstrip(".")),
        )
        for one in record.measurements
    )
    return replace(record, measurements=measurements)


def _uncorrected(verdict: Verdict, adjusted: Adjusted) -> Verdict:
    """The verdict with the value as it was measured, the baseline moved in its place, and a word on the correction."""
    value, baseline_value = verdict.value, verdict.baseline_value
    return replace(
        verdict.saying(adjusted.words),
        value=None if value is None else value / adjusted.factor,
        baseline_value=None if baseline_value is None else baseline_value / adjusted.factor,
    )


def judge_results(
    found: Results, chosen: Sequence[TestRecord], root: Path, priors: Callable[[str], Priors]
) -> list[TestRecord]:
    """Judge tests of an earlier run anew, against the baselines as they are now, with the anchors of that run.

    Args:
        found: The whole run.
        chosen: Its tests to judge.
        root: Folder of all baselines.
        priors: Gives what is known of noise on one kind of device.

    Raises:
        BaselineError: A file cannot be trusted.
    """
    anchors: dict[tuple[str, ...], AnchorVerdict] = {}
    judged = []
    for record in chosen:
        if record.devices not in anchors:
            own = [one for one in found.tests if one.key.module == MODULE and one.devices == record.devices]
            file = _read(root, record.slug, MODULE)
            anchors[record.devices] = judge_anchors(own, file, visit=found.run.visit, priors=priors(record.slug))
        judged.append(_judged(record, anchors[record.devices], found.run.visit, root, priors(record.slug)))
    return judged


def _judged(record: TestRecord, anchors: AnchorVerdict, visit: str, root: Path, priors: Priors) -> TestRecord:
    if record.key.module == MODULE:
        return next(one for one in anchors.records if one.key == record.key)
    runs = 1 + len(record.more)
    verdicts = tuple(
        judge_one(
            record,
            measurement.metric,
            _read(root, record.slug, record.key.module),
            visit=visit,
            look=sum(runs > before for before in (0, *LOOKS[:-1])),  # the last look that these runs were made for
            spending=CONFIRMED if record.more else ONCE,
            priors=priors,
            anchors=anchors,
            anchor_file=_read(root, record.slug, MODULE),
        )
        for measurement in record.measurements
    )
    return replace(record, verdicts=verdicts)


def _read(root: Path, folder: str, module: str) -> BaselineFile | None:
    return read(baseline_path(root, folder, module), module=module)


def _name(verdict: Verdict) -> str:
    return "is INCONCLUSIVE (low power)" if verdict.is_low_power else f"is {verdict.status}"


def _usual_clock_mhz(measurement: Measurement, baseline: MetricBaseline | None) -> float | None:
    """Mean SM clock of the baseline's runs; a test's own number may be of a region where the GPU idled."""
    if baseline is None or measurement.method.mode in ("recorded", "curve"):
        return None
    return mean_of_known(run.sm_clock_mhz for run in baseline.runs)
