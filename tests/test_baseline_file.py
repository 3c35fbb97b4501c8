"""Where a baseline file lives, what it may hold, and how it is written."""

import json
import os
import string
import time
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from epochs import append
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.baseline_file import baseline_path, dumps, list_files, read
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import (
    BaselineFile,
    BaselineRun,
    ClockName,
    Environment,
    Hardware,
    Kind,
    Measurement,
    Method,
    MetricBaseline,
    Mode,
    RunInfo,
    Session,
    TestKey,
    TestRecord,
)

MODULE = "perf_tests/test_matmul.py"
RUN = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0", commit="abc123")
ENVIRONMENT = Environment(hardware=Hardware(name="NVIDIA H100", power_limit_w=700.0), versions={"torch": "2.9"})
EVENTS = Method(clock="cuda-events", mode="sustained")


def measured(*, test: str = "test_a", value: float = 6.9e14, unit: str = "FLOP/s") -> TestRecord:
    """A test that measured one metric, `m0`."""
    made = Measurement(metric="m0", value=value, unit=unit, better="higher", kind="compute", method=EVENTS)
    return TestRecord(
        key=TestKey(module=MODULE, test=test),
        slug="h100",
        devices=("gpu-1",),
        environment=ENVIRONMENT,
        measurements=(made,),
        verdicts=(),
    )


