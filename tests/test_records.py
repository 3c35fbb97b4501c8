"""Records: there and back through JSON, results files that cannot be trusted, and the floors of a measurement."""

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import (
    RESULTS_SCHEMA,
    SCHEMA,
    BaselineFile,
    BaselineRun,
    Curve,
    Environment,
    Hardware,
    KernelRecord,
    KernelSummary,
    KernelUse,
    Kind,
    LeaseUse,
    Measurement,
    Method,
    MetricBaseline,
    Mode,
    Record,
    Rerun,
    RunEnd,
    RunInfo,
    Session,
    Status,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
    decode_lines,
    encode,
)

METHOD = Method(clock="cuda-events", mode="sustained")
HARDWARE = Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984, power_limit_w=700.0)
ENVIRONMENT = Environment(hardware=HARDWARE, versions={"torch": "2.13.0", "driver": "580.159.04"})
TELEMETRY = Telemetry(
    duration_s=5.5,
    sm_clock_mhz=1755.0,
    power_w=690.5,
    energy_j=3797.0,
    temperature_c=61.0,
    memory_used_bytes=2**30,
    power_cap_share=0.97,
    hw_thermal_share=0.0,
    other_process_pids=(41, 42),
)
MEASUREMENT = Measurement(
    metric="throughput",
    value=690.2e12,
    unit="FLOP/s",
    better="higher",
    kind="compute",
    method=METHOD,
    tolerance=0.03,
    samples_s=(1.59e-3, 1.6e-3),
    calls_per_sample=31,
    flop=1.1e12,
    peak=989.4e12,
    spread=0.002,
    unstable="still drifting by 1.2 % after 3.0 s of warm-up",
    telemetry=TELEMETRY,
    configuration={"model": "gpt2"},
    gpu_busy_share=0.97,
)
CURVE = Curve(x="batch size", points={"1": 590.0, "8": 4193.0}, end="out of memory at 16")
VERDICT = Verdict(status="PASS", metric="throughput", reason="Fine.", tolerance=0.03, change=-0.001, sessions=5)
KEY = TestKey(module="perf_tests/test_matmul.py", test="test_matmul[8192-bfloat16]")
RUN = RunInfo(
    schema=RESULTS_SCHEMA, run_id="0123456789ab", date="2026-11-21T00:00:00+00:00", visit="v", commit="abc-dirty"
)
RERUN = Rerun(measurements=(MEASUREMENT,), duration_s=8.4)
TEST = TestRecord(
    key=KEY,
    slug="nvidia-h100-80gb-hbm3",
    devices=("0123456789ab",),
    environment=ENVIRONMENT,
    measurements=(MEASUREMENT,),
    verdicts=(VERDICT,),
    duration_s=8.5,
    worker="gw0",
    more=(RERUN,),
    problems=("a fresh process did not end in time and was killed",),
)
END = RunEnd(tests=(str(KEY),), is_whole=True)
BASELINE_RUN = BaselineRun(value=690e12, spread=0.002, sm_clock_mhz=1755.0, power_w=690.0, run_id=RUN.run_id)
SESSION = Session(date=RUN.date, visit="v", devices=("0123456789ab",), environment="e", runs=(BASELINE_RUN,))
BASELINE = MetricBaseline(
    unit="FLOP/s", better="higher", kind="compute", method=METHOD, sessions=(SESSION,), reason="new kernel"
)
FILE = BaselineFile(
    schema=SCHEMA, module=KEY.module, environments={"e": ENVIRONMENT}, tests={KEY.test: {"throughput": BASELINE}}
)
KERNEL = KernelUse(name="nvjet_tst_128x256_64x4", count=1.0, time_s=2e-4, blocks=132.0)
KERNELS = KernelSummary(
    calls=30,
    wall_s=2.3e-4,
    span_s=2.1e-4,
    busy_s=2e-4,
    longest_gap_s=1e-6,
    kernels=(KERNEL,),
    rest=KernelUse(name="5 more", count=5.0, time_s=1e-6),
    launches=1.0,
    launch_s=5e-6,
)
PROFILE = KernelRecord(key=KEY, metric="throughput", kernels=KERNELS)
LEASE = LeaseUse(
    device="0123456789ab",
    name="NVIDIA H100 80GB HBM3",
    begin="2026-11-21T10:00:00.000+00:00",
    end="2026-11-21T10:00:08.500+00:00",
    duration_s=8.5,
    busy_share=0.61,
    energy_j=4200.0,
    worker="gw0",
)
EVERY_RECORD: tuple[Record, ...] = (
    *(METHOD, HARDWARE, ENVIRONMENT, TELEMETRY, CURVE, MEASUREMENT, VERDICT, KEY, RUN, RERUN, TEST, END),
    *(BASELINE_RUN, SESSION, BASELINE, FILE, KERNEL, KERNELS, PROFILE, LEASE),
)


def lines_of(*records: Record) -> list[bytes]:
    return [encode(record) + b"\n" for record in records]


