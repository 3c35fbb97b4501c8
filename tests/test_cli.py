"""The `gpuperf` command: what each command says and does, its exit codes, and its mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import KERNEL, CommandResult, Suite, baselines_of, bytes_of_baselines, gpuperf, recorded_tests

from pytest_gpuperf import selftest
from pytest_gpuperf.commands.arguments import ERROR, GOOD, INTERRUPTED, NOT_SETTLED, REGRESSION

TWO = KERNEL + KERNEL.replace("test_kernel", "test_other").replace("TIME_S", "2e-3")
NOISY = """
def test_latency(perf):
    perf.record("latency", TIME_S, unit="s", tolerance=0.05)
"""


def two() -> Suite:
    return Suite(files={"test_suite.py": TWO})


def assert_mistake(done: CommandResult, *texts: str) -> None:
    """One readable line, exit code 1, and nothing else."""
    assert done.code == 1
    assert done.output == ""
    assert done.errors.startswith("gpuperf: ")
    assert done.errors.count("\n") == 1
    assert "Traceback" not in done.errors
    for text in texts:
        assert text in done.errors


# Wrong command lines


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("baseline", "bogus"), "No such command 'bogus'"),
        (("--bogus",), "No such option: --bogus"),
        (("baseline", "diff", "--bogus"), "No such option: --bogus"),
        (("baseline", "diff", "--results"), "--results"),
        (("baseline", "accept", "--reason"), "--reason"),
        (("baseline", "accept"), "reason"),
        (("baseline", "prune", "too", "many"), "unexpected extra argument(s) (too many)."),
        (("memory", "--model", "gpt2", "--batch-size", "x"), "Invalid value for '--batch-size': Input should be"),
        (("compare", "a.jsonl"), "Missing argument 'b'."),
        (("specs", "--compare"), "--compare"),
        (("selftest", "--device"), "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_command_line_is_one_readable_line(
    pytester: pytest.Pytester, arguments: tuple[str, ...], text: str
) -> None:
    done = gpuperf(*arguments)

    assert_mistake(done, text, "Try: gpuperf")


def test_help_that_is_offered_is_that_of_the_command() -> None:
    done = gpuperf("baseline", "accept")
    assert done.errors == "gpuperf: Missing option '--reason'. Try: gpuperf baseline accept --help\n"


@pytest.mark.parametrize("arguments", [(), ("baseline",)], ids=["none", "baseline"])
def test_command_without_arguments_explains_itself(arguments: tuple[str, ...]) -> None:
    done = gpuperf(*arguments)

    assert "Usage: " in done.output + done.errors
    assert "Commands" in done.output + done.errors


@pytest.mark.parametrize("arguments", [(), ("baseline",)], ids=["none", "baseline"])
def test_command_without_arguments_is_no_empty_error(arguments: tuple[str, ...]) -> None:
    done = gpuperf(*arguments)

    assert done.code == 1
    assert done.errors == f"gpuperf: No command was given. Try: {' '.join(('gpuperf', *arguments))} --help\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("baseline",),
        *(("baseline", name) for name in ("list", "show", "diff", "record", "accept", "prune")),
        ("specs",),
        ("selftest",),
    ],
    ids=" ".join,
)
def test_every_command_has_help(arguments: tuple[str, ...]) -> None:
    done = gpuperf(*arguments, "--help")

    assert (done.code, done.errors) == (0, "")
    assert "Usage: " in done.output


@pytest.mark.parametrize("command", ["diff", "record", "prune"])
def test_missing_results_are_explained(pytester: pytest.Pytester, command: str) -> None:
    done = gpuperf("baseline", command)

    assert_mistake(done, "No results at .gpuperf/results.jsonl. Run pytest first, or name another file.")


def test_missing_results_are_explained_to_accept(pytester: pytest.Pytester) -> None:
    assert_mistake(gpuperf("baseline", "accept", "--reason", "why"), "No results at .gpuperf/results.jsonl.")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "its first line does not describe a run"),
        (b"damaged\n", "Not a results file of pytest-gpuperf"),
        (b"\xff\xfe\n", "Not a results file of pytest-gpuperf"),
        (b"[]\n", "Not a results file of pytest-gpuperf"),
        (b'{"record":"end","tests":[],"is_whole":true}\n', "its first line does not describe a run"),
        (
            b'{"record":"run","schema":99,"run_id":"r","date":"d","visit":"v","commit":null}\n',
            "The results have schema 99",
        ),
    ],
    ids=["empty", "text", "binary", "list", "no run", "newer"],
)
def test_results_that_cannot_be_read_are_a_mistake(pytester: pytest.Pytester, content: bytes, text: str) -> None:
    path = pytester.path / "out.jsonl"
    path.write_bytes(content)

    assert_mistake(gpuperf("baseline", "diff", "--results", "out.jsonl"), text)


def test_results_that_cannot_be_read_are_named(pytester: pytest.Pytester) -> None:
    (pytester.path / "out.jsonl").write_text("damaged\n")

    assert_mistake(gpuperf("baseline", "diff", "--results", "out.jsonl"), "out.jsonl")


def test_results_that_are_a_folder_are_a_mistake(pytester: pytest.Pytester) -> None:
    assert_mistake(gpuperf("baseline", "diff", "--results", "."), "Cannot read .: Is a directory.")


def test_last_line_that_a_kill_cut_off_is_left_out(pytester: pytest.Pytester) -> None:
    two().run(pytester)
    path = pytester.path / ".gpuperf/results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])

    assert gpuperf("baseline", "record").output == "Baselines in baselines: 1 recorded.\n"


@pytest.mark.parametrize("command", ["list", "show", "diff", "record", "prune"])
def test_damaged_baseline_is_a_mistake_that_names_it(pytester: pytest.Pytester, command: str) -> None:
    two().record(pytester).run(pytester)
    path = pytester.path / "baselines/nvidia-h100-80gb-hbm3/test_suite.json"
    path.write_text("damaged")

    assert_mistake(gpuperf("baseline", command), "test_suite.json is not a sound baseline")


# Looking


def test_list_without_baselines_says_how_to_record(pytester: pytest.Pytester) -> None:
    done = gpuperf("baseline", "list")

    assert (done.code, done.errors) == (0, "")
    assert done.output == "No baselines in baselines. Run pytest, then: gpuperf baseline record\n"


def test_list_counts_tests_metrics_sessions_and_devices(pytester: pytest.Pytester) -> None:
    two().record(pytester)
    two().record(pytester, "--gpuperf-baselines=elsewhere")
    done = gpuperf("baseline", "list")

    assert done.code == 0
    assert done.output.startswith(
        "nvidia-h100-80gb-hbm3/test_suite.json: 2 tests, 2 metrics, up to 1 session on 1 device, "
    )
    assert done.output.count("\n") == 1
    assert gpuperf("baseline", "list", "--baselines", "elsewhere").output == done.output


def test_show_prints_values_sessions_and_the_reason(pytester: pytest.Pytester) -> None:
    two().record(pytester)
    two().slower().run(pytester, "--gpuperf-accept", "exact softmax")
    done = gpuperf("baseline", "show")
    lines = done.output.splitlines()

    assert done.code == 0
    assert lines[0] == "test_suite.py::test_kernel time (nvidia-h100-80gb-hbm3; cold, cuda-events; lower is better)"
    assert lines[1] == "  accepted: exact softmax"
    assert lines[2].endswith(": 1.200 ms, SM clock 345 MHz")
    assert "test_suite.py::test_other time" in lines[3]
    assert lines[4].endswith(": 2.000 ms, 2.000 ms, SM clock 345 MHz")


def test_show_says_a_configuration_once_for_the_metrics_that_share_it(pytester: pytest.Pytester) -> None:
    source = """
