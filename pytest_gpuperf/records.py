"""The data types that everything speaks, frozen, with units in their names, and their JSON.

Numbers are SI base units unless the name says otherwise. `None` is "not known"; zero is zero.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.units import Better, format_percent, format_value, to_base

ClockName = Literal["cuda-events", "cuda-graph", "wall"]
Mode = Literal["sustained", "cold", "hot", "recorded", "curve"]
Kind = Literal["compute", "memory", "transfer", "host", "end-to-end"]
#: What a file that is read must hold: a value above 0, and a whole number as text.
Positive = Annotated[float, msgspec.Meta(gt=0)]
Size = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]*$")]
Status = Literal["PASS", "REGRESSED", "IMPROVED", "INCONCLUSIVE", "INVALID", "INCOMPARABLE", "NEW"]

#: Version of the baseline files. 1: the first.
SCHEMA = 1
#: Version of results.jsonl, of which older ones are read as well. 1: the first. 2: lines of kernels and of leases.
RESULTS_SCHEMA = 2


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the types below: immutable, keyword-only, strict when read."""


class Method(Record, frozen=True, kw_only=True):
    """How a value was measured. Part of a metric's identity: two methods are never compared.

    Attributes:
        clock: `cuda-events`, `cuda-graph` (many calls replayed as one graph) or `wall`.
        mode: `sustained` (total time over total calls once the clock has settled), `cold` (median of single calls
            with the caches flushed), `hot` (back-to-back calls, short), `recorded` (the test's own number), `curve`
            (the test's own numbers at several sizes, judged together).
    """

    clock: ClockName
    mode: Mode

    def __str__(self) -> str:
        return f"{self.mode}, {self.clock}"


class Telemetry(Record, frozen=True, kw_only=True):
    """What the GPU did during one measurement. Shares are fractions of the measured time, 0 to 1.

    Sources: NVML clocks, power, temperature sampled about every 100 ms; energy from the total-energy counter;
    shares from the cumulative slowdown counters (nvml.h fields 74, 76, 269, 270, 271).

    Attributes:
        foreign_memory_bytes: In use on the GPU when the test began, and by nobody of ours.
        ecc_corrected: Memory errors that were corrected meanwhile.
        ecc_uncorrected: Those that were not.
        is_remap_pending: A row of memory waits for a reset to be replaced.
        has_remap_failed: No spare row was left.
        xids: Codes of the driver's critical errors, those since the last measurement included.
        pcie_generation: The best that the link was while the measurement ran, looked at once a second.
        pcie_width: Lanes, likewise.
        pcie_most_generation: What GPU and slot can do together.
        pcie_most_width: Likewise.
        sickness: Why the GPU was taken out of use by the end of the test.
    """

    duration_s: float
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    memory_used_bytes: int | None = None
    power_cap_share: float | None = None
    sync_boost_share: float | None = None
    sw_thermal_share: float | None = None
    hw_thermal_share: float | None = None
    power_brake_share: float | None = None
    other_process_pids: tuple[int, ...] | None = None
    foreign_memory_bytes: int | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    is_remap_pending: bool | None = None
    has_remap_failed: bool | None = None
    xids: tuple[int, ...] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_most_generation: int | None = None
    pcie_most_width: int | None = None
    sickness: str | None = None


