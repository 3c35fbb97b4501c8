"""A confirmed regression says why in its first line; what explains nothing is left out, and never hides a verdict."""

import json

import pytest
from harness import CONFIRMING, Suite, assert_readable, results_of
from test_plugin_profile import CONFTEST, KERNEL, OTHER, kernels_files


def suite_of(*sources: str, **environment: str) -> Suite:
    return Suite(
        files={"test_suite.py": "".join(sources) or KERNEL},
        conftest=CONFTEST,
        options=CONFIRMING,
        environment=environment,
    )


def slowed(pytester: pytest.Pytester, *sources: str, **environment: str) -> pytest.RunResult:
    return suite_of(*sources, TIME_S="1.5e-3", **environment).run(pytester)


def causes(pytester: pytest.Pytester) -> list[tuple[str, ...]]:
    return [verdict.causes for record in results_of(pytester).tests for verdict in record.verdicts]


def test_the_first_line_names_the_kernel_that_took_another_ones_place(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    result = slowed(pytester, KERNEL="sgemm_slow")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            (
                "test_kernel got slower on NVIDIA H100 80GB HBM3: kernel gemm replaced by sgemm_slow "
                "(fp32 without tensor cores), 100 % of the loss"
            )
        ]
    )
    assert causes(pytester) == [("kernel gemm replaced by sgemm_slow (fp32 without tensor cores), 100 % of the loss",)]
    assert_readable(result)


def test_the_same_kernel_that_takes_longer_is_named_with_both_times(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    result = slowed(pytester)
    result.stdout.fnmatch_lines(
        ["test_kernel got slower on *: kernel gemm takes 1.50 ms instead of 1.00 ms, 100 % of the loss"]
    )


def test_without_stored_kernels_the_message_is_what_it_was(pytester: pytest.Pytester) -> None:
    suite_of(BROKEN="1").record(pytester)
    assert kernels_files(pytester) == []
    result = slowed(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"test_kernel got slower on NVIDIA H100 80GB HBM3$"])
    assert causes(pytester) == [()]


def test_kernels_that_cannot_be_read_explain_nothing_and_hide_nothing(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    (path,) = (pytester.path / "baselines").glob("*/*.kernels.json")
    path.write_text("<<<<<<< ours\n")
    result = slowed(pytester)
    result.assert_outcomes(failed=1)
    assert causes(pytester) == [()]


def test_a_metric_without_kernels_is_explained_by_another_one_of_its_test(pytester: pytest.Pytester) -> None:
    source = KERNEL.replace("result.assert", "perf.record('latency', TIME_S, unit='s')\n    result.assert").replace(
        "(gpu_benchmark)", "(gpu_benchmark, perf)"
    )
    suite_of(source).record(pytester)
    slowed(pytester, source)
    assert causes(pytester) == [("kernel gemm takes 1.50 ms instead of 1.00 ms, 100 % of the loss",)] * 2


def test_a_metric_is_not_explained_by_the_kernels_of_another_configuration(pytester: pytest.Pytester) -> None:
    source = KERNEL.replace(
        "result.assert",
        "perf.configure({'batch': 128})\n    perf.record('latency', TIME_S, unit='s')\n    result.assert",
    ).replace("(gpu_benchmark)", "(gpu_benchmark, perf)")
    suite_of(source).record(pytester)
    slowed(pytester, source)
    assert causes(pytester) == [("kernel gemm takes 1.50 ms instead of 1.00 ms, 100 % of the loss",), ()]


def test_a_call_is_not_explained_by_the_kernels_of_another_call(pytester: pytest.Pytester) -> None:
    source = KERNEL.replace("result.assert", "gpu_benchmark(lambda: 2 * TIME_S, metric='twice')\n    result.assert")
    suite_of(source).record(pytester)
    (path,) = (pytester.path / "baselines").glob("*/*.kernels.json")
    stored = json.loads(path.read_text())
    del stored["tests"]["test_kernel"]["twice"]
    path.write_text(json.dumps(stored))
    slowed(pytester, source)
    assert causes(pytester) == [("kernel gemm takes 1.50 ms instead of 1.00 ms, 100 % of the loss",), ()]


def test_what_did_not_get_slower_has_no_causes(pytester: pytest.Pytester) -> None:
    suite_of(KERNEL, OTHER).record(pytester)
    suite_of(KERNEL, OTHER).run(pytester).assert_outcomes(passed=2)
    assert causes(pytester) == [(), ()]