def test_serve(perf):
    perf.configure({"model": "gpt2"})
    perf.record("latency", 0.2, unit="s")
    perf.record("throughput", 1000.0, unit="tok/s")

def test_other(perf):
    perf.configure({"model": "gpt2"})
    perf.record("throughput", 1000.0, unit="tok/s")
"""
    Suite(files={"test_suite.py": source}).record(pytester)
    heads = [line.split()[0] for line in gpuperf("baseline", "show").output.splitlines()]
    date = heads[2]
    assert heads == [
        *("test_suite.py::test_other", "configuration:", date),
        *("test_suite.py::test_serve", "configuration:", date),
        *("test_suite.py::test_serve", date),
    ]


def test_show_of_one_test_shows_no_other(pytester: pytest.Pytester) -> None:
    two().record(pytester)
    done = gpuperf("baseline", "show", "test_other")

    assert "test_other" in done.output
    assert "test_kernel" not in done.output


def test_show_of_nothing_is_a_mistake(pytester: pytest.Pytester) -> None:
    assert_mistake(gpuperf("baseline", "show"), "No baseline of anything in baselines.")
    two().record(pytester)
    assert_mistake(gpuperf("baseline", "show", "test_nothing"), "No baseline of test_nothing in baselines.")


# Comparing


def test_diff_of_an_unchanged_run_is_good(pytester: pytest.Pytester) -> None:
    two().record(pytester).run(pytester)
    done = gpuperf("baseline", "diff")

    assert (done.code, done.errors) == (0, "")
    assert "2 of 2 metrics compared: 2 PASS." in done.output


def test_diff_of_a_slowdown_exits_with_2(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)
    done = gpuperf("baseline", "diff")

    assert done.code == 2
    assert "REGRESSED" in done.output
    assert gpuperf("baseline", "diff", "test_other").code == 0
    assert gpuperf("baseline", "diff", "test_kernel").code == 2


def test_diff_of_an_improvement_is_good(pytester: pytest.Pytester) -> None:
    two().record(pytester)
    Suite(files={"test_suite.py": TWO}, environment={"TIME_S": "0.5e-3"}).run(pytester)

    assert gpuperf("baseline", "diff").code == 0


def test_diff_without_baselines_is_not_settled(pytester: pytest.Pytester) -> None:
    two().run(pytester)
    done = gpuperf("baseline", "diff")

    assert done.code == 3
    assert "Nothing was compared: 2 NEW." in done.output


def test_diff_of_an_undecided_run_is_not_settled(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": NOISY}).record(pytester)
    Suite(files=suite.files, environment={"TIME_S": "1.06e-3"}).run(pytester)

    assert gpuperf("baseline", "diff").code == 3


def test_diff_compares_with_the_baselines_as_they_are_now(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)
    assert gpuperf("baseline", "diff").code == 2
    gpuperf("baseline", "accept", "--reason", "wanted")

    assert gpuperf("baseline", "diff").code == 0


def test_diff_of_a_test_that_did_not_run_is_a_mistake(pytester: pytest.Pytester) -> None:
    two().run(pytester)

    assert_mistake(gpuperf("baseline", "diff", "test_nothing"), "The results hold no test like test_nothing.")


# Writing


def test_record_of_one_test_records_no_other(pytester: pytest.Pytester) -> None:
    two().run(pytester)
    done = gpuperf("baseline", "record", "test_other")

    assert (done.code, done.output) == (0, "Baselines in baselines: 1 recorded.\n")
    assert recorded_tests(pytester) == ["test_suite.py::test_other"]


def test_record_refuses_a_slowdown_and_is_not_settled(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)
    done = gpuperf("baseline", "record")
    [file] = baselines_of(pytester)

    assert done.code == 3
    assert "1 recorded, 1 refused." in done.output
    assert "Refused test_kernel time: regressed: " in done.output
    assert [run.value for run in file.tests["test_kernel"]["time"].sessions[0].runs] == [1e-3]


def test_record_to_another_folder(pytester: pytest.Pytester) -> None:
    two().run(pytester, "--gpuperf-json=out.jsonl")
    done = gpuperf("baseline", "record", "--results", "out.jsonl", "--baselines", "elsewhere")

    assert done.output == "Baselines in elsewhere: 2 recorded.\n"
    assert len(recorded_tests(pytester, "elsewhere")) == 2


def test_record_into_a_file_is_a_mistake(pytester: pytest.Pytester) -> None:
    two().run(pytester)
    (pytester.path / "elsewhere").write_text("a file, where a folder should be")

    assert_mistake(gpuperf("baseline", "record", "--baselines", "elsewhere"), "elsewhere")


@pytest.mark.parametrize("reason", ["", "  "])
def test_accept_with_a_blank_reason_is_a_mistake(pytester: pytest.Pytester, reason: str) -> None:
    two().record(pytester).slower().run(pytester)
    before = bytes_of_baselines(pytester)

    assert_mistake(gpuperf("baseline", "accept", "--reason", reason), "--reason is empty. Say why the values changed")
    assert bytes_of_baselines(pytester) == before


def test_accept_begins_an_epoch_of_the_named_test_alone(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)
    done = gpuperf("baseline", "accept", "--reason", "wanted", "test_suite.py::test_kernel")
    [file] = baselines_of(pytester)

    assert (done.code, done.output) == (0, "Baselines in baselines: 1 accepted.\n")
    assert file.tests["test_kernel"]["time"].reason == "wanted"
    assert len(file.tests["test_other"]["time"].sessions[0].runs) == 1


def test_accept_of_a_whole_id_takes_no_other_test_along(pytester: pytest.Pytester) -> None:
    source = KERNEL + KERNEL.replace("test_kernel", "test_kernel_backward")
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    suite.slower().run(pytester)
    gpuperf("baseline", "accept", "--reason", "wanted", "test_suite.py::test_kernel")
    [file] = baselines_of(pytester)

    assert file.tests["test_kernel_backward"]["time"].reason is None


CHOICES = """
@pytest.mark.parametrize("n", [1, 2])
def test_a(gpu_benchmark, n):
    gpu_benchmark(lambda: TIME_S)