def changed(record: Record, **changes: Any) -> bytes:
    """The record's line with some fields changed, as a foreign or newer writer would have it."""
    return msgspec.json.encode({**msgspec.json.decode(encode(record)), **changes}) + b"\n"


@pytest.mark.parametrize("record", EVERY_RECORD, ids=lambda record: type(record).__name__)
def test_a_record_survives_json(record: Record) -> None:
    assert msgspec.json.decode(encode(record), type=type(record)) == record


def test_every_record_that_is_written_is_among_those_tried() -> None:
    written = {kind for kind in Record.__subclasses__() if kind.__module__ == "pytest_gpuperf.records"}
    assert {kind.__name__ for kind in written} - {type(record).__name__ for record in EVERY_RECORD} == {"Results"}


@settings(deadline=None)
@given(
    value=st.floats(1e-300, 1e300),
    kind=st.sampled_from(get_args(Kind)),
    mode=st.sampled_from(get_args(Mode)),
    metric=st.text(min_size=1).filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text)),
    samples_s=st.lists(st.floats(0, 1e9), max_size=5).map(tuple),
)
def test_a_measurement_survives_json(
    value: float, kind: Kind, mode: Mode, metric: str, samples_s: tuple[float, ...]
) -> None:
    measurement = Measurement(
        metric=metric,
        value=value,
        unit="s",
        better="lower",
        kind=kind,
        method=Method(clock="wall", mode=mode),
        samples_s=samples_s,
    )
    assert msgspec.json.decode(encode(measurement), type=Measurement) == measurement


@pytest.mark.parametrize("status", get_args(Status))
def test_every_status_survives_json(status: Status) -> None:
    verdict = msgspec.structs.replace(VERDICT, status=status)
    assert msgspec.json.decode(encode(verdict), type=Verdict) == verdict


def test_a_record_is_one_line_with_sorted_keys() -> None:
    text = encode(msgspec.structs.replace(VERDICT, reason="two\nlines"))
    assert b"\n" not in text
    assert list(msgspec.json.decode(text)) == sorted(msgspec.json.decode(text))


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        VERDICT.status = "NEW"  # type: ignore[misc]


def test_a_record_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `speed`"):
        msgspec.json.decode(changed(VERDICT, speed=1), type=Verdict)


def test_a_key_is_written_as_pytest_writes_it() -> None:
    assert str(KEY) == "perf_tests/test_matmul.py::test_matmul[8192-bfloat16]"


def test_a_method_is_written_in_words() -> None:
    assert str(METHOD) == "sustained, cuda-events"


def test_a_whole_results_file_is_read() -> None:
    results = decode_lines(lines_of(RUN, TEST, END))
    assert (results.run, results.tests, results.end) == (RUN, (TEST,), END)


def test_results_of_a_killed_run_have_no_end() -> None:
    results = decode_lines(lines_of(RUN, TEST))
    assert (results.tests, results.end) == ((TEST,), None)


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_last_line_that_was_cut_off_is_left_out(cut: int) -> None:
    whole = b"".join(lines_of(RUN, TEST, TEST))
    assert decode_lines(whole[:-cut].splitlines(keepends=True)).tests == (TEST,)


def test_a_line_that_was_cut_off_in_the_middle_is_not() -> None:
    with pytest.raises(UsageError, match=r"^Not a results file of pytest-gpuperf: "):
        decode_lines([*lines_of(RUN), encode(TEST)[:-10] + b"\n", *lines_of(END)])


def test_an_empty_file_is_no_results_file() -> None:
    with pytest.raises(UsageError) as error:
        decode_lines([])
    assert str(error.value) == "Not a results file of pytest-gpuperf: its first line does not describe a run."


def test_results_without_their_run_are_refused() -> None:
    with pytest.raises(UsageError, match="its first line does not describe a run"):
        decode_lines(lines_of(TEST))


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b"PNG\x89\xff\n", b'{"record": "other"}\n', b"<html>\n", b"\n"])
def test_a_foreign_file_is_refused(line: bytes) -> None:
    with pytest.raises(UsageError, match=r"^Not a results file of pytest-gpuperf: "):
        decode_lines([line])


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    with pytest.raises(UsageError) as error:
        decode_lines([changed(RUN, schema=RESULTS_SCHEMA + 1)])
    assert str(error.value) == "The results have schema 3, this version reads 2 and older. Upgrade pytest-gpuperf."


def test_a_newer_schema_asks_for_an_upgrade_even_with_fields_unknown_here() -> None:
    with pytest.raises(UsageError, match="Upgrade"):
        decode_lines([changed(RUN, schema=RESULTS_SCHEMA + 1, host="a"), changed(TEST, energy_j=1.0)])


def test_results_of_the_first_schema_are_read() -> None:
    first = changed(RUN, schema=1)
    assert decode_lines([first, *lines_of(TEST, END)]).tests == (TEST,)