class Hardware(Record, frozen=True, kw_only=True):
    """What must match for two results to be comparable.

    Attributes:
        name: Name of the GPU as NVML gives it, or of the CPU.
        count: Number of devices of this name that the test held.
        memory_bytes: Memory of one device; `None` for a CPU.
        power_limit_w: Enforced power limit of one device; `None` where it cannot be read.
        is_mig: Whether the device is a MIG instance.
        link: Of several devices, the class of their worst connection, such as `nvlink` or `host-bridge`; `None` of
            one, and where it is not known.
    """

    name: str
    count: int = 1
    memory_bytes: int | None = None
    power_limit_w: float | None = None
    is_mig: bool = False
    link: str | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is a CPU: a GPU always tells its memory."""
        return self.memory_bytes is None


class Environment(Record, frozen=True, kw_only=True):
    """Hardware, which must match, and versions, which are noted: a slower driver is what users want to catch."""

    hardware: Hardware
    versions: dict[str, str] = {}


class Curve(Record, frozen=True, kw_only=True):
    """A metric at several sizes.

    Attributes:
        x: What the sizes are of, such as `batch size`.
        points: Size, a whole number as text, because JSON's keys are text -> value in the metric's unit.
        end: Why there is no larger size, such as `out of memory at 256`; `None` where all that were asked for ran.
    """

    x: str
    points: dict[Size, Positive]
    end: str | None = None


class Measurement(Record, frozen=True, kw_only=True):
    """One metric of one test in one run.

    Attributes:
        metric: Name, unique within the test.
        value: In `unit`, a base unit (`s`, `B/s`, `FLOP/s`, `tok/s`, ...).
        better: Direction.
        kind: What the metric depends on; selects the prior of its noise.
        method: How it was measured.
        tolerance: Largest slowdown accepted, as a fraction; `None` is the default of its kind.
        samples_s: Seconds per call, one for each timed block, in order; empty for a recorded value.
        calls_per_sample: Calls in each block.
        flop: Floating-point operations of one call.
        bytes_moved: Bytes read plus bytes written by one call.
        peak: What the hardware can do at most, in `unit`.
        is_peak_computed: The peak is an upper bound from clock and SM count, not a published figure.
        lacks_dtype: The hardware has peaks, but nothing says which data type's applies.
        spread: Half the 95 % interval of the value within this run, as a fraction of it.
        unstable: Why the value had not settled when time ran out.
        telemetry: What the GPU did meanwhile.
        configuration: What else the value belongs to, such as model and batch size: part of the metric's identity.
        gpu_busy_share: Part of the measured time in which a kernel ran, 0 to 1.
        curve: Values at several sizes, of which `value` is the geometric mean.
    """

    metric: str
    value: Positive
    unit: str
    better: Better
    kind: Kind
    method: Method
    tolerance: float | None = None
    samples_s: tuple[float, ...] = ()
    calls_per_sample: int = 1
    flop: float | None = None
    bytes_moved: float | None = None
    peak: float | None = None
    is_peak_computed: bool = False
    lacks_dtype: bool = False
    spread: float | None = None
    unstable: str | None = None
    telemetry: Telemetry | None = None
    configuration: dict[str, str] | None = None
    gpu_busy_share: float | None = None
    curve: Curve | None = None

    @property
    def time_s(self) -> float | None:
        """Seconds per call, where the metric is a time or has counted work."""
        work = self.flop if self.unit == "FLOP/s" else self.bytes_moved if self.unit == "B/s" else None
        if self.unit == "s":
            return self.value
        return work / self.value if work else None

    @property
    def fraction_of_peak(self) -> float | None:
        """Value as a fraction of the hardware's peak, where one is known."""
        return self.value / self.peak if self.peak else None

    def assert_at_least(self, bound: float, *, of: Literal["peak"] | None = None, unit: str | None = None) -> None:
        """Fail unless the value is at least `bound`: a physical floor, besides the baseline.

        Args:
            bound: A fraction with `of="peak"`, else a number in `unit` (default: the metric's base unit).
            of: `"peak"`: the bound is a fraction of the hardware's peak. Without a known peak (a CPU, an unknown
                GPU) nothing is checked, and the run's summary says so.
            unit: Unit of `bound`, such as `"TFLOP/s"`.

        Raises:
            AssertionError: The value is below the bound.
            UsageError: The unit is of another kind than the metric's, or `of` is not `"peak"`.

        >>> result.assert_at_least(0.5, of="peak")       # doctest: +SKIP
        >>> result.assert_at_least(600, unit="TFLOP/s")  # doctest: +SKIP
        """
        limit = self._limit(bound, of=of, unit=unit)
        if limit is not None and not self.value >= limit:
            raise AssertionError(self._outside("below the floor of", limit, bound if of else None))

    def assert_at_most(self, bound: float, *, of: Literal["peak"] | None = None, unit: str | None = None) -> None:
        """Fail unless the value is at most `bound`: a ceiling, such as the longest time allowed.

        Arguments and errors are those of `assert_at_least`.
        """
        limit = self._limit(bound, of=of, unit=unit)
        if limit is not None and not self.value <= limit:
            raise AssertionError(self._outside("above the ceiling of", limit, bound if of else None))

    def _limit(self, bound: float, *, of: str | None, unit: str | None) -> float | None:
        if of not in (None, "peak"):
            raise UsageError(f"of={of!r} is not something to compare with. Valid: 'peak'.")
        if of == "peak" and unit is not None:
            raise UsageError(f"A share of the peak has no unit. Drop unit={unit!r} or of='peak'.")
        if of == "peak" and self.lacks_dtype:
            raise UsageError("The peak depends on the data type. Add dtype='bfloat16', or whichever it is.")
        if of == "peak":
            return None if self.peak is None else bound * self.peak
        limit, base = to_base(bound, unit or self.unit)
        if base != self.unit:
            raise UsageError(f"The bound is in {unit}, but {self.metric} is in {self.unit}.")
        return limit

    def _outside(self, relation: str, limit: float, fraction: float | None) -> str:
        share = f" ({format_percent(fraction)} of the peak)" if fraction is not None else ""
        return (
            f"{self.metric} is {format_value(self.value, self.unit)}, "
            f"{relation} {format_value(limit, self.unit)}{share}."
        )