def test_ab(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

class TestA:
    def test_a(self, gpu_benchmark):
        gpu_benchmark(lambda: TIME_S)
"""


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        (
            "test_one.py",
            "test_one.py::TestA::test_a test_one.py::test_a[1] test_one.py::test_a[2] test_one.py::test_ab",
        ),
        ("test_one.py::test_a", "test_one.py::test_a[1] test_one.py::test_a[2]"),
        ("test_one.py::test_a[1]", "test_one.py::test_a[1]"),
        ("test_one.py::test_ab", "test_one.py::test_ab"),
        ("test_one.py::TestA::test_a", "test_one.py::TestA::test_a"),
        ("test_ab", "test_one.py::test_ab test_two.py::test_ab"),
        ("a[2]", "test_one.py::test_a[2] test_two.py::test_a[2]"),
    ],
)
def test_name_chooses_a_test_a_module_a_function_or_a_part_of_a_tests_own_name(
    pytester: pytest.Pytester, name: str, chosen: str
) -> None:
    Suite(files={"test_one.py": CHOICES, "test_two.py": CHOICES}).run(pytester)
    done = gpuperf("baseline", "record", name)

    assert (done.code, done.errors) == (0, "")
    assert sorted(recorded_tests(pytester)) == chosen.split()


@pytest.mark.parametrize("name", ["test_one", "one.py::test_a", "test_one.py::test", "test_one.py::test_a[", ".py"])
def test_part_of_an_id_that_is_no_name_chooses_nothing(pytester: pytest.Pytester, name: str) -> None:
    Suite(files={"test_one.py": CHOICES}).run(pytester)

    assert_mistake(gpuperf("baseline", "record", name), f"The results hold no test like {name}.")


def test_accept_of_a_test_that_failed_is_refused(pytester: pytest.Pytester) -> None:
    two().record(pytester)
    before = bytes_of_baselines(pytester)
    failing = Suite(files={"test_suite.py": f"{KERNEL}    assert False\n"})
    failing.slower().run(pytester)
    done = gpuperf("baseline", "accept", "--reason", "wanted")

    assert done.code == 3
    assert "Refused test_kernel time: the test failed: mend it, then update" in done.output
    assert bytes_of_baselines(pytester) == before


def test_prune_without_anything_unused_deletes_nothing(pytester: pytest.Pytester) -> None:
    two().record(pytester).run(pytester)
    before = bytes_of_baselines(pytester)
    done = gpuperf("baseline", "prune")

    assert (done.code, done.output) == (0, "0 unused baselines deleted.\n")
    assert bytes_of_baselines(pytester) == before


def test_prune_of_everything_in_a_module_removes_its_tests_alone(pytester: pytest.Pytester) -> None:
    files = {"test_one.py": KERNEL, "test_two.py": TWO}
    Suite(files=files).record(pytester)
    Suite(files={**files, "test_two.py": KERNEL.replace("test_kernel", "test_new")}).run(pytester)
    gpuperf("baseline", "prune")

    assert recorded_tests(pytester) == ["test_one.py::test_kernel"]


# Specs


def test_specs_without_gpu_say_why_and_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = gpuperf("specs")

    assert (done.code, done.errors) == (0, "")
    assert done.output.startswith("No GPU here: ")
    assert "gpuperf specs --compare h100-sxm --compare l4" in done.output


def test_specs_compare_gpus_of_the_table() -> None:
    done = gpuperf("specs", "--compare", "h100-sxm", "--compare", "l4")

    assert (done.code, done.errors) == (0, "")
    assert "H100-SXM-80" in done.output
    assert "L4" in done.output


def test_specs_of_an_unknown_gpu_are_a_mistake() -> None:
    assert_mistake(gpuperf("specs", "--compare", "h1000"), "h1000")


def test_specs_of_a_name_that_several_have_are_a_mistake() -> None:
    assert_mistake(gpuperf("specs", "--compare", "a100"), "a100")


# Selftest


def test_selftest_on_an_unknown_device_is_a_mistake() -> None:
    assert_mistake(gpuperf("selftest", "--device", "tpu"), "--device tpu does not exist. Valid: auto, cuda, cpu.")


def verdict_line(status: str) -> dict[str, object]:
    return {"status": status, "metric": "time", "reason": "", "tolerance": 0.01, "change": 0.1}


@pytest.mark.parametrize(
    ("same", "planted", "code", "text"),
    [
        ("PASS", "REGRESSED", 0, "Proven: "),
        ("PASS", "INCONCLUSIVE", 3, "Not proven here: "),
        ("REGRESSED", "REGRESSED", 2, "Not proven here: "),
    ],
)
def test_selftest_exits_by_what_it_found(
    monkeypatch: pytest.MonkeyPatch, same: str, planted: str, code: int, text: str
) -> None:
    import msgspec

    outcomes = msgspec.convert(
        [
            {"planted": 0.0, "verdicts": {"test_copy": verdict_line(same)}},
            {"planted": 0.1, "verdicts": {"test_copy": verdict_line(planted)}},
        ],
        list[selftest.Outcome],
    )
    monkeypatch.setattr(selftest, "selftest", lambda *_arguments, **_options: outcomes)
    done = gpuperf("selftest")

    assert done.code == code
    assert text in done.output
    assert "10% more work" in done.output


def test_selftest_of_which_one_process_lost_a_test_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    verdicts = {"test_copy": verdict_line("PASS"), "test_matmul": verdict_line("PASS")}
    outcomes = msgspec.convert(
        [
            {"planted": 0.0, "verdicts": verdicts},
            {"planted": 0.1, "verdicts": {"test_copy": verdict_line("REGRESSED")}},
        ],
        list[selftest.Outcome],
    )
    monkeypatch.setattr(selftest, "selftest", lambda *_arguments, **_options: outcomes)
    done = gpuperf("selftest")

    assert (done.code, done.errors) == (3, "")
    assert "Not proven here: " in done.output


# As a process


def test_exit_codes_reach_the_shell(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)
    command = str(Path(sys.executable).with_name("gpuperf"))
    codes = [
        subprocess.run([command, "baseline", *arguments], capture_output=True, check=False).returncode
        for arguments in (["diff"], ["diff", "test_other"], ["bogus"])
    ]

    assert codes == [2, 0, 1]


def test_output_that_is_piped_has_no_colours(pytester: pytest.Pytester) -> None:
    two().record(pytester).slower().run(pytester)

    assert "\x1b" not in gpuperf("baseline", "diff").output


def test_exit_codes_are_those_of_the_design() -> None:
    assert (GOOD, ERROR, REGRESSION, NOT_SETTLED, INTERRUPTED) == (0, 1, 2, 3, 130)


def test_baselines_are_plain_json_in_git(pytester: pytest.Pytester) -> None:
    two().run(pytester)
    gpuperf("baseline", "record")
    path = pytester.path / "baselines/nvidia-h100-80gb-hbm3/test_suite.json"

    assert json.loads(path.read_text())["schema"] == 1