def saved(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "baselines"


@pytest.fixture
def tree() -> dict[str, Any]:
    """A sound file, as JSON knows it, to be spoilt."""
    loaded: dict[str, Any] = json.loads(dumps(append(None, RUN, measured(), ["m0"])))
    return loaded


# Where a file lives


def test_a_plain_module_keeps_its_name() -> None:
    path = baseline_path(Path("b"), "h100-80gb+mig", "perf_tests/deep/test_a-1.py")
    assert path.as_posix() == "b/h100-80gb+mig/perf_tests.deep.test_a-1.json"


@pytest.mark.parametrize(
    "module",
    ["../../etc/passwd", "/etc/passwd", "..", ".hidden.py", "", "a\0b.py", "tést.py", "x" * 300, "x" * 78 + ".py",
     "a b.py", "\ud800",
     "a.b.py", "a/b", "a//b.py", "test_A.py", "test_a-0123456789ab.py", "test_a.py\n", "-rf.py"],
)  # fmt: skip
def test_any_other_module_is_cleaned_and_hashed(module: str) -> None:
    path = baseline_path(Path("b"), "h100", module)
    assert path.parent == Path("b/h100")
    assert set(path.name) <= set(string.ascii_letters + string.digits + "._+-")
    assert path.name[0] not in ".-"
    assert len(path.name) <= 80
    assert path.stem[-13] == "-"


def test_an_odd_slug_stays_below_the_root() -> None:
    for slug in ("..", "../x", "/abs", "", ".git", ".gpuperf.lock"):
        path = baseline_path(Path("b"), slug, MODULE)
        assert path.parent.parent == Path("b")
        assert path.parent.name[0] != "."


NAMES = st.text(max_size=100) | st.text(alphabet="abA./_-0", max_size=12).map(lambda text: f"{text}.py")


@given(NAMES, NAMES)
def test_two_modules_never_share_a_file_even_where_case_does_not_count(one: str, other: str) -> None:
    paths = [baseline_path(Path("b"), "h100", module) for module in (one, other)]
    assert all(path.parent == Path("b/h100") for path in paths)
    assert (str(paths[0]).casefold() == str(paths[1]).casefold()) == (one == other)


@given(NAMES)
def test_a_change_of_case_changes_the_file(module: str) -> None:
    paths = {str(baseline_path(Path("b"), "h100", each)).casefold() for each in {module, module.swapcase()}}
    assert len(paths) == len({module, module.swapcase()})


def test_names_that_are_not_even_unicode_stay_apart() -> None:
    paths = {baseline_path(Path("b"), "h100", module) for module in ("\ud800", "\ud801", "?")}
    assert len(paths) == 3


def test_a_hashed_name_cannot_be_aimed_at() -> None:
    hashed = baseline_path(Path("b"), "h100", "test_é.py")
    assert baseline_path(Path("b"), "h100", f"{hashed.stem}.py") != hashed


def test_files_are_listed_sorted_without_locks_and_leftovers(root: Path) -> None:
    assert list_files(root) == ()
    saved(root / "h100" / "b.json", "{}")
    saved(root / "h100" / "a.json", "{}")
    saved(root / "h100" / ".tmp-1-aa", "{}")
    saved(root / ".hidden" / "a.json", "{}")
    saved(root / ".gitignore", ".tmp-*")
    saved(root / ".gpuperf.lock", "")
    assert [path.name for path in list_files(root)] == ["a.json", "b.json"]


# Reading


def test_no_file_is_no_baseline(root: Path) -> None:
    assert read(root / "none.json") is None


def test_what_is_written_is_read(root: Path) -> None:
    file = append(None, RUN, measured(), ["m0"])
    assert read(saved(root / "a.json", dumps(file)), module=MODULE) == file


SOUND = dumps(append(None, RUN, measured(), ["m0"])).decode()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Expecting value: line 1"),
        ("[]", "$.schema is None, not 1"),
        ("{}", "$.schema is None, not 1"),
        (SOUND[:-20], "not a sound baseline"),
        ("\ufeff" + SOUND, "BOM"),
        (SOUND.encode("utf-16"), "'utf-8' codec can't decode byte"),
        (SOUND.replace("abc123", "\x00"), "Invalid control character"),
        ("[" * 100_000, "nested too deeply"),
        (SOUND + SOUND, "Extra data"),
        (SOUND.replace("6.9e14", "NaN").replace("690000000000000.0", "NaN"), "runs[0].value is nan"),
        (SOUND.replace("690000000000000.0", "Infinity"), "runs[0].value is inf"),
        (SOUND.replace("690000000000000.0", "1e400"), "$.tests.test_a.m0.sessions[0].runs[0].value is inf"),
        (SOUND.replace("690000000000000.0", "-1.0"), "runs[0].value is -1.0, but no number"),
        (SOUND.replace("690000000000000.0", "0.0"), "$.tests.test_a.m0.sessions[0].runs[0].value is 0"),
        (SOUND.replace("690000000000000.0", "-0.0"), "runs[0].value is 0"),
        (SOUND.replace("690000000000000.0", "9" * 400), "runs[0].value is 999"),
        (SOUND.replace("690000000000000.0", "9" * 5000), "not a sound baseline"),
        (SOUND.replace("690000000000000.0", '"1"'), "$.tests.test_a.m0.sessions[0].runs[0].value: Expected `float`"),
        (SOUND.replace("690000000000000.0", "true"), "value: Expected `float`, got `bool`"),
        (SOUND.replace('"higher"', '"faster"'), "$.tests.test_a.m0.better: Invalid enum value 'faster'"),
        (SOUND.replace('"commit"', '"comit"'), "sessions[0]: Object contains unknown field `comit`"),
        (SOUND.replace('"name"', '"nome"'), "hardware: Object contains unknown field `nome`"),
        (SOUND.replace('"schema": 1', '"schema": 0'), "$.schema is 0, not 1"),
        (SOUND.replace('"schema": 1', '"schema": true'), "$.schema is True, not 1"),
        (SOUND.replace('"schema": 1', '"schema": 1, "schema": 1'), "$ has the key 'schema' twice"),
        (SOUND.replace('"better"', '"unit": "s", "better"'), "$.tests.test_a.m0 has the key 'unit' twice"),
        (SOUND.replace('"test_a"', '"test_a[1]"').replace('"sessions"', '"x"'), "$.tests['test_a[1]'].m0: Object"),
    ],
)  # fmt: skip
def test_an_unsound_file_is_an_error_that_names_file_place_and_remedy(
    root: Path, text: str | bytes, complaint: str
) -> None:
    path = saved(root / "a.json", text)
    with pytest.raises(BaselineError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)
    assert f"`git checkout -- {path}`" in str(caught.value)


def spoilt(tree: dict[str, Any], **changes: Any) -> str:
    tree["tests"]["test_a"]["m0"]["sessions"][0].update(changes)
    return json.dumps(tree)


def test_a_metric_without_sessions_is_an_error(root: Path, tree: dict[str, Any]) -> None:
    tree["tests"]["test_a"]["m0"]["sessions"] = []
    with pytest.raises(BaselineError, match=r"\$\.tests\.test_a\.m0\.sessions is empty"):
        read(saved(root / "a.json", json.dumps(tree)))


