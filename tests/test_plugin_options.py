"""The `--gpuperf-*` options: what each does, and what is refused."""

import fnmatch
import json
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from harness import (
    FAKE_H100,
    KERNEL,
    Suite,
    assert_readable,
    baselines_of,
    bytes_of_baselines,
    recorded_tests,
    results_of,
    statuses_of,
    verdicts_of,
)

#: Records a number and measures nothing, so that the real CPU is quick.
RECORDED = """
def test_latency(perf):
    perf.record("latency", TIME_S, unit="s")
"""

#: One H100 whose hardware slowed it down for its heat, ever more.
HOT_H100 = """
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_state

def pytest_configure(config):
    states = [fake_state(hw_thermal_s=100.0 * count) for count in range(50)]
    nvml = FakeNvml(fake_gpu(), states=states)
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""

#: The kernel pretends to take more time than the tolerance allows, but not more than its noise explains.
NOISY = """
def test_latency(perf):
    perf.record("latency", TIME_S, unit="s", tolerance={tolerance})
"""


def error_of(result: pytest.RunResult) -> str:
    """What pytest says was wrong with the command line."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str() + result.stderr.str()
    assert_readable(result)
    return result.stderr.str() + result.stdout.str()


# Values that make no sense


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "-inf", "abc", "", "1s", "1,5"])
def test_budget_that_is_no_number_of_seconds_is_refused(pytester: pytest.Pytester, seconds: str) -> None:
    error = error_of(Suite().run(pytester, f"--gpuperf-budget={seconds}"))

    assert f"--gpuperf-budget {seconds} is not a number of seconds, zero or more." in error
    assert not (pytester.path / ".gpuperf").exists()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama-9", "--gpuperf-model: The model 'llama-9' is no preset and no folder. Presets: gpt2, *, tiny; or a*"),
        (".", "--gpuperf-model: The model '.' is a folder without a config.json. Presets: gpt2,*"),
        ("", "--gpuperf-model is empty: is the variable that it comes from set? Name a model."),
    ],
)
def test_model_that_is_none_is_refused_before_anything_runs(pytester: pytest.Pytester, model: str, text: str) -> None:
    error = error_of(Suite().run(pytester, f"--gpuperf-model={model}"))

    assert fnmatch.filter(error.splitlines(), f"ERROR: {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a", "--gpuperf-vllm-args is no JSON (Expecting property name*): {a"),
        ("[1]", "--gpuperf-vllm-args is no JSON object of names and values: [[]1[]]"),
        (
            '{"max_num_seqs": 8}',
            "--gpuperf-vllm-args: 'max_num_seqs' is a field of EngineConfig, which each test states itself. Give *",
        ),
        ('{"hf_token": "hf_abc"}', "--gpuperf-vllm-args: 'hf_token' is a secret, *"),
    ],
)
def test_arguments_of_vllm_that_are_none_are_refused(pytester: pytest.Pytester, text: str, message: str) -> None:
    error = error_of(Suite().run(pytester, f"--gpuperf-vllm-args={text}"))

    assert fnmatch.filter(error.splitlines(), f"ERROR: {message}")


@pytest.mark.parametrize("model", ["llama-3-8b", "some-org/some-model", "folder"])
def test_model_reaches_the_tests(pytester: pytest.Pytester, model: str) -> None:
    (pytester.mkdir("folder") / "config.json").write_text("{}")
    source = f"""
    def test_model(pytestconfig):
        from pytest_gpuperf.plugin import settings_key
        assert pytestconfig.stash[settings_key].model.endswith({model!r})
    """
    suite = Suite(files={"test_suite.py": textwrap.dedent(source)})

    assert suite.run(pytester, f"--gpuperf-model={model}").ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("option", "valid"),
    [
        ("--gpuperf-device=gpu", ("auto", "cuda", "cpu")),
        ("--gpuperf-missing=ignore", ("pass", "warn", "fail")),
        ("--gpuperf-inconclusive=ignore", ("pass", "warn", "fail")),
        ("--gpuperf-invalid=ignore", ("pass", "warn", "fail")),
    ],
)
def test_unknown_choice_is_refused_with_the_valid_ones(
    pytester: pytest.Pytester, option: str, valid: tuple[str, ...]
) -> None:
    error = error_of(Suite().run(pytester, option))

    assert all(choice in error for choice in valid)