def configuration_differences(now: dict[str, str] | None, then: dict[str, str] | None) -> tuple[str, ...]:
    """Say what differs. What one side does not name is not known there, as with a new version's new setting.

    >>> configuration_differences({"model": "gpt2", "dtype": "float16"}, {"dtype": "bfloat16"})
    ('dtype float16, baseline bfloat16',)
    """
    ours, theirs = now or {}, then or {}
    return tuple(
        f"{name} {ours[name]}, baseline {theirs[name]}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    )


class Verdict(Record, frozen=True, kw_only=True):
    """What the judge says of one metric.

    Attributes:
        status: The verdict.
        metric: Its metric.
        reason: One sentence, for people.
        tolerance: Largest slowdown accepted, as a fraction.
        change: How much worse, as a fraction of the baseline (+0.03: 3 % slower); `None` if nothing was compared.
        change_low: Lower end of the 95 % interval of `change`.
        change_high: Upper end of it.
        minimum_detectable_effect: Smallest slowdown that would be told from noise with 80 % power, as a fraction.
        baseline_value: The baseline's estimate for this device, in the metric's unit.
        value: Geometric mean of the runs, in the metric's unit; `None` if nothing was compared.
        p_value: Chance of a change as large as this for the worse if nothing changed.
        drift: Change from the first five sessions of an epoch that has more, as a fraction.
        sessions: Sessions in the baseline.
        runs: Runs judged.
        is_provisional: Fewer than five sessions: the prior of the metric's kind decides.
        is_low_power: Passed only because the noise is too large for anything stronger.
        is_host_limited: The host set the pace, now and in the baseline: nothing is gated by it.
        remark: What else is to be read beside the value, whatever the status.
        causes: Why it is worse, the most likely cause first, each with its share of the loss.
    """

    status: Status
    metric: str
    reason: str
    tolerance: float
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    minimum_detectable_effect: float | None = None
    baseline_value: float | None = None
    value: float | None = None
    p_value: float | None = None
    drift: float | None = None
    sessions: int = 0
    runs: int = 1
    is_provisional: bool = False
    is_low_power: bool = False
    is_host_limited: bool = False
    remark: str | None = None
    causes: tuple[str, ...] = ()

    @property
    def is_beyond_tolerance(self) -> bool:
        """Whether it is slower by more than the tolerance, by chance or not."""
        return self.change is not None and self.change > self.tolerance

    def saying(self, words: str) -> "Verdict":
        """The same with more to its reason."""
        return msgspec.structs.replace(self, reason=f"{self.reason.rstrip('.')}; {words}.")


class TestKey(Record, frozen=True, kw_only=True):
    """Where a test's baseline lives: module path from the root, and the test's name with its class and parameters."""

    __test__ = False

    module: str
    test: str

    def __str__(self) -> str:
        return f"{self.module}::{self.test}"


class KernelUse(Record, frozen=True, kw_only=True):
    """What one kernel, or one kind of copy or fill, did in one call of the workload.

    Attributes:
        name: As the profiler gives it, cut to 240 characters; for a copy or a fill its direction, such as
            `Memcpy DtoH (Device -> Pinned)`.
        count: Launches in a call, on average.
        time_s: Of all of them.
        blocks: Median number of thread blocks of a launch; `None` of a copy, or where launches differ in kind.
        median_s: Of one launch. A mean far above it: some launches were interrupted.
        bytes_moved: By all of them; `None` of a kernel.
    """

    name: str
    kind: Literal["kernel", "copy", "fill"] = "kernel"
    count: float
    time_s: float
    blocks: float | None = None
    median_s: float | None = None
    bytes_moved: float | None = None


class KernelSummary(Record, frozen=True, kw_only=True):
    """What the GPU and the host did in one call of a workload, by torch's profiler. All but `calls` are of one call.

    Attributes:
        calls: That were profiled.
        wall_s: By the host's clock, the profiler's own cost included.
        span_s: From the begin of the first kernel, copy or fill to the end of the last.
        busy_s: Part of the span in which anything ran.
        longest_gap_s: Longest stretch in which nothing ran between two of them.
        kernels: The longest time first, at most 40.
        rest: All others together.
        launches: Calls of the host that gave the GPU something to do; a CUDA graph is one.
        graph_launches: Those of them that were CUDA graphs.
        launch_s: Time that the host spent in them.
        sync_s: Time that the host waited for the GPU.
        streams: On which anything ran.
    """

    calls: int
    wall_s: float
    span_s: float
    busy_s: float
    longest_gap_s: float
    kernels: tuple[KernelUse, ...]
    rest: KernelUse | None = None
    launches: float = 0.0
    graph_launches: float = 0.0
    launch_s: float = 0.0
    sync_s: float = 0.0
    streams: int = 1

    @property
    def gap_s(self) -> float:
        """Part of the span in which nothing ran."""
        return max(self.span_s - self.busy_s, 0.0)


class BaselineRun(Record, frozen=True, kw_only=True):
    """One accepted run of one metric.

    Attributes:
        value: In the metric's unit.
        spread: Half the 95 % interval within the run, as a fraction.
        sm_clock_mhz: Mean SM clock while it was measured.
        power_w: Mean power while it was measured.
        run_id: See `RunInfo.run_id`: a run is recorded once.
        gpu_busy_share: See `Measurement`.
        points: See `Curve.points`.
    """

    value: float
    spread: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    run_id: str | None = None
    gpu_busy_share: float | None = None
    points: dict[str, float] | None = None


class Session(Record, frozen=True, kw_only=True):
    """One visit to a machine that was accepted as good, with its runs.

    Attributes:
        date: ISO 8601, UTC, of the first run.
        visit: See `RunInfo.visit`.
        devices: Hashed UUIDs.
        environment: Key into the file's `environments`.
        commit: Git revision of the first run.
        runs: At least one.
    """

    date: str
    visit: str
    devices: tuple[str, ...]
    environment: str
    runs: tuple[BaselineRun, ...]
    commit: str | None = None


class MetricBaseline(Record, frozen=True, kw_only=True):
    """The sessions of one epoch of one metric, oldest first.

    Attributes:
        unit: Base unit.
        better: Direction.
        kind: See `Measurement.kind`.
        method: How every value here was measured.
        configuration: See `Measurement`.
        sessions: At least one.
        reason: Why this epoch began: what was said on accepting it; `None` for the first.
    """

    unit: str
    better: Better
    kind: Kind
    method: Method
    sessions: tuple[Session, ...]
    configuration: dict[str, str] | None = None
    reason: str | None = None

    @property
    def runs(self) -> tuple[BaselineRun, ...]:
        """Of all sessions, in order."""
        return tuple(run for session in self.sessions for run in session.runs)


class BaselineFile(Record, frozen=True, kw_only=True):
    """All baselines of one test module on one kind of device.

    Attributes:
        schema: Version of this layout.
        module: Path of the test module from the root, such as `perf_tests/test_matmul.py`.
        environments: Listed once, by a short hash of their content.
        tests: Test name -> metric name -> baseline.
    """

    schema: int
    module: str
    environments: dict[str, Environment]
    tests: dict[str, dict[str, MetricBaseline]]


class RunInfo(Record, frozen=True, kw_only=True, tag="run", tag_field="record"):
    """First line of results.jsonl: the process that measured.

    Attributes:
        run_id: Unique.
        date: ISO 8601, UTC.
        visit: One boot of one machine on one day, hashed: runs of one visit are one session.
        commit: Git revision of the code under test, with `-dirty` if it was changed; `None` outside git.
    """

    schema: int
    run_id: str
    date: str
    visit: str
    commit: str | None = None


class Rerun(Record, frozen=True, kw_only=True):
    """The same test once more in a fresh process, to settle what the first run did not.

    Attributes:
        measurements: Of the same metrics.
        duration_s: Of the call phase.
    """

    measurements: tuple[Measurement, ...]
    duration_s: float


class TestRecord(Record, frozen=True, kw_only=True, tag="test", tag_field="record"):
    """One test's measurements, verdicts, the environment and devices they were taken on.

    Attributes:
        measurements: Of the first run.
        devices: Hashed UUIDs of the devices that the test held.
        slug: Folder of the baselines that these devices belong to.
        duration_s: Of the call phase.
        passed: Whether the test's own body passed.
        more: Further runs, in order; the verdicts are of all runs.
        problems: Why there are no further ones.
    """

    __test__ = False

    key: TestKey
    slug: str
    devices: tuple[str, ...]
    environment: Environment
    measurements: tuple[Measurement, ...]
    verdicts: tuple[Verdict, ...]
    duration_s: float = 0.0
    passed: bool = True
    worker: str | None = None
    more: tuple[Rerun, ...] = ()
    problems: tuple[str, ...] = ()

    def runs_of(self, metric: str) -> tuple[Measurement, ...]:
        """All runs of one metric, in order."""
        runs = (self.measurements, *(rerun.measurements for rerun in self.more))
        return tuple(m for measurements in runs for m in measurements if m.metric == metric)


class KernelRecord(Record, frozen=True, kw_only=True, tag="kernels", tag_field="record"):
    """What the profiler saw of one metric: of the test's own profile, or of a further process that was not timed."""

    key: TestKey
    metric: str
    kernels: KernelSummary


class LeaseUse(Record, frozen=True, kw_only=True, tag="lease", tag_field="record"):
    """What became of one GPU while a test held it.

    Attributes:
        device: Hashed UUID.
        name: Of the GPU.
        begin: ISO 8601, UTC, as the end.
        duration_s: By a clock that is never set.
        busy_share: Part of it in which a kernel ran, by the driver's own samples.
        energy_j: `None` under 5 s.
    """

    device: str
    name: str
    begin: str
    end: str
    duration_s: float
    busy_share: float | None = None
    energy_j: float | None = None
    worker: str | None = None


class RunEnd(Record, frozen=True, kw_only=True, tag="end", tag_field="record"):
    """Last line of results.jsonl; missing when the run was killed.

    Attributes:
        tests: Every test that was collected and had its turn, skipped ones included, as `module::test`.
        is_whole: No test was deselected and none was left out by an early end, so what is missing is gone.
    """

    tests: tuple[str, ...]
    is_whole: bool


class Results(Record, frozen=True, kw_only=True):
    """A whole results.jsonl."""

    run: RunInfo
    tests: tuple[TestRecord, ...]
    end: RunEnd | None = None
    profiles: tuple[KernelRecord, ...] = ()
    uses: tuple[LeaseUse, ...] = ()


class _Schema(msgspec.Struct):
    schema: int = 0


def encode(record: Record) -> bytes:
    """One line of JSON with sorted keys. Non-finite numbers become null, and are then refused when read."""
    return msgspec.json.encode(record, order="sorted")


def decode_lines(lines: Iterable[bytes]) -> Results:
    """Read results.jsonl. A last line cut off by a kill is left out.

    Raises:
        UsageError: The first line is not a run of this schema, or another line is not a record.
    """
    decoder = msgspec.json.Decoder(RunInfo | TestRecord | KernelRecord | LeaseUse | RunEnd)
    complete = [line for line in lines if line.endswith(b"\n")]
    try:
        # Before everything else, because whatever a newer file holds that is unknown here is no fault of it.
        if complete and (schema := msgspec.json.decode(complete[0], type=_Schema).schema) > RESULTS_SCHEMA:
            raise UsageError(
                f"The results have schema {schema}, this version reads {RESULTS_SCHEMA} and older. "
                "Upgrade pytest-gpuperf."
            )
        records = [decoder.decode(line) for line in complete]
    except (msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"Not a results file of pytest-gpuperf: {error}") from None
    if not records or not isinstance(records[0], RunInfo):
        raise UsageError("Not a results file of pytest-gpuperf: its first line does not describe a run.")
    if any(isinstance(record, RunInfo) for record in records[1:]):
        raise UsageError("These are the results of more than one run. Give the file of each run by itself.")
    return Results(
        run=records[0],
        tests=tuple(record for record in records if isinstance(record, TestRecord)),
        end=next((record for record in records if isinstance(record, RunEnd)), None),
        profiles=tuple(record for record in records if isinstance(record, KernelRecord)),
        uses=tuple(record for record in records if isinstance(record, LeaseUse)),
    )