def test_a_session_without_runs_is_an_error(root: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(BaselineError, match=r"m0\.sessions\[0\]\.runs is empty"):
        read(saved(root / "a.json", spoilt(tree, runs=[])))


def test_a_session_of_an_unlisted_environment_is_an_error(root: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(BaselineError, match=r"sessions\[0\]\.environment 'ffff' is not in \$\.environments"):
        read(saved(root / "a.json", spoilt(tree, environment="ffff")))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"eight": 1.0}, "runs[0].points has the size 'eight', and a size is a whole number above zero"),
        ({"08": 1.0}, "runs[0].points has the size '08'"),
        ({"0": 1.0}, "runs[0].points has the size '0'"),
        ({"8": 0.0}, "runs[0].points['8'] is 0, and a measured value never is"),
        ({"8": -1.0}, "runs[0].points['8'] is -1.0, but no number in a baseline is negative"),
        ({"8": "fast"}, "runs[0].points[...]: Expected `float`, got `str`"),
        ({}, "runs[0] has no points, and its metric is a curve"),
    ],
)
def test_points_of_a_curve_that_cannot_be_are_named_with_their_place(
    root: Path, tree: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    tree["tests"]["test_a"]["m0"]["method"]["mode"] = "curve"
    text = spoilt(tree, runs=[{"value": 1.0, "points": changes}])
    with pytest.raises(BaselineError) as caught:
        read(saved(root / "a.json", text))
    assert f"$.tests.test_a.m0.sessions[0].{complaint}" in str(caught.value)


def test_share_above_one_is_an_error(root: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(BaselineError, match=r"runs\[0\]\.gpu_busy_share is 62, and a share is 1 at most"):
        read(saved(root / "a.json", spoilt(tree, runs=[{"value": 1.0, "gpu_busy_share": 62.0}])))


@pytest.mark.parametrize(
    ("configuration", "complaint"),
    [
        ({}, "is empty"),
        ({"model": " "}, "has no value for 'model'"),
        ({"seqs": 256}, "[...]: Expected `str`, got `int`"),
    ],
)
def test_configuration_that_says_nothing_is_an_error(
    root: Path, tree: dict[str, Any], configuration: dict[str, Any], complaint: str
) -> None:
    tree["tests"]["test_a"]["m0"]["configuration"] = configuration
    with pytest.raises(BaselineError) as caught:
        read(saved(root / "a.json", json.dumps(tree)))
    assert f"$.tests.test_a.m0.configuration{' ' if complaint[0] != '[' else ''}{complaint}" in str(caught.value)


def test_merge_markers_are_called_so(root: Path) -> None:
    text = SOUND.replace('  "module"', '<<<<<<< HEAD\n  "module"', 1)
    with pytest.raises(BaselineError, match=r"merge markers: '<<<<<<< HEAD' in line \d+\. Resolve the merge"):
        read(saved(root / "a.json", text))


def test_markers_inside_a_name_are_no_merge(root: Path) -> None:
    record = measured(test="test_a[<<<<<<< HEAD\n=======\n]")
    path = saved(root / "a.json", dumps(append(None, RUN, record, ["m0"])))
    assert read(path) is not None


def test_a_newer_file_asks_for_an_upgrade_whatever_else_it_holds(root: Path) -> None:
    path = saved(root / "a.json", '{"schema": 2, "tests": [-1], "tests": NaN, "speed": true}')
    with pytest.raises(BaselineError, match=r"newer pytest-gpuperf \(schema 2, this version reads 1\)\. Upgrade"):
        read(path)


def test_the_baseline_of_another_module_is_an_error(root: Path) -> None:
    path = saved(root / "a.json", SOUND)
    with pytest.raises(
        BaselineError, match=r"is the baseline of 'perf_tests/test_matmul.py', not of 'perf_tests/b.py'"
    ):
        read(path, module="perf_tests/b.py")


def test_a_huge_file_is_refused_unread(root: Path) -> None:
    path = saved(root / "a.json", SOUND)
    os.truncate(path, 100_000_000)
    begun = time.perf_counter()
    with pytest.raises(BaselineError, match="has 100 MB, more than the 16 MB"):
        read(path)
    assert time.perf_counter() - begun < 0.2


def test_a_folder_in_the_place_of_a_file_is_an_error(root: Path) -> None:
    (root / "a.json").mkdir(parents=True)
    with pytest.raises(BaselineError, match="is not a file"):
        read(root / "a.json")


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(BaselineError, match="is not a file"):
        read(tmp_path / "a.json")


def test_a_file_in_the_place_of_the_folder_is_an_error(root: Path) -> None:
    saved(root, "")
    with pytest.raises(BaselineError, match=r"cannot be read: Not a directory \(ENOTDIR\)"):
        read(root / "h100" / "a.json")


def test_an_unreadable_file_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = saved(root / "a.json", SOUND)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, whatever the mode says
    with pytest.raises(BaselineError, match=r"cannot be read: Permission denied \(EACCES\)"):
        read(path)


# Writing as JSON


def test_the_file_is_sorted_indented_rounded_and_ends_in_a_newline() -> None:
    record = replace(measured(value=1.23456789e-3, unit="s"), environment=Environment(hardware=Hardware(name="Hµ")))
    text = dumps(append(None, replace(RUN, commit=None), record, ["m0"])).decode()
    assert '"value": 0.0012346\n' in text
    assert text.startswith('{\n  "environments": {')
    assert text.endswith("}\n")
    assert text.isascii()
    assert "commit" not in text
    assert '"count": 1' in text


def test_what_could_not_be_read_again_is_not_written() -> None:
    negative = replace(measured(value=1.0), environment=Environment(hardware=Hardware(name="H100", power_limit_w=-1.0)))
    with pytest.raises(BaselineError, match=r"test_matmul.py cannot be written .*power_limit_w is -1.0"):
        dumps(append(None, RUN, negative, ["m0"]))


def test_a_file_that_would_be_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpuperf.baseline_file.LARGEST_FILE_BYTES", 100)
    with pytest.raises(BaselineError, match="Split the module"):
        dumps(append(None, RUN, measured(), ["m0"]))


WORDS = st.text(max_size=8)
POSITIVE = st.floats(min_value=0, max_value=1e300, exclude_min=True)
NOT_NEGATIVE = st.none() | st.floats(min_value=0, max_value=1e300)
RUNS = st.builds(
    BaselineRun,
    value=POSITIVE,
    spread=NOT_NEGATIVE,
    sm_clock_mhz=NOT_NEGATIVE,
    power_w=NOT_NEGATIVE,
    run_id=st.none() | WORDS,
    gpu_busy_share=st.none() | st.floats(0, 1),
    points=st.dictionaries(st.integers(1, 2**40).map(str), POSITIVE, min_size=1, max_size=3),
)
SETTINGS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
ENVIRONMENTS = st.builds(
    Environment,
    hardware=st.builds(
        Hardware,
        name=WORDS,
        count=st.integers(0, 8),
        memory_bytes=st.none() | st.integers(0, 2**70),
        power_limit_w=NOT_NEGATIVE,
        is_mig=st.booleans(),
    ),
    versions=st.dictionaries(WORDS, WORDS, max_size=2),
)


def sessions(keys: list[str]) -> st.SearchStrategy[Session]:
    return st.builds(
        Session,
        date=WORDS,
        visit=WORDS,
        devices=st.lists(WORDS, max_size=2).map(tuple),
        environment=st.sampled_from(keys),
        runs=st.lists(RUNS, min_size=1, max_size=2).map(tuple),
        commit=st.none() | WORDS,
    )


def metrics(keys: list[str]) -> st.SearchStrategy[MetricBaseline]:
    return st.builds(
        MetricBaseline,
        unit=WORDS,
        better=st.sampled_from(["lower", "higher"]),
        kind=st.sampled_from(get_args(Kind)),
        method=st.builds(Method, clock=st.sampled_from(get_args(ClockName)), mode=st.sampled_from(get_args(Mode))),
        sessions=st.lists(sessions(keys), min_size=1, max_size=3).map(tuple),
        configuration=st.none() | st.dictionaries(SETTINGS, SETTINGS, min_size=1, max_size=2),
        reason=st.none() | WORDS,
    )


@st.composite
def files(draw: st.DrawFn) -> BaselineFile:
    environments = draw(st.dictionaries(WORDS, ENVIRONMENTS, min_size=1, max_size=2))
    tests = st.dictionaries(WORDS, st.dictionaries(WORDS, metrics(list(environments)), max_size=2), max_size=2)
    return BaselineFile(schema=1, module=draw(WORDS), environments=environments, tests=draw(tests))


def numbers(node: Any) -> list[Any]:
    """Everything in a JSON tree, in order, so that two trees can be compared up to rounding."""
    if isinstance(node, dict):
        return [each for key in sorted(node) for each in [key, *numbers(node[key])]]
    if isinstance(node, (list, tuple)):
        return [each for value in node for each in numbers(value)]
    return [node]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=files())
def test_any_file_comes_back_up_to_rounding_and_then_stays(file: BaselineFile, tmp_path: Path) -> None:
    first = dumps(file)
    again = read(saved(tmp_path / "a.json", first))
    assert again is not None
    assert dumps(again) == first
    assert dumps(file) == first
    assert numbers(as_tree(again)) == [
        pytest.approx(each, rel=5e-5, abs=1e-322) if isinstance(each, float) else each
        for each in numbers(as_tree(file))
    ]


def as_tree(file: BaselineFile) -> Any:
    return msgspec.to_builtins(file)