@pytest.mark.parametrize("option", ["--gpuperf-updte", "--gpuperf-update=yes", "--gpuperf-accept", "--gpuperf-json"])
def test_unknown_option_or_missing_value_is_refused(pytester: pytest.Pytester, option: str) -> None:
    assert "--gpuperf" in error_of(Suite().run(pytester, option))


@pytest.mark.parametrize("reason", ["", "   ", "\t"])
def test_accepting_without_a_reason_is_refused(pytester: pytest.Pytester, reason: str) -> None:
    error = error_of(Suite().run(pytester, f"--gpuperf-accept={reason}"))

    assert "--gpuperf-accept needs a reason, such as --gpuperf-accept '" in error


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--gpuperf-device=cpu", "--gpuperf-require-gpu"),
            "--gpuperf-device cpu contradicts --gpuperf-require-gpu. Drop one of them.",
        ),
        (("--gpuperf-disable", "--gpuperf-update"), "--gpuperf-disable measures nothing that could be recorded."),
        (("--gpuperf-disable", "--gpuperf-accept=why"), "--gpuperf-disable measures nothing that could be recorded."),
        (("--gpuperf-patch=a.patch", "--gpuperf-update"), "--gpuperf-patch writes a patch instead of the baselines."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_contradiction_is_refused(pytester: pytest.Pytester, options: tuple[str, ...], text: str) -> None:
    assert text in error_of(Suite().run(pytester, *options))
    assert not (pytester.path / "baselines").exists()


def test_patch_of_a_run_that_measures_nothing_is_refused(pytester: pytest.Pytester) -> None:
    error = error_of(Suite().run(pytester, "--gpuperf-disable", "--gpuperf-patch=a.patch"))

    assert "--gpuperf-disable measures nothing that a patch could hold. Drop one of the options." in error
    assert not (pytester.path / "a.patch").exists()


# Updating and accepting


def test_update_records_and_says_so(pytester: pytest.Pytester) -> None:
    result = Suite().run(pytester, "--gpuperf-update")

    result.stdout.fnmatch_lines(["Nothing was compared: 1 NEW.", "Baselines in *baselines: 1 recorded."])
    result.stdout.no_fnmatch_line("*Record the new ones*")
    assert recorded_tests(pytester) == ["test_suite.py::test_kernel"]


def test_update_adds_to_what_is_there(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    suite.run(pytester, "--gpuperf-update").assert_outcomes(passed=1)
    [file] = baselines_of(pytester)
    [session] = file.tests["test_kernel"]["time"].sessions

    assert len(session.runs) == 2


def test_update_does_not_take_a_slowdown(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    before = bytes_of_baselines(pytester)
    result = suite.slower().run(pytester, "--gpuperf-update")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["Baselines in *: 1 refused.", "Refused test_kernel time: regressed: accept it with*"])
    assert bytes_of_baselines(pytester) == before


def test_update_does_not_take_an_improvement(pytester: pytest.Pytester) -> None:
    Suite().record(pytester)
    before = bytes_of_baselines(pytester)
    result = Suite(environment={"TIME_S": "0.5e-3"}).run(pytester, "--gpuperf-update")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Refused test_kernel time: improved: accept it with*"])
    assert bytes_of_baselines(pytester) == before


def test_update_does_not_take_the_values_of_a_failing_test(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": f"{KERNEL}    assert False\n"}).run(pytester, "--gpuperf-update")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["Refused test_kernel time: the test failed: mend it, then update"])
    assert recorded_tests(pytester) == []


def test_update_leaves_the_tests_alone_that_did_not_run(pytester: pytest.Pytester) -> None:
    source = KERNEL + KERNEL.replace("test_kernel", "test_other")
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    suite.run(pytester, "--gpuperf-update", "-k", "other").assert_outcomes(passed=1, deselected=1)
    [file] = baselines_of(pytester)

    assert {name: len(file.tests[name]["time"].sessions[0].runs) for name in file.tests} == {
        "test_kernel": 1,
        "test_other": 2,
    }


def test_accept_takes_a_slowdown_and_keeps_the_reason(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    result = suite.slower().run(pytester, "--gpuperf-accept", "exact softmax, #12")
    [file] = baselines_of(pytester)
    baseline = file.tests["test_kernel"]["time"]

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Baselines in *: 1 accepted."])
    assert baseline.reason == "exact softmax, #12"
    assert [run.value for session in baseline.sessions for run in session.runs] == [1.2e-3]
    assert suite.slower().run(pytester).ret == 0
    assert suite.run(pytester).ret == 0  # faster than what was accepted


def test_accept_of_a_failing_test_is_refused(pytester: pytest.Pytester) -> None:
    Suite().record(pytester)
    before = bytes_of_baselines(pytester)
    failing = Suite(files={"test_suite.py": f"{KERNEL}    assert False\n"})
    result = failing.slower().run(pytester, "--gpuperf-accept", "why not")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["Refused test_kernel time: the test failed: mend it, then update"])
    assert bytes_of_baselines(pytester) == before


def test_accept_records_what_is_new(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--gpuperf-accept", "the first").assert_outcomes(passed=1)

    assert recorded_tests(pytester) == ["test_suite.py::test_kernel"]


# Where things are


def test_baselines_are_read_and_written_where_the_option_says(pytester: pytest.Pytester) -> None:
    suite = Suite(options=("--gpuperf-baselines", "some where/else")).record(pytester)

    assert recorded_tests(pytester, "some where/else") == ["test_suite.py::test_kernel"]
    assert not (pytester.path / "baselines").exists()
    assert suite.slower().run(pytester).ret == 1


def test_results_are_written_where_the_option_says(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--gpuperf-json", "deep/er/out.jsonl")
    results = results_of(pytester, "deep/er/out.jsonl")

    assert [str(test.key) for test in results.tests] == ["test_suite.py::test_kernel"]
    assert results.end is not None
    assert results.end.is_whole
    assert not (pytester.path / ".gpuperf").exists()


def test_results_are_json_lines_of_the_run_each_test_what_it_leased_and_the_end(pytester: pytest.Pytester) -> None:
    Suite().run(pytester)
    lines = (pytester.path / ".gpuperf/results.jsonl").read_text().splitlines()

    assert [json.loads(line)["record"] for line in lines] == ["run", "test", "lease", "end"]
    assert (pytester.path / ".gpuperf/.gitignore").read_text() == "*\n"


def test_results_of_the_last_run_are_replaced(pytester: pytest.Pytester) -> None:
    Suite().run(pytester)
    Suite(files={"test_suite.py": KERNEL.replace("test_kernel", "test_other")}).run(pytester)

    assert [test.key.test for test in results_of(pytester).tests] == ["test_other"]


def test_run_that_measures_nothing_keeps_the_results_of_the_last_one(pytester: pytest.Pytester) -> None:
    Suite().run(pytester)
    Suite().run(pytester, "-k", "nothing")

    assert [test.key.test for test in results_of(pytester).tests] == ["test_kernel"]


@pytest.mark.parametrize("label", ["pool-a", "Pool A", "../../etc", "münchen", "a/b\\c"])
def test_runner_pool_has_baselines_of_its_own(pytester: pytest.Pytester, label: str) -> None:
    Suite().record(pytester)
    pool = Suite(options=("--gpuperf-key", label))
    pool.slower().record(pytester)
    folders = [path for path in (pytester.path / "baselines").iterdir() if path.is_dir()]

    assert len(folders) == 2
    assert pool.slower().run(pytester).ret == 0
    assert Suite().run(pytester).ret == 0
    assert not any(path.name.startswith(("etc", "passwd")) for path in pytester.path.parent.iterdir())


@pytest.mark.parametrize("label", ["", "  "])
def test_empty_label_is_refused(pytester: pytest.Pytester, label: str) -> None:
    assert "--gpuperf-key is empty: " in error_of(Suite().run(pytester, f"--gpuperf-key={label}"))


# A patch


def git(folder: Path, *arguments: str) -> str:
    command = shutil.which("git")
    if command is None:
        pytest.skip("git is not installed")
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run([command, *identity, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(pytester: pytest.Pytester) -> Path:
    git(pytester.path, "init", "--quiet")
    return pytester.path


def test_patch_makes_new_values_the_baselines(pytester: pytest.Pytester, repository: Path) -> None:
    result = Suite().run(pytester, "--gpuperf-patch", "out/new.patch")

    result.stdout.fnmatch_lines(["Patch for git apply: *new.patch: 1 recorded."])
    result.stdout.no_fnmatch_line("*Record the new ones*")
    assert recorded_tests(pytester) == []
    git(repository, "apply", "--check", "out/new.patch")
    git(repository, "apply", "out/new.patch")
    assert recorded_tests(pytester) == ["test_suite.py::test_kernel"]
    assert Suite().run(pytester).ret == 0


def test_patch_accepts_a_slowdown_when_it_is_applied(pytester: pytest.Pytester, repository: Path) -> None:
    suite = Suite().record(pytester)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "baselines")
    before = bytes_of_baselines(pytester)
    result = suite.slower().run(pytester, "--gpuperf-patch", "slow.patch", "--gpuperf-accept", "wanted")

    assert result.ret == 0
    assert bytes_of_baselines(pytester) == before
    git(repository, "apply", "--index", "slow.patch")
    assert suite.slower().run(pytester).ret == 0
    assert baselines_of(pytester)[0].tests["test_kernel"]["time"].reason == "wanted"


def test_patch_without_accepting_leaves_a_slowdown_red(pytester: pytest.Pytester, repository: Path) -> None:
    suite = Suite().record(pytester)
    result = suite.slower().run(pytester, "--gpuperf-patch", "slow.patch")

    result.assert_outcomes(failed=1)
    git(repository, "apply", "slow.patch")
    assert suite.slower().run(pytester).ret == 0
    assert str(baselines_of(pytester)[0].tests["test_kernel"]["time"].reason).startswith(
        "accepted by applying the patch"
    )


def test_patch_applies_from_the_top_of_a_repository_that_holds_the_suite(
    pytester: pytest.Pytester, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = pytester.mkdir("inner")
    (inner / "pytest.ini").write_text("[pytest]\n")
    (inner / "conftest.py").write_text(FAKE_H100)
    suite = Suite(files={"inner/test_suite.py": KERNEL}, conftest="")
    monkeypatch.chdir(inner)
    suite.run(pytester, "--gpuperf-patch", "../new.patch").assert_outcomes(passed=1)
    git(repository, "apply", "new.patch")

    assert recorded_tests(pytester, "inner/baselines") == ["test_suite.py::test_kernel"]


# Policies


def test_strict_fails_what_is_new(pytester: pytest.Pytester) -> None:
    result = Suite().run(pytester, "--gpuperf-strict")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["test_kernel on NVIDIA H100 80GB HBM3:", "  time is NEW: No baseline on this device.", "FAILED *test_kernel*"]
    )
    assert_readable(result)


def test_strict_passes_what_is_compared(pytester: pytest.Pytester) -> None:
    Suite().record(pytester).run(pytester, "--gpuperf-strict").assert_outcomes(passed=1)


def test_strict_update_records_what_is_new(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--gpuperf-strict", "--gpuperf-update").assert_outcomes(passed=1)

    assert recorded_tests(pytester) == ["test_suite.py::test_kernel"]


@pytest.mark.parametrize(("policy", "failed"), [("pass", 0), ("warn", 0), ("fail", 1)])
def test_missing_baseline_does_what_the_option_says(pytester: pytest.Pytester, policy: str, failed: int) -> None:
    result = Suite().run(pytester, f"--gpuperf-missing={policy}")

    result.assert_outcomes(passed=1 - failed, failed=failed)


@pytest.mark.parametrize(("policy", "failed"), [("pass", 0), ("warn", 0), ("fail", 1)])
def test_incomparable_value_counts_as_missing(pytester: pytest.Pytester, policy: str, failed: int) -> None:
    Suite(files={"test_suite.py": "@pytest.mark.perf(mode='cold')" + KERNEL}).record(pytester)
    suite = Suite(files={"test_suite.py": "@pytest.mark.perf(mode='hot')" + KERNEL})
    result = suite.run(pytester, f"--gpuperf-missing={policy}")

    result.assert_outcomes(passed=1 - failed, failed=failed)
    result.stdout.fnmatch_lines(["Nothing was compared: 1 INCOMPARABLE."])
    assert explains(result, "INCOMPARABLE test_kernel time: Not comparable: method *") == (policy != "pass")


def explains(result: pytest.RunResult, line: str) -> bool:
    """Whether the report has a line like this."""
    return any(fnmatch.fnmatch(each, line) for each in result.stdout.lines)


def inconclusive(pytester: pytest.Pytester) -> Suite:
    """A suite whose next run is above its tolerance by less than the noise."""
    suite = Suite(files={"test_suite.py": NOISY.format(tolerance=0.05)}).record(pytester)
    return Suite(files=suite.files, environment={"TIME_S": "1.06e-3"})


@pytest.mark.parametrize(("policy", "failed"), [("pass", 0), ("warn", 0), ("fail", 1)])
def test_undecided_value_does_what_the_option_says(pytester: pytest.Pytester, policy: str, failed: int) -> None:
    result = inconclusive(pytester).run(pytester, f"--gpuperf-inconclusive={policy}")

    assert statuses_of(pytester) == {"test_latency latency": "INCONCLUSIVE"}
    result.assert_outcomes(passed=1 - failed, failed=failed)
    result.stdout.fnmatch_lines(["1 of 1 metrics compared: 1 INCONCLUSIVE."])
    assert explains(result, "INCONCLUSIVE test_latency latency: *not settled by 1 run*") == (policy != "pass")


def test_strict_fails_what_is_undecided(pytester: pytest.Pytester) -> None:
    result = inconclusive(pytester).run(pytester, "--gpuperf-strict")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  latency is INCONCLUSIVE: 6.0 % slower *"])


def low_power(pytester: pytest.Pytester) -> Suite:
    """A suite whose tolerance is smaller than its noise, and whose next run is within it."""
    return Suite(files={"test_suite.py": NOISY.format(tolerance=0.001)}).record(pytester)


def test_weak_pass_is_marked_and_passes(pytester: pytest.Pytester) -> None:
    result = low_power(pytester).run(pytester)

    result.assert_outcomes(passed=1)
    assert verdicts_of(pytester)["test_latency latency"].is_low_power
    result.stdout.fnmatch_lines([" latency *PASS low power"])


def test_strict_fails_a_weak_pass(pytester: pytest.Pytester) -> None:
    result = low_power(pytester).run(pytester, "--gpuperf-strict")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  latency is INCONCLUSIVE (low power): *low power: sees * at best*"])


@pytest.mark.parametrize(("policy", "failed"), [("pass", 0), ("warn", 0), ("fail", 1)])
def test_unwell_gpu_does_what_the_option_says(pytester: pytest.Pytester, policy: str, failed: int) -> None:
    result = Suite(conftest=HOT_H100).run(pytester, f"--gpuperf-invalid={policy}")

    assert statuses_of(pytester) == {"test_kernel time": "INVALID"}
    result.assert_outcomes(passed=1 - failed, failed=failed)
    result.stdout.fnmatch_lines(["Nothing was compared: 1 INVALID."])
    cause = "thermal slowdown by the hardware for * % of the time"
    assert explains(result, f"INVALID test_kernel time: {cause}") == (policy != "pass")


def test_strict_fails_on_an_unwell_gpu(pytester: pytest.Pytester) -> None:
    Suite(conftest=HOT_H100).run(pytester, "--gpuperf-strict").assert_outcomes(failed=1)


def test_policy_of_its_own_wins_over_strict(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--gpuperf-strict", "--gpuperf-missing=pass").assert_outcomes(passed=1)


@pytest.mark.parametrize("policy", ["pass", "warn", "fail"])
def test_no_policy_lets_a_slowdown_pass(pytester: pytest.Pytester, policy: str) -> None:
    suite = Suite().record(pytester)
    options = [f"--gpuperf-{name}={policy}" for name in ("missing", "inconclusive", "invalid")]

    suite.slower().run(pytester, *options).assert_outcomes(failed=1)


def test_value_measured_on_an_unwell_gpu_is_not_recorded_whatever_the_policy(pytester: pytest.Pytester) -> None:
    result = Suite(conftest=HOT_H100).run(pytester, "--gpuperf-update", "--gpuperf-invalid=pass")

    result.stdout.fnmatch_lines(["Refused test_kernel time: invalid: thermal slowdown *"])
    assert recorded_tests(pytester) == []


def test_policy_that_is_not_named_warns(pytester: pytest.Pytester) -> None:
    result = inconclusive(pytester).run(pytester)

    result.assert_outcomes(passed=1)
    assert explains(result, "INCONCLUSIVE test_latency latency: *")


def test_pass_of_one_kind_of_verdict_silences_no_other(pytester: pytest.Pytester) -> None:
    result = inconclusive(pytester).run(pytester, "--gpuperf-missing=pass", "--gpuperf-invalid=pass")

    assert explains(result, "INCONCLUSIVE test_latency latency: *")


# Devices


def on_this_machine(*options: str, source: str = RECORDED) -> Suite:
    """A suite on what is here: a CPU, and no GPU that could be seen."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return Suite(files={"test_suite.py": source}, conftest="", options=options, environment=hidden)


def test_without_gpu_the_cpu_is_measured_and_the_summary_says_why(pytester: pytest.Pytester) -> None:
    result = on_this_machine().run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Measured on the CPU: *", " latency*NEW"])


def test_cpu_by_choice_is_not_explained(pytester: pytest.Pytester) -> None:
    result = on_this_machine("--gpuperf-device=cpu").run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*Measured on the CPU*")


def test_gpu_that_is_required_and_missing_is_an_error_not_a_skip(pytester: pytest.Pytester) -> None:
    result = on_this_machine("--gpuperf-require-gpu").run(pytester)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_latency: --gpuperf-require-gpu, but there is no GPU. *"])
    assert_readable(result)


def test_gpu_that_is_required_and_too_small_is_an_error(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": f"@pytest.mark.gpu(min_vram_gb=90){KERNEL}"})
    result = suite.run(pytester, "--gpuperf-require-gpu")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_kernel: *gpu(min_vram_gb=90)*85.5* GB*"])


def test_required_gpu_does_not_concern_plain_tests(pytester: pytest.Pytester) -> None:
    result = on_this_machine("--gpuperf-require-gpu", source="def test_plain(): pass").run(pytester)

    result.assert_outcomes(passed=1)


def test_required_gpu_that_is_there_is_measured(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--gpuperf-require-gpu").assert_outcomes(passed=1)


def test_cuda_without_gpu_is_an_error_that_names_the_option(pytester: pytest.Pytester) -> None:
    result = on_this_machine("--gpuperf-device=cuda").run(pytester)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--gpuperf-device cuda, but there is no GPU. *"])
    assert_readable(result)


def test_cuda_without_gpu_does_not_concern_plain_tests(pytester: pytest.Pytester) -> None:
    on_this_machine("--gpuperf-device=cuda", source="def test_plain(): pass").run(pytester).assert_outcomes(passed=1)


def test_disable_measures_and_judges_nothing(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    result = suite.slower().run(pytester, "--gpuperf-disable", "-rs")

    assert result.ret == 0
    result.stdout.no_fnmatch_line("*GPU performance*")


def test_disable_skips_the_tests_that_measure_as_its_help_says(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    open("something-ran", "w").close()

def test_plain(): pass
"""
    suite = Suite(files={"test_suite.py": source})

    suite.run(pytester, "--gpuperf-disable").assert_outcomes(passed=1, skipped=1)
    assert not (pytester.path / "something-ran").exists()
    suite.run(pytester, "--help").stdout.fnmatch_lines(["  --gpuperf-disable*skip the tests that measure"])


def test_options_stand_in_the_help(pytester: pytest.Pytester) -> None:
    result = Suite().run(pytester, "--help")
    names = (
        "update accept baselines strict require-gpu device key json patch budget missing inconclusive invalid disable"
    )

    result.stdout.fnmatch_lines(["GPU performance:"])
    for name in names.split():
        result.stdout.fnmatch_lines([f"  --gpuperf-{name}*"])