def test_lines_of_kernels_and_leases_are_read_wherever_they_stand() -> None:
    results = decode_lines(lines_of(RUN, LEASE, TEST, PROFILE, END, LEASE))
    assert (results.tests, results.profiles, results.uses, results.end) == ((TEST,), (PROFILE,), (LEASE, LEASE), END)


def test_two_results_files_in_one_are_refused() -> None:
    other = msgspec.structs.replace(RUN, run_id="another")
    with pytest.raises(UsageError, match="run"):
        decode_lines(lines_of(RUN, TEST, END, other, TEST, END))


def test_a_value_that_is_no_number_is_refused_when_read() -> None:
    broken = msgspec.structs.replace(MEASUREMENT, value=float("nan"))
    with pytest.raises(UsageError, match=r"Expected `float`, got `null`"):
        decode_lines(lines_of(RUN, msgspec.structs.replace(TEST, measurements=(broken,))))


def measured(value: float, unit: str = "FLOP/s", **changes: Any) -> Measurement:
    return msgspec.structs.replace(MEASUREMENT, value=value, unit=unit, **changes)


def test_the_time_of_a_call_follows_from_its_work() -> None:
    assert measured(1e12, flop=2e9).time_s == pytest.approx(2e-3)
    assert measured(1e12, "B/s", bytes_moved=4e9).time_s == pytest.approx(4e-3)
    assert measured(3e-3, "s").time_s == 3e-3
    assert measured(1e4, "tok/s").time_s is None


def test_without_a_peak_there_is_no_fraction_of_it() -> None:
    assert measured(500e12, peak=1000e12).fraction_of_peak == 0.5
    assert measured(500e12, peak=None).fraction_of_peak is None


def test_a_value_at_the_bound_is_within_it() -> None:
    measured(600e12).assert_at_least(600, unit="TFLOP/s")
    measured(600e12).assert_at_most(600, unit="TFLOP/s")
    measured(500e12, peak=1000e12).assert_at_least(0.5, of="peak")


def test_a_bound_without_unit_is_in_the_base_unit() -> None:
    measured(3e-3, "s", metric="time").assert_at_most(0.003)
    with pytest.raises(AssertionError):
        measured(3e-3, "s", metric="time").assert_at_most(0.0029)


def test_a_value_below_the_floor_says_both_with_units() -> None:
    with pytest.raises(AssertionError) as error:
        measured(480e12).assert_at_least(600, unit="TFLOP/s")
    assert str(error.value) == "throughput is 480.0 TFLOP/s, below the floor of 600.0 TFLOP/s."


def test_a_value_above_the_ceiling_says_both_with_units() -> None:
    with pytest.raises(AssertionError) as error:
        measured(12e-3, "s", metric="ttft").assert_at_most(10, unit="ms")
    assert str(error.value) == "ttft is 12.00 ms, above the ceiling of 10.00 ms."


def test_a_floor_of_the_peak_says_the_share_and_the_number() -> None:
    with pytest.raises(AssertionError) as error:
        measured(480e12, peak=1000e12).assert_at_least(0.5, of="peak")
    assert str(error.value) == "throughput is 480.0 TFLOP/s, below the floor of 500.0 TFLOP/s (50 % of the peak)."


def test_a_ceiling_in_milliseconds_a_token_fits_a_metric_in_seconds_a_token() -> None:
    tpot = measured(0.012, "s/tok", metric="tpot")
    tpot.assert_at_most(20, unit="ms/tok")
    with pytest.raises(AssertionError, match=r"^tpot is 12\.00 ms/tok, above the ceiling of 10\.00 ms/tok\.$"):
        tpot.assert_at_most(10, unit="ms/tok")


def test_without_a_peak_nothing_is_checked_against_it() -> None:
    measured(1.0, peak=None).assert_at_least(0.99, of="peak")
    measured(1.0, peak=None).assert_at_most(0.01, of="peak")


def test_a_value_that_is_no_number_is_within_no_bound() -> None:
    for check in (measured(float("nan")).assert_at_least, measured(float("nan")).assert_at_most):
        with pytest.raises(AssertionError):
            check(1.0)


def test_a_bound_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        measured(1e12).assert_at_least(10, unit="ms")
    assert str(error.value) == "The bound is in ms, but throughput is in FLOP/s."


@pytest.mark.parametrize("check", ["assert_at_least", "assert_at_most"])
def test_a_share_of_the_peak_with_a_unit_is_refused(check: str) -> None:
    for peak in (1000e12, None):
        with pytest.raises(UsageError) as error:
            getattr(measured(1e12, peak=peak), check)(500, of="peak", unit="TFLOP/s")
        assert str(error.value) == "A share of the peak has no unit. Drop unit='TFLOP/s' or of='peak'."


def test_a_share_of_something_else_than_the_peak_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        measured(1e12).assert_at_least(0.5, of="baseline")  # type: ignore[arg-type]
    assert str(error.value) == "of='baseline' is not something to compare with. Valid: 'peak'."
