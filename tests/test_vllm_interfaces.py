"""What several versions of vLLM have, looked up in their sources."""

from pathlib import Path

import pytest

from benchmarks.llm.vllm_interfaces import INTERFACES, Interface, Row, Sources, has, main, rows_of, table, takes

_LLM = """
from typing import overload
from vllm.entrypoints.offline import Offline

class LLM(Offline):
    def __init__(self, model, **kwargs):
        llm_engine = self.other = None

    @overload
    def generate(self, one): ...

    def generate(self, prompts, sampling=None, *, use_tqdm=True, {more}): ...
"""
_OFFLINE = """
from .base import Base

class Offline(Base):
    def start_profile(self, prefix=None): ...
"""


def _sources(folder: Path, *, version: str = "0.40.0", more: str = "seed=0") -> Sources:
    root = folder / version / "vllm"
    (root / "entrypoints").mkdir(parents=True)
    (root / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    (root / "entrypoints" / "llm.py").write_text(_LLM.replace("{more}", more))
    (root / "entrypoints" / "offline.py").write_text(_OFFLINE)
    (root / "entrypoints" / "base.py").write_text("class Base:\n    kept: int = 0\n")
    return Sources(root.parent)


def test_members_are_found_in_bases_of_other_modules(tmp_path: Path) -> None:
    """Imported by their full name or from beside; a local name of a method is no member."""
    look = has("entrypoints/llm.py", "LLM", "other", "start_profile", "kept", "llm_engine")
    assert look(_sources(tmp_path)) == ["no llm_engine"]


@pytest.mark.parametrize(("more", "lacks"), [("seed=0", []), ("seed", ["needs seed"])])
def test_a_method_that_asks_for_more_is_different(tmp_path: Path, more: str, lacks: list[str]) -> None:
    """An argument with a default is not asked for, and an overload is not the method."""
    look = takes("entrypoints/llm.py", "LLM", "generate", "use_tqdm", positional=2)
    assert look(_sources(tmp_path, more=more)) == lacks


@pytest.mark.parametrize(
    ("given", "positional", "lacks"), [(("bar",), 1, ["takes no bar"]), ((), 3, ["takes 2 of 3"]), ((), 2, [])]
)
def test_a_method_that_takes_less_is_different(
    tmp_path: Path, given: tuple[str, ...], positional: int, lacks: list[str]
) -> None:
    """By name and by position."""
    assert takes("entrypoints/llm.py", "LLM", "generate", *given, positional=positional)(_sources(tmp_path)) == lacks


def test_a_version_that_has_little_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each interface that it lacks is named, and those that it has are counted."""
    assert main([str(_sources(tmp_path).root.parent)]) == 1
    said = capsys.readouterr().out
    assert "| | 0.40.0 |" in said
    assert "| `LLM.stop_profile()` | no stop_profile() |" in said
    assert "| `KV_CACHE_DTYPES` ? | no KV_CACHE_DTYPES |" in said
    assert "LLM.start_profile" not in said
    assert said.endswith("more are `yes` in all of them.\n")


def test_every_interface_can_be_missed(tmp_path: Path) -> None:
    """A row that says yes to a package without anything would say so to every version."""
    (tmp_path / "_version.py").write_text("")
    assert [row.interface.name for row in rows_of([Sources(tmp_path)]) if not row.lacks[0]] == []


def test_what_is_asked_for_with_a_guard_may_be_missing() -> None:
    """The rest may not."""
    guarded, needed = (Interface(name="one", look=lambda _: (), is_needed=needed) for needed in (False, True))
    assert Row(interface=guarded, lacks=(["no one"],)).is_enough
    assert not Row(interface=needed, lacks=([], ["no one"])).is_enough


def test_versions_beside_each_other_that_are_the_same_share_a_column() -> None:
    """The last one is the first again, and has a column of its own."""
    rows = [Row(interface=INTERFACES[0], lacks=([], [], ["no LLM"], []))]
    head, _, line = table(["0.20", "0.21", "0.22", "0.23"], rows, is_full=False)
    assert head == "| | 0.20 to 0.21 | 0.22 | 0.23 |"
    assert line.endswith("| yes | no LLM | yes |")


def test_a_folder_without_sources_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what to do about it."""
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} holds no sources of vLLM: unzip its wheel there." in capsys.readouterr().err
