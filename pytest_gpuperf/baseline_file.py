"""A baseline file: where it is, and what is in it.

Reading trusts nothing: a file that is not sound is a `BaselineError`, never a pass.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import SCHEMA, BaselineFile, BaselineRun, Environment, MetricBaseline, Record

#: A larger file is refused unread. 20 sessions take about 8 kB, so this is room for 2,000 metrics in one module.
LARGEST_FILE_BYTES = 16_000_000
#: No number in a baseline is larger: it could not be rounded, squared or summed.
LARGEST_NUMBER = 1e300
#: Of the file beside a baseline that holds what ran: see `kernel_store`.
KERNELS_SUFFIX = ".kernels.json"

_PLAIN_SLUG = r"[a-z0-9_](\.?[a-z0-9_+-])*"
_PLAIN_MODULE = r"[a-z0-9_][a-z0-9_-]*(/[a-z0-9_][a-z0-9_-]*)*\.py"
_HASHED = r"-[0-9a-f]{12}(\.py)?\Z"
#: What `a/kernels.py` would be called is the name of the kernels of `a.py`.
_TAKEN = r"/kernels\.py\Z"

_T = TypeVar("_T")


class _OfModule(Protocol):
    @property
    def module(self) -> str: ...


_Filed = TypeVar("_Filed", bound=_OfModule)


class _Outline(Record, frozen=True, kw_only=True):
    """A file whose parts are not typed yet: converting them one by one is what lets an error name its place."""

    schema: int
    module: str
    environments: dict[str, Any]
    tests: dict[str, dict[str, Any]]


def baseline_path(root: Path, slug: str, module: str) -> Path:
    """Say where the baselines of a test module on one kind of device live.

    Two modules never share a file, on case-insensitive file systems neither, and none lies outside `root/slug`: a
    name that is not plain (lower-case letters, digits, `_`, `-`, of 80 characters at most; a slug may hold `.` and
    `+`) is cleaned and ends in 12 hex digits of the SHA-256 of what it was.

    Args:
        root: Folder of all baselines.
        slug: Kind of device, such as `h100-80gb-hbm3`.
        module: Path of the test module from the root, with `/`.

    >>> baseline_path(Path("baselines"), "h100", "perf_tests/test_matmul.py").as_posix()
    'baselines/h100/perf_tests.test_matmul.json'
    """
    name = _safe_name(module, _PLAIN_MODULE).removesuffix(".py").replace("/", ".")
    return root / _safe_name(slug, _PLAIN_SLUG) / f"{name}.json"


def _safe_name(text: str, plain: str) -> str:
    # A plain name that looks as if it ended in a hash is hashed too, or somebody could aim it at another's file.
    if len(text) <= 80 and re.fullmatch(plain, text) and not re.search(f"{_HASHED}|{_TAKEN}", text):
        return text
    readable = re.sub(r"[^A-Za-z0-9_+-]+", ".", text.removesuffix(".py")).strip(".-")[:60]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable or 'unnamed'}-{digest}"


def list_files(root: Path) -> tuple[Path, ...]:
    """List the baseline files below `root`, sorted; none where the folder does not exist."""
    found = (path for path in root.glob("[!.]*/[!.]*.json") if not path.name.endswith(KERNELS_SUFFIX))
    return tuple(sorted(path for path in found if path.is_file()))


def read(path: Path, *, module: str | None = None) -> BaselineFile | None:
    """Read a baseline file, or nothing where there is none.

    Args:
        path: The file.
        module: The test module that it must belong to, if given.

    Raises:
        BaselineError: There is something, but not a sound baseline. Says where and what to do.
    """
    raw = read_bytes(path)
    return None if raw is None else parse(raw, path, module)


def read_bytes(path: Path) -> bytes | None:
    """Read a file's bytes unchecked, or nothing where there is none.

    Raises:
        BaselineError: It is not a file, too large, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BaselineError(f"{path} is not a file. Move it away: a baseline belongs there.")
        if status.st_size > LARGEST_FILE_BYTES:
            raise BaselineError(
                f"{path} has {status.st_size / 1e6:.0f} MB, more than the {LARGEST_FILE_BYTES / 1e6:.0f} MB that a "
                f"baseline may have. {_restore(path)}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaselineError(
            f"{path} cannot be read: {error_text(error)}. Check its permissions and its disk."
        ) from error


