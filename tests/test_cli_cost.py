"""`gpuperf cost` and the pairs of `gpuperf compare` as their user runs them."""

from pathlib import Path

import pytest
from harness import CommandResult, gpuperf
from msgspec.structs import replace
from test_analysis_history import results
from test_cost import A100, measured, tokens

from pytest_gpuperf.records import Results, TestKey, TestRecord, encode


def write(path: Path, found: Results) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(encode(line) + b"\n" for line in (found.run, *found.tests)))
    return path


def record_of(parameters: str, value: float, model: str) -> TestRecord:
    test = measured(tokens(value, configuration={"model": model, "dtype": "bfloat16"}))
    return replace(test, key=TestKey(module="perf_tests/test_llm.py", test=f"test_llm[{parameters}]"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the results of a run of two models."""
    monkeypatch.chdir(tmp_path)
    models = [record_of("llama-3-8b-bf16", 1200.0, "llama-3-8b"), record_of("qwen2.5-7b-bf16", 1300.0, "qwen2.5-7b")]
    write(tmp_path / ".gpuperf" / "results.jsonl", results(0, *models))
    return tmp_path


def only_error(done: CommandResult) -> str:
    assert (done.code, done.output) == (1, ""), done
    assert done.errors.count("\n") == 1
    return done.errors


def test_last_run_costs_what_its_throughput_says() -> None:
    done = gpuperf("cost")
    assert done.code == 0, done
    lines = done.output.splitlines()
    assert lines[0] == f"{A100.name} at $4.096 per GPU-hour"
    assert [line.split()[2] for line in lines if line.startswith(" throughput")] == ["$0.9482", "$0.8753"]


def test_tests_can_be_chosen_and_the_price_be_given() -> None:
    done = gpuperf("cost", "qwen2.5-7b", "--price", "1.30", "--gpu", "A100")
    assert done.code == 0, done
    (row,) = [line.split() for line in done.output.splitlines() if line.startswith(" throughput")]
    assert row == ["throughput", "1,300", "$0.2778", "3,600,000", "-"]


def test_number_by_hand_needs_no_results(tmp_path: Path) -> None:
    (tmp_path / ".gpuperf" / "results.jsonl").unlink()
    done = gpuperf("cost", "--throughput", "200", "--gpu", "T4", "--busy", "0.5")
    assert done.code == 0, done
    assert "$0.7306" in done.output
    assert "50 % busy: $1.052 per hour of computing; $0.3653 per 1M tok is for waiting" in done.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--price", "0"), "--price 0 is not a price."),
        (("--price=-1",), "--price -1 is not a price."),
        (("--price", "1", "--instance", "g4dn.xlarge"), "--price is a price by itself."),
        (("--gpu", "T4"), f"The results are of {A100.name}, not of T4."),
        (("--instance", "g4dn.xlarge"), f"g4dn.xlarge has T4, but the throughput is of {A100.name}."),
        (("--gpus", "2"), "--busy and --gpus go with --throughput."),
        (("--busy", "0.5"), "--busy and --gpus go with --throughput."),
        (("--prices", "none.json"), "Cannot read the prices in none.json: No such file or directory."),
        (("--results", "none.jsonl"), "No results at none.jsonl."),
        (("test_nothing",), "The results hold no test like test_nothing."),
        (("test_llm", "--throughput", "5", "--gpu", "T4"), "--throughput is a number by hand, so there are no tests"),
        (("--throughput", "5"), "Whose price?"),
        (("--throughput", "many"), "Invalid value for '--throughput': Input should be a valid number"),
    ],
)
def test_a_mistake_is_one_message(arguments: tuple[str, ...], text: str) -> None:
    assert only_error(gpuperf("cost", *arguments)).startswith(f"gpuperf: {text}")


def test_a_run_that_was_killed_before_its_first_test_ended_has_no_test(here: Path) -> None:
    write(here / "early.jsonl", replace(results(0), tests=()))
    assert only_error(gpuperf("cost", "--results", "early.jsonl")) == "gpuperf: The results hold no test.\n"


def test_two_models_of_one_run_stand_side_by_side() -> None:
    run = ".gpuperf/results.jsonl"
    done = gpuperf("compare", run, run, "--pair", "llama-3-8b=qwen2.5-7b")
    lines = done.output.splitlines()
    assert lines[2] == "Configuration: model llama-3-8b -> qwen2.5-7b"
    assert lines[3] == "perf_tests/test_llm.py::test_llm[qwen2.5-7b-bf16] throughput"
    assert lines[4].split()[:4] == ["1200", "tok/s", "1300", "tok/s"]
    assert "-7.7 % (" in lines[4]  # with an interval
    assert len(lines) == 5


def test_pair_that_is_none_is_one_message() -> None:
    run = ".gpuperf/results.jsonl"
    assert "--pair 'llama' is not a pair." in only_error(gpuperf("compare", run, run, "--pair", "llama"))
    assert "A and B are the same run" in only_error(gpuperf("compare", run, run))
