"""The folder of a tuning: points.jsonl, written point by point, and best.yaml, which `vllm serve --config` takes."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import asdict

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.trials.tune_plan import Pair, Plan, Point, Setting, Settings
from pytest_gpuperf.workloads.models import preset_of, preset_table

POINTS = "points.jsonl"
BEST = "best.yaml"

_LINE = re.compile(r"(?P<key>[\w-]+):\s*(?P<value>\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#\s\"'{\[][^#]*?)\s*(?:#.*)?")


class _Options(Record, frozen=True, kw_only=True):
    """Fields of EngineConfig that best.yaml states, whatever differs from the default, and what each may be.

    `vllm serve` has other defaults than the offline engine that was measured.
    """

    dtype: str | None = None
    quantization: str | None = None
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_num_seqs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


_STATED = _Options.__struct_fields__


class Journal:
    """The points and pairs of one plan, in the order in which they were measured; each is on disk before the next.

    Args:
        folder: Made if it is not there.
        plan: What is to be measured.

    Raises:
        UsageError: The folder holds another plan, other files, or lines that cannot be read.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.path = folder / POINTS
        self.plan = plan
        self._points: list[Point] = []
        self.pairs: list[Pair] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {folder} cannot be made: {error.strerror}.") from None
        found = _read(self.path)
        if not found:
            _refuse_other_files(folder)
            self._append(plan)
        elif isinstance(found[0], Plan):
            _refuse_other_plan(folder, found[0], plan)
        for record in found[1:]:
            self._take(record)

    @property
    def points(self) -> tuple[Point, ...]:
        """The last of each configuration: an engine that died was tried again."""
        return tuple({json.dumps(point.settings, sort_keys=True): point for point in self._points}.values())

    def add(self, record: Point | Pair) -> None:
        """Write it to the end of the file, and wait until it is on disk.

        Raises:
            UsageError: The file cannot be written.
        """
        self._append(record)
        self._take(record)

    def _take(self, record: Plan | Point | Pair) -> None:
        if isinstance(record, Point):
            self._points.append(record)
        elif isinstance(record, Pair):
            self.pairs.append(record)

    def _append(self, record: Plan | Point | Pair) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written: {error.strerror}. "
                "The same command goes on from the points before, once it can."
            ) from None


def plan_in(folder: Path) -> Plan | None:
    """Return the plan of a folder's points, `None` where there are none.

    Raises:
        UsageError: They cannot be read.
    """
    found = _read(folder / POINTS)
    return found[0] if found and isinstance(found[0], Plan) else None


def _read(path: Path) -> list[Plan | Point | Pair]:
    """All whole lines. What a killed run left of its last one is cut off, or the next line would be glued to it."""
    try:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    found: list[Plan | Point | Pair] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(msgspec.json.decode(line, type=Plan | Point | Pair))
        except msgspec.MsgspecError as error:
            raise UsageError(
                f"{path}:{number} is no record of a tuning: {error}. Name a new folder: --output."
            ) from None
        if isinstance(found[-1], Plan) != (number == 1):
            raise UsageError(f"{path}:{number} is out of place: the plan comes first, and once.")
    return found


def _refuse_other_files(folder: Path) -> None:
    if others := [path.name for path in folder.iterdir() if path.name != POINTS]:
        raise UsageError(f"--output {folder} holds {others[0]} and no {POINTS}. Name a new folder.")


def _refuse_other_plan(folder: Path, found: Plan, plan: Plan) -> None:
    before, now = asdict(found), asdict(plan)
    differing = [
        f"{name} {_text(before[name])}, now {_text(now[name])}"
        for name in now
        if before[name] != now[name] and name != "devices"  # another GPU of the same name may go on
    ]
    if differing:
        raise UsageError(
            f"--output {folder} holds points of another plan: {'; '.join(differing)}. "
            "Points of two plans cannot be compared: name a new folder, or repeat the old arguments."
        )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "-"
    return json.dumps(msgspec.to_builtins(value)) if isinstance(value, msgspec.Struct) else str(value)


def write_best(folder: Path, plan: Plan, best: Point, remarks: Sequence[str]) -> Path:
    """Write the best configuration as `vllm serve --config` takes it: long option names, one a line.

    Args:
        folder: Of the tuning.
        plan: What was measured.
        best: Its fastest point.
        remarks: Comments at the top, one a line.

    Raises:
        UsageError: The file cannot be written.
    """
    path = folder / BEST
    known: dict[str, Setting] = {field: best.configuration.get(field) for field in _STATED}
    stated = {field: value for field, value in {**known, **best.settings}.items() if _is_stated(value)}
    lines = [f"# {remark}" for remark in remarks]
    lines += [f"model: {json.dumps(_served(plan.model))}"]
    lines += [f"{field.replace('_', '-')}: {_scalar(value)}" for field, value in stated.items()]
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}. The points are kept beside it.") from None
    return path


def _is_stated(value: Setting) -> bool:
    return value is not None and str(value).lower() not in ("none", "null", "")


def _served(model: str) -> str:
    """What `vllm serve` finds the model by: the hub's name of a preset, else the folder."""
    shape = preset_of(model)
    ids = [preset.hub_ids for preset in preset_table() if shape and preset.shape.name == shape.name]
    return ids[0][0] if ids and ids[0] else model


def _scalar(value: Setting) -> str:
    text = str(value).removeprefix("torch.")
    try:
        float(text)
    except ValueError:
        return json.dumps(text)  # JSON is YAML
    return text


def read_best(path: Path) -> tuple[str, Settings]:
    """Read a model and the settings of its engine from a file as `write_best` writes it, edited or not.

    Returns:
        The model, and fields of EngineConfig with their values.

    Raises:
        UsageError: No such file, a line that is more than `key: value`, no model, an option that is not tuned, or a
            value that it cannot have.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}. Make one with: gpuperf tune MODEL") from None
    found: dict[str, Setting] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"{path}:{number} is not one 'option: value': {line.strip()}")
        found[match["key"].replace("-", "_")] = _value(match["value"])
    model = found.pop("model", None)
    if not isinstance(model, str):
        raise UsageError(f"{path} names no model. It needs a line such as: model: llama-3-8b")
    _refuse_impossible(path, found)
    return model, found


def _refuse_impossible(path: Path, found: dict[str, Setting]) -> None:
    if unknown := [field for field in found if field not in _STATED]:
        raise UsageError(f"{path} sets {unknown[0].replace('_', '-')}, and only these are tuned: {_names(_STATED)}.")
    if not found:
        raise UsageError(f"{path} sets nothing that differs from the default. It needs one of: {_names(_STATED)}.")
    try:
        msgspec.convert(found, _Options)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} sets what cannot be: {str(error).replace('$.', '')}.") from None


def _names(fields: Sequence[str]) -> str:
    return ", ".join(field.replace("_", "-") for field in fields)


def _value(text: str) -> Setting:
    if text[0] == "'":
        return text[1:-1]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (int, float, str)) else text