def parse(raw: bytes, path: Path, module: str | None) -> BaselineFile:
    """Check the bytes of the file at `path`; `module` is the test module that it must belong to, if given.

    Raises:
        BaselineError: They are not a sound baseline. Says where and what to do.
    """
    return parse_as(_decode, raw, path, module)


def parse_as(decode: Callable[[bytes], _Filed], raw: bytes, path: Path, module: str | None) -> _Filed:
    """Check the bytes of a file that belongs to the baselines; see `parse`.

    Args:
        decode: Makes of the bytes what they are, or raises what `tree_of` and `converted` do.
        raw: See `parse`.
        path: See `parse`.
        module: See `parse`.

    Raises:
        BaselineError: They are not sound. Says where and what to do.
    """
    if marker := re.search(rb"^(<{7} |>{7} |={7}$)[^\n]{0,40}", raw, re.MULTILINE):
        line = raw.count(b"\n", 0, marker.start()) + 1
        raise BaselineError(
            f"{path} holds merge markers: {marker[0].decode(errors='replace')!r} in line {line}. Resolve the merge: "
            f"`git checkout --ours -- {shlex.quote(str(path))}` (or --theirs), then run with --gpuperf-update."
        )
    try:
        file = decode(raw)
    except BaselineError as error:
        raise BaselineError(f"{path} {error}") from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BaselineError(f"{path} is not a sound baseline: {what}. {_restore(path)}") from None
    if module is not None and file.module != module:
        raise BaselineError(f"{path} is the baseline of {file.module!r}, not of {module!r}. {_restore(path)}")
    return file


def _restore(path: Path) -> str:
    return (
        f"Restore it with `git checkout -- {shlex.quote(str(path))}`, "
        "or remove it and record it again with --gpuperf-update."
    )


def _decode(raw: bytes) -> BaselineFile:
    return _typed(tree_of(raw))


def tree_of(raw: bytes) -> object:
    """Read JSON of this schema without doubtful keys and numbers.

    Raises:
        BaselineError: A newer version wrote it.
        ValueError: It is not that.
    """
    tree = json.loads(raw.decode(), object_pairs_hook=tuple)  # objects as tuples of pairs: a dict hides duplicates
    pairs = tree if isinstance(tree, tuple) else ()
    schema = next((value for key, value in pairs if key == "schema"), None)
    # Before everything else, because whatever a newer file holds that is unknown here is no fault of it.
    if type(schema) is int and schema > SCHEMA:
        raise BaselineError(
            f"was written by a newer pytest-gpuperf (schema {schema}, this version reads {SCHEMA}). "
            "Upgrade with `pip install -U pytest-gpuperf`."
        )
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"$.schema is {schema!r}, not {SCHEMA}")
    return _plain(tree, "$")


def _plain(node: object, place: str) -> object:
    if isinstance(node, tuple):
        keys = [key for key, _ in node]
        if repeated := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else None:
            raise ValueError(f"{place} has the key {min(repeated)!r} twice")
        return {key: _plain(value, _step(place, key)) for key, value in node}
    if isinstance(node, list):
        return [_plain(value, f"{place}[{i}]") for i, value in enumerate(node)]
    if isinstance(node, (int, float)) and not 0 <= node <= LARGEST_NUMBER:  # false for NaN too
        raise ValueError(f"{place} is {node!r}, but no number in a baseline is negative, infinite or NaN")
    return node


def _step(place: str, key: str) -> str:
    return f"{place}.{key}" if key.isidentifier() else f"{place}[{key!r}]"


def _typed(tree: object) -> BaselineFile:
    outline = converted(tree, _Outline, "$")
    environments = {
        key: converted(node, Environment, _step("$.environments", key)) for key, node in outline.environments.items()
    }
    tests = {
        test: {
            metric: _metric(node, _step(_step("$.tests", test), metric), environments) for metric, node in nodes.items()
        }
        for test, nodes in outline.tests.items()
    }
    return BaselineFile(schema=SCHEMA, module=outline.module, environments=environments, tests=tests)


