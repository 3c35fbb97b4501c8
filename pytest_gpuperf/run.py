"""One pytest process: its machine, the baselines it compares with, and what becomes of each test's measurements."""

import os
from datetime import UTC, datetime
from pathlib import Path

from pytest_gpuperf.baseline_file import baseline_path, read
from pytest_gpuperf.devices import Device, slug
from pytest_gpuperf.environment import visit_id
from pytest_gpuperf.judge import judge
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.monitor import health
from pytest_gpuperf.options import PerfCriterion, Policy, Settings
from pytest_gpuperf.recorder import Recorder
from pytest_gpuperf.records import BaselineFile, Environment, Measurement, MetricBaseline, TestKey, TestRecord, Verdict
from pytest_gpuperf.report.terminal import baseline_command, regression_message
from pytest_gpuperf.requirement import GpuRequirement, groups, shortfall


class Run:
    """What the hooks share.

    Args:
        settings: The options.
        machine: What can be measured on.
        root: pytest's root folder, which test modules are named from.
    """

    def __init__(self, settings: Settings, machine: Machine, root: Path) -> None:
        self.visit = visit_id(datetime.now(UTC))
        self.settings = settings
        self.machine = machine
        self.root = root
        self._files: dict[tuple[str, str], BaselineFile | None] = {}

    def file(self, folder: str, module: str) -> BaselineFile | None:
        """The baselines of a module on one kind of device, read once.

        Raises:
            BaselineError: The file is there and cannot be trusted.
        """
        if (folder, module) not in self._files:
            path = baseline_path(self.settings.baselines, folder, module)
            self._files[folder, module] = read(path, module=module)
        return self._files[folder, module]

    def baselines_of(self, key: TestKey, devices: tuple[Device, ...]) -> dict[str, MetricBaseline]:
        """Metric -> baseline of one test on these devices."""
        file = self.file(slug(devices, self.settings.key), key.module)
        return file.tests.get(key.test, {}) if file else {}

    def shortfall(self, requirement: GpuRequirement) -> str | None:
        """Why this machine cannot run a test; `None` if it can."""
        if self.settings.require_gpu and self.machine.is_cpu:
            return f"--gpuperf-require-gpu, but there is no GPU. {self.machine.gpu_problem or ''}".strip()
        return shortfall(requirement, self.machine.devices, self.machine.nvml)

    def candidates(self, requirement: GpuRequirement) -> tuple[tuple[Device, ...], ...]:
        """Sets of devices that would do for a test."""
        return groups(requirement, self.machine.devices, self.machine.nvml)

    def recorder(self, key: TestKey, devices: tuple[Device, ...], criterion: PerfCriterion) -> Recorder:
        """What measures and records for one test."""
        preferred = {metric: baseline.method for metric, baseline in self.baselines_of(key, devices).items()}
        return Recorder(
            devices,
            nvml=self.machine.nvml,
            stopwatch=lambda: self.machine.stopwatch(devices[0]),
            synchronize=lambda: self.machine.synchronize(devices),
            preferred=preferred,
            tolerance=criterion.tolerance,
            mode=criterion.mode,
            budget_s=self.settings.budget_s,
        )

    def conclude(self, key: TestKey, recorder: Recorder, *, duration_s: float, passed: bool) -> TestRecord:
        """Judge what a test measured."""
        devices = recorder.devices
        environment = self.machine.environment(devices)
        folder = slug(devices, self.settings.key)
        return TestRecord(
            key=key,
            slug=folder,
            devices=tuple(device.uuid_hash for device in devices),
            environment=environment,
            measurements=tuple(recorder.measurements),
            verdicts=tuple(
                self._judge(key, measurement, devices, environment) for measurement in recorder.measurements
            ),
            duration_s=duration_s,
            passed=passed,
            worker=os.environ.get("PYTEST_XDIST_WORKER"),
        )

    def _judge(
        self, key: TestKey, measurement: Measurement, devices: tuple[Device, ...], environment: Environment
    ) -> Verdict:
        return judge_one(
            key,
            measurement,
            self.file(slug(devices, self.settings.key), key.module),
            environment=environment,
            devices=tuple(device.uuid_hash for device in devices),
            visit=self.visit,
        )

    def failure(self, record: TestRecord) -> str | None:
        """The message with which a test fails for what it measured; `None` if it does not."""
        for verdict in record.verdicts:
            if verdict.status == "REGRESSED" and self.settings.accept is None:
                return self._regression(record, verdict)
        failing = [v for v in record.verdicts if self.consequence(v) == "fail"]
        if not failing:
            return None
        rows = [f"{record.key.test} on {record.environment.hardware.name}:"]
        rows += [f"  {v.metric} {_name(v)}: {v.reason}" for v in failing[:8]]
        return "\n".join(rows)

    def consequence(self, verdict: Verdict) -> Policy:
        """What a verdict that is no regression does to its test."""
        settings = self.settings
        is_recording = settings.update or settings.accept is not None
        match verdict.status:
            case "NEW" | "INCOMPARABLE":
                return "pass" if is_recording else settings.missing
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


def judge_one(
    key: TestKey,
    measurement: Measurement,
    file: BaselineFile | None,
    *,
    environment: Environment,
    devices: tuple[str, ...],
    visit: str,
) -> Verdict:
    """Judge one run of one metric against its module's file, with the health of the devices taken into account."""
    baseline = file.tests.get(key.test, {}).get(measurement.metric) if file else None
    telemetry = measurement.telemetry
    return judge(
        [measurement],
        baseline,
        environments=file.environments if file else {},
        environment=environment,
        devices=devices,
        visit=visit,
        is_cpu=environment.hardware.memory_bytes is None,
        health=health(telemetry, usual_clock_mhz=_usual_clock_mhz(baseline)) if telemetry else None,
    )


def _name(verdict: Verdict) -> str:
    return "is INCONCLUSIVE (low power)" if verdict.is_low_power else f"is {verdict.status}"


def _usual_clock_mhz(baseline: MetricBaseline | None) -> float | None:
    """Mean SM clock of the baseline's runs."""
    sessions = baseline.sessions if baseline else ()
    clocks = [run.sm_clock_mhz for session in sessions for run in session.runs if run.sm_clock_mhz is not None]
    return sum(clocks) / len(clocks) if clocks else None
