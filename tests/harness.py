"""A small performance suite to run under pytest, and the `gpuperf` command, both without a GPU."""

import contextlib
import importlib
import io
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import pytest_gpuperf
from pytest_gpuperf import cli
from pytest_gpuperf.baseline_file import list_files, read
from pytest_gpuperf.records import BaselineFile, Results, Verdict
from pytest_gpuperf.report.results import read_results

# pytester forgets what an inner run imported: it costs time again and again, and numpy cannot be imported twice.
for _module in pkgutil.walk_packages(pytest_gpuperf.__path__, "pytest_gpuperf."):
    importlib.import_module(_module.name)
for _name in ("numpy", "filelock"):
    importlib.import_module(_name)

#: A machine with one H100, on which a callable's return value is the time that it took in seconds.
FAKE_H100 = """
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import fake_machine

def pytest_configure(config):
    config.stash[machine_key] = fake_machine()
"""

#: Imports that every module below gets, and the time that its kernels pretend to take.
_HEADER = """
import os
import pytest

TIME_S = float(os.environ.get("TIME_S", "1e-3"))
"""

#: Without plugins that have nothing to do here: hypothesis would double the time of a run by its import, and
#: unraisableexception by collecting this process's garbage five times.
_QUICK = ("-p", "no:hypothesispytest", "-p", "no:unraisableexception")

#: Judged by one run, as most behaviour is the same for; what measures again says so: `options=CONFIRMING`.
_ONCE = ("--gpuperf-budget", "0")
CONFIRMING = ("--gpuperf-budget", "60")

#: Variables by which pytest-benchmark believes to be under xdist, when it is these tests that are.
_OF_A_WORKER = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")

#: Variables that would hide fake GPUs.
_OF_THE_HOST = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES")

#: One test with one kernel of a millisecond, unless the variable TIME_S says otherwise.
KERNEL = """
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""

#: What makes `KERNEL` a fifth slower.
SLOW = {"TIME_S": "1.2e-3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Files of a user's suite, and how pytest is started on them.

    Attributes:
        files: Path -> source; modules of tests get `os`, `pytest` and `TIME_S`.
        conftest: Source of the conftest; by default one fake H100.
        options: Options of every run.
        environment: Variables of every run.
        is_subprocess: Start a process of its own, instead of running inside this one.
        has_cache: Keep what --stepwise and --last-failed need.
    """

    files: Mapping[str, str] = field(default_factory=lambda: {"test_suite.py": KERNEL})
    conftest: str = FAKE_H100
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_subprocess: bool = False
    has_cache: bool = False

    def with_options(self, *options: str) -> "Suite":
        """The same suite, started with more options."""
        return replace(self, options=(*self.options, *options))

    def slower(self) -> "Suite":
        """The same suite with kernels that take 20 % longer."""
        return replace(self, environment={**self.environment, **SLOW})

    def in_subprocess(self) -> "Suite":
        """The same suite in processes of its own."""
        return replace(self, is_subprocess=True)

    def run(self, pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
        """Write the files and run pytest on them."""
        self._write(pytester.path)
        start = pytester.runpytest_subprocess if self.is_subprocess else pytester.runpytest_inprocess
        variables = {"COLUMNS": "100", "GPUPERF_LOCK_DIR": str(pytester.path / ".locks"), **self.environment}
        with pytest.MonkeyPatch.context() as patch:
            for name in (*_OF_A_WORKER, *_OF_THE_HOST):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            cache = () if self.has_cache else ("-p", "no:cacheprovider")
            return start(*_QUICK, *_ONCE, *cache, *self.options, *options)

    def record(self, pytester: pytest.Pytester, *options: str) -> "Suite":
        """Run once and make what was measured the baselines."""
        result = self.run(pytester, "--gpuperf-update", *options)
        assert result.ret == pytest.ExitCode.OK, result.stdout.str()
        return self

    def _write(self, folder: Path) -> None:
        (folder / "conftest.py").write_text(self.conftest)
        for name, source in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_HEADER + source if path.name.startswith("test_") else source)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What the `gpuperf` command said."""

    code: int
    output: str
    errors: str


def gpuperf(*arguments: str) -> CommandResult:
    """Run the command in this process and the current folder."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpuperf", *arguments])
        patch.setenv("COLUMNS", "100")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
            cli.main()
    code = end.value.code
    assert isinstance(code, int)
    return CommandResult(code=code, output=output.getvalue(), errors=errors.getvalue())


def results_of(pytester: pytest.Pytester, name: str = ".gpuperf/results.jsonl") -> Results:
    """The results file of the last run."""
    return read_results(pytester.path / name)


def verdicts_of(pytester: pytest.Pytester) -> dict[str, Verdict]:
    """Test and metric -> verdict of the last run."""
    return {f"{t.key.test} {v.metric}": v for t in results_of(pytester).tests for v in t.verdicts}


def statuses_of(pytester: pytest.Pytester) -> dict[str, str]:
    """Test and metric -> status of the last run."""
    return {name: verdict.status for name, verdict in verdicts_of(pytester).items()}


def baselines_of(pytester: pytest.Pytester, folder: str = "baselines") -> list[BaselineFile]:
    """All baseline files, by path."""
    files = [read(path) for path in list_files(pytester.path / folder)]
    return [file for file in files if file is not None]


def recorded_tests(pytester: pytest.Pytester, folder: str = "baselines") -> list[str]:
    """Names of the tests that have baselines."""
    return [f"{file.module}::{test}" for file in baselines_of(pytester, folder) for test in file.tests]


def bytes_of_baselines(pytester: pytest.Pytester, folder: str = "baselines") -> dict[str, bytes]:
    """Every baseline file as it is on disk."""
    return {path.as_posix(): path.read_bytes() for path in list_files(pytester.path / folder)}


def assert_readable(result: pytest.RunResult) -> None:
    """No traceback from inside the plugin, no crash of pytest."""
    text = result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in text
    assert not re.search(r"pytest_gpuperf/\w+(/\w+)*\.py", text), text