def converted(node: object, kind: type[_T], place: str) -> _T:
    """Give a part of a file its type.

    Raises:
        ValueError: It has another. Names the place.
    """
    try:
        return msgspec.convert(node, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise ValueError(f"{place}{where.rstrip('`')}: {what}") from None


def _metric(node: object, place: str, environments: Collection[str]) -> MetricBaseline:
    baseline = converted(node, MetricBaseline, place)
    if not baseline.sessions:
        raise ValueError(f"{place}.sessions is empty")
    for i, session in enumerate(baseline.sessions):
        if session.environment not in environments:
            raise ValueError(f"{place}.sessions[{i}].environment {session.environment!r} is not in $.environments")
        if not session.runs:
            raise ValueError(f"{place}.sessions[{i}].runs is empty")
        for j, run in enumerate(session.runs):
            _check_run(run, f"{place}.sessions[{i}].runs[{j}]", is_curve=baseline.method.mode == "curve")
    if baseline.configuration is not None:
        _check_configuration(baseline.configuration, f"{place}.configuration")
    return baseline


def _check_run(run: BaselineRun, place: str, *, is_curve: bool) -> None:
    if run.value == 0:
        raise ValueError(f"{place}.value is 0, and a measured value never is")
    if run.gpu_busy_share is not None and run.gpu_busy_share > 1:
        raise ValueError(f"{place}.gpu_busy_share is {run.gpu_busy_share:g}, and a share is 1 at most")
    if is_curve and not run.points:
        raise ValueError(f"{place} has no points, and its metric is a curve")
    for size, value in (run.points or {}).items():
        if not re.fullmatch(r"[1-9][0-9]{0,18}", size):
            raise ValueError(f"{place}.points has the size {size!r}, and a size is a whole number above zero")
        if value == 0:
            raise ValueError(f"{_step(f'{place}.points', size)} is 0, and a measured value never is")


def _check_configuration(configuration: dict[str, str], place: str) -> None:
    if not configuration:
        raise ValueError(f"{place} is empty")
    if empty := [name for name, text in configuration.items() if not (name.strip() and text.strip())]:
        raise ValueError(f"{place} has no value for {empty[0]!r}")


def dumps(file: BaselineFile) -> bytes:
    """Write a baseline file as JSON that makes small diffs: sorted, indented, five significant digits, ASCII.

    Raises:
        BaselineError: It could not be read again: a number that is not finite, a value of 0, too many tests.
    """
    try:
        # There and back: what cannot be read is never written, and an int in a float's place becomes a float.
        data = encode(_decode(encode(file)))
    except ValueError as error:
        raise BaselineError(f"{file.module} cannot be written as a baseline: {error}.") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise BaselineError(
            f"The baseline of {file.module} would have {len(data) / 1e6:.1f} MB, "
            f"more than {LARGEST_FILE_BYTES / 1e6:.0f} MB. Split the module."
        )
    return data


def encode(record: Record) -> bytes:
    """Write JSON that makes small diffs."""
    # ASCII, so that a diff shows what is there: no look-alike letters, no characters that turn the text around.
    return f"{json.dumps(_rounded(msgspec.to_builtins(record)), indent=2, sort_keys=True)}\n".encode()


def _rounded(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items() if value is not None}
    if isinstance(node, (list, tuple)):
        return [_rounded(value) for value in node]
    return float(f"{node:.5g}") if isinstance(node, float) else node


def environment_key(environment: Environment) -> str:
    """Name an environment as the sessions of a file refer to it: 8 hex digits."""
    # Converted first, so that 700 W and 700.0 W are one environment.
    same = msgspec.convert(msgspec.to_builtins(environment), Environment)
    return hashlib.sha256(encode(same)).hexdigest()[:8]


def error_text(error: Exception) -> str:
    """Say what the system refused, with the name of its error number where there is one."""
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"
    return str(error)
