"""A metric that the host sets the pace of: said, noted, and no reason for red."""

import pytest
from harness import CONFIRMING, Suite, gpuperf, verdicts_of
from msgspec.structs import replace

from pytest_gpuperf.hostlimit import is_host_limited, limited
from pytest_gpuperf.records import BaselineRun, Curve, Measurement, Method, MetricBaseline, Session, Status, Verdict

RECORDED = Method(clock="wall", mode="recorded")


def run(share: float | None) -> Measurement:
    return Measurement(
        metric="throughput",
        value=100.0,
        unit="tok/s",
        better="higher",
        kind="end-to-end",
        method=RECORDED,
        gpu_busy_share=share,
    )


def accepted(share: float | None) -> MetricBaseline:
    runs = (BaselineRun(value=100.0, gpu_busy_share=share),)
    session = Session(date="2026-11-21T00:00:00Z", visit="v", devices=("a",), environment="e", runs=runs)
    return MetricBaseline(unit="tok/s", better="higher", kind="end-to-end", method=RECORDED, sessions=(session,))


def verdict(status: Status, remark: str | None = None) -> Verdict:
    return Verdict(status=status, metric="throughput", reason="30 % slower.", tolerance=0.05, remark=remark)


def test_limit_is_nine_tenths_of_the_time() -> None:
    assert is_host_limited(0.899)
    assert not is_host_limited(0.9)
    assert not is_host_limited(None)


@pytest.mark.parametrize("status", ["REGRESSED", "INCONCLUSIVE"])
def test_slowdown_that_is_the_hosts_alone_is_noted_and_gates_nothing(status: Status) -> None:
    found = limited(verdict(status), [run(0.5), run(0.6)], accepted(0.5))
    assert (found.status, found.is_host_limited) == ("INCONCLUSIVE", True)
    assert found.remark == "limited by the host: GPU busy 55 % of the time"
    assert (
        found.reason
        == "30 % slower; limited by the host: GPU busy 55 % of the time, so this is noted and gates nothing."
    )


def test_pass_stays_a_pass_and_says_what_the_limit_is() -> None:
    found = limited(verdict("PASS", "best at batch size 8"), [run(0.5)], None)
    assert (found.status, found.reason, found.is_host_limited) == ("PASS", "30 % slower.", True)
    assert found.remark == "best at batch size 8; limited by the host: GPU busy 50 % of the time"


def test_host_that_became_the_limit_is_red_with_both_shares() -> None:
    found = limited(verdict("REGRESSED"), [run(0.7)], accepted(0.97))
    assert (found.status, found.is_host_limited) == ("REGRESSED", False)
    assert found.remark == "limited by the host: GPU busy 70 % of the time, 97 % in the baseline"


def test_curve_that_gives_out_early_is_not_the_hosts_doing() -> None:
    """Small batches leave the GPU waiting, and memory is short all the same."""
    early = replace(run(0.5), curve=Curve(x="batch size", points={"1": 90.0}, end="out of memory at 8: full"))
    (session,) = accepted(0.5).sessions
    whole = replace(session, runs=(replace(session.runs[0], points={"1": 100.0, "8": 700.0}),))
    found = limited(verdict("REGRESSED"), [early], replace(accepted(0.5), sessions=(whole,)))
    assert (found.status, found.is_host_limited) == ("REGRESSED", False)
    assert found.remark == "limited by the host: GPU busy 50 % of the time"
    full = replace(early, curve=Curve(x="batch size", points={"1": 90.0, "8": 700.0}))
    assert limited(verdict("REGRESSED"), [full], replace(accepted(0.5), sessions=(whole,))).status == "INCONCLUSIVE"


@pytest.mark.parametrize("share", [0.95, None])
def test_busy_gpu_and_unknown_share_change_nothing(share: float | None) -> None:
    assert limited(verdict("REGRESSED"), [run(share)], accepted(0.5)) == verdict("REGRESSED")


def test_baseline_without_a_share_does_not_contradict_the_host() -> None:
    assert limited(verdict("REGRESSED"), [run(0.5)], accepted(None)).status == "INCONCLUSIVE"


# As a user sees it

SERVING = """
@pytest.mark.perf(tolerance=0.05)
def test_serve(perf):
    perf.record("throughput", 1 / TIME_S, unit="tok/s", gpu_busy_share=float(os.environ["BUSY"]))
"""


def serving(busy: str, time_s: str = "1e-3") -> Suite:
    return Suite(files={"test_suite.py": SERVING}, environment={"BUSY": busy, "TIME_S": time_s})


def test_host_limited_slowdown_is_not_measured_again_and_fails_nothing_even_under_strict(
    pytester: pytest.Pytester,
) -> None:
    for _ in range(3):
        serving("0.5").record(pytester)
    result = serving("0.5", "2e-3").run(pytester, "--gpuperf-strict", *CONFIRMING)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*INCONCLUSIVE host", "  limited by the host: GPU busy 50 % of the time"])
    assert verdicts_of(pytester)["test_serve throughput"].runs == 1


def test_gpu_that_waits_where_it_did_not_is_red(pytester: pytest.Pytester) -> None:
    for _ in range(3):
        serving("0.97").record(pytester)
    result = serving("0.6", "2e-3").run(pytester, *CONFIRMING)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*limited by the host: GPU busy 60 % of the time, 97 % in the baseline*"])


def test_what_the_host_alone_decides_is_settled_for_baseline_diff(pytester: pytest.Pytester) -> None:
    serving("0.5").record(pytester)
    serving("0.5", "2e-3").run(pytester)
    assert verdicts_of(pytester)["test_serve throughput"].status == "INCONCLUSIVE"
    assert gpuperf("baseline", "diff").code == 0


def test_new_sessions_of_a_host_limited_metric_are_recorded_whatever_they_are(pytester: pytest.Pytester) -> None:
    serving("0.5").record(pytester)
    result = serving("0.5", "2e-3").run(pytester, "--gpuperf-update")
    result.stdout.fnmatch_lines(["*1 recorded*"])


def test_junit_names_the_host(pytester: pytest.Pytester) -> None:
    serving("0.5").run(pytester, "--junitxml=junit.xml")
    assert '"gpuperf.throughput.limited_by" value="host"' in (pytester.path / "junit.xml").read_text()
