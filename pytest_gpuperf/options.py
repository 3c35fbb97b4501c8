"""The `--gpuperf-*` options and the two markers: text from the user becomes frozen settings, or an error that helps.

Light to import, because every start of pytest pays for it: what only a test that measures needs is imported inside.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from pytest_gpuperf.errors import UsageError

if TYPE_CHECKING:
    from pytest_gpuperf.records import Mode, Status
    from pytest_gpuperf.requirement import GpuRequirement

Policy = Literal["pass", "warn", "fail"]
DeviceChoice = Literal["auto", "cuda", "cpu"]
AnchorsChoice = Literal["auto", "on", "off"]
ExpectationsChoice = Literal["show", "fail", "off"]

MARKERS = (
    "gpu(count=1, min_vram_gb=0, arch=None, nvlink=False, exclusive='gpu'): devices without which the test is skipped",
    "perf(tolerance=None, mode=None): the largest slowdown accepted (0.03 or '3%'), and how to measure",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the options say.

    Attributes:
        update: Add this run's values to the baselines when it ends.
        accept: Make changed values the new baselines when the run ends, for this reason.
        baselines: Folder of the baselines.
        require_gpu: A test that lacks a GPU is an error, not a skip.
        device: What to measure on.
        key: Label of a runner pool, part of the baselines' folder.
        json: Where results.jsonl goes.
        patch: Where a patch of the baselines goes.
        history: Path or URL of the history that the run is added to at its end.
        budget_s: Most seconds to spend on measuring a test again; 0: never; `None`: three times its own duration.
        missing: What a metric without a baseline does.
        inconclusive: What a metric that noise leaves undecided does.
        invalid: What a metric measured on an unwell GPU does.
        strict: All three fail, and so does a pass that the noise makes weak.
        anchors: Whether to measure anchors; `auto`: on a GPU.
        expectations: What published figures do where there is no baseline.
        model: What language-model tests run instead of their own models: a preset, a folder, or a hub id.
        vllm_args: Further arguments of vLLM, for every engine that the fixture starts.
        tuned: A configuration that `gpuperf tune` found, for the tests that compare it with the default.
        price: Of a GPU's hour, in any currency, for what the run cost.
        disable: Skip the tests that measure.
    """

    update: bool
    accept: str | None
    baselines: Path
    require_gpu: bool
    device: DeviceChoice
    key: str | None
    json: Path
    patch: Path | None
    history: str | None
    budget_s: float | None
    missing: Policy
    inconclusive: Policy
    invalid: Policy
    strict: bool
    anchors: AnchorsChoice
    expectations: ExpectationsChoice
    model: str | None
    vllm_args: dict[str, object]
    tuned: Path | None
    price: float | None
    disable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfCriterion:
    """What `@pytest.mark.perf` says of a test."""

    tolerance: float | None = None
    mode: "Mode | None" = None


def add_options(parser: pytest.Parser) -> None:
    """Declare the options. Nothing is computed here: it runs at every start of pytest."""
    group = parser.getgroup("gpuperf", "GPU performance")
    add = group.addoption
    add("--gpuperf-update", action="store_true", help="add this run's values to the baselines")
    add("--gpuperf-accept", metavar="REASON", help="make changed values the new baselines, for this reason")
    add(
        "--gpuperf-baselines",
        metavar="DIR",
        help="folder of the baselines (default: baselines, beside pytest's config)",
    )
    add("--gpuperf-strict", action="store_true", help="missing, inconclusive and invalid results fail: for CI")
    add("--gpuperf-require-gpu", action="store_true", help="a test that lacks its GPU is an error, not a skip")
    add("--gpuperf-device", choices=("auto", "cuda", "cpu"), default="auto", help="what to measure on (default: auto)")
    add("--gpuperf-key", metavar="LABEL", help="label of a runner pool that has baselines of its own")
    add("--gpuperf-json", metavar="PATH", help="where the results go (default: .gpuperf/results.jsonl)")
    add("--gpuperf-patch", metavar="PATH", help="write what would make this run's values the baselines, for git apply")
    add("--gpuperf-history", metavar="PATH_OR_URL", help="add this run to a history when it ends")
    add(
        "--gpuperf-budget",
        metavar="SECONDS",
        help="how many seconds to spend on measuring an unsettled test again, in fresh processes; 0: never "
        "(default: three times its own duration)",
    )
    for name, subject in (
        ("missing", "metrics without a baseline"),
        ("inconclusive", "metrics that noise leaves undecided"),
        ("invalid", "metrics measured while the GPU was unwell"),
    ):
        add(f"--gpuperf-{name}", choices=("pass", "warn", "fail"), help=f"what {subject} do (default: warn)")
    add(
        "--gpuperf-anchors",
        choices=("auto", "on", "off"),
        default="auto",
        help="measure fixed workloads that tell whether the machine is its usual self (default: auto, on a GPU)",
    )
    add("--gpuperf-price", metavar="PRICE", help="of an hour of one GPU: say what the run cost, and its idle time")
    add("--gpuperf-disable", action="store_true", help="skip the tests that measure")
    _add_model_options(group)


def _add_model_options(group: pytest.OptionGroup) -> None:
    """Declare what tests of language models look at."""
    add = group.addoption
    add(
        "--gpuperf-expectations",
        choices=("show", "fail", "off"),
        default="show",
        help="what published figures of the same model and GPU do where there is no baseline (default: show)",
    )
    add(
        "--gpuperf-vllm-args",
        metavar="JSON",
        help="further arguments of vLLM for every engine, such as '{\"disable_custom_all_reduce\": true}'",
    )
    add("--gpuperf-tuned", metavar="FILE", help="a configuration of vLLM that gpuperf tune found, to test")
    add(
        "--gpuperf-model",
        metavar="PATH_OR_ID",
        help="run language-model tests on this model instead of their own: a preset, a folder, or a hub id",
    )


def read_settings(config: pytest.Config) -> Settings:
    """Read and check the options.

    Raises:
        pytest.UsageError: An option's value makes no sense, or two contradict.
    """
    option = config.getoption
    strict = bool(option("--gpuperf-strict"))
    policy: Policy = "fail" if strict else "warn"
    _refuse_contradictions(config)
    return Settings(
        update=option("--gpuperf-update"),
        accept=_reason(option("--gpuperf-accept")),
        baselines=config.rootpath / (option("--gpuperf-baselines") or "baselines"),
        require_gpu=option("--gpuperf-require-gpu"),
        device=option("--gpuperf-device"),
        key=option("--gpuperf-key"),
        json=config.rootpath / (option("--gpuperf-json") or ".gpuperf/results.jsonl"),
        patch=config.invocation_params.dir / option("--gpuperf-patch") if option("--gpuperf-patch") else None,
        history=_history(option("--gpuperf-history")),
        budget_s=_seconds(option("--gpuperf-budget")),
        missing=option("--gpuperf-missing") or policy,
        inconclusive=option("--gpuperf-inconclusive") or policy,
        invalid=option("--gpuperf-invalid") or policy,
        strict=strict,
        anchors=option("--gpuperf-anchors"),
        expectations=option("--gpuperf-expectations"),
        tuned=_tuned(option("--gpuperf-tuned"), config.invocation_params.dir),
        model=_model(option("--gpuperf-model"), config.invocation_params.dir),
        vllm_args=_vllm_args(option("--gpuperf-vllm-args")),
        price=_price(option("--gpuperf-price")),
        disable=option("--gpuperf-disable"),
    )


def silent_verdicts(settings: Settings) -> "frozenset[Status]":
    """Verdicts that are to pass without a word: `pass` is silent where `warn` explains."""
    policies: dict[Status, Policy] = {
        "INCOMPARABLE": settings.missing,
        "INCONCLUSIVE": settings.inconclusive,
        "INVALID": settings.invalid,
    }
    return frozenset(status for status, policy in policies.items() if policy == "pass")


def _refuse_contradictions(config: pytest.Config) -> None:
    option = config.getoption
    if option("--gpuperf-device") == "cpu" and option("--gpuperf-require-gpu"):
        raise pytest.UsageError("--gpuperf-device cpu contradicts --gpuperf-require-gpu. Drop one of them.")
    if option("--gpuperf-disable") and (option("--gpuperf-update") or option("--gpuperf-accept")):
        raise pytest.UsageError("--gpuperf-disable measures nothing that could be recorded. Drop one of the options.")
    if option("--gpuperf-patch") and option("--gpuperf-update"):
        raise pytest.UsageError("--gpuperf-patch writes a patch instead of the baselines. Drop --gpuperf-update.")
    if option("--gpuperf-disable") and option("--gpuperf-patch"):
        raise pytest.UsageError("--gpuperf-disable measures nothing that a patch could hold. Drop one of the options.")
    key = option("--gpuperf-key")
    if key is not None and not key.strip():
        raise pytest.UsageError(
            "--gpuperf-key is empty: is the variable that it comes from set? Name a pool or drop it."
        )


def _reason(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise pytest.UsageError(
            "--gpuperf-accept needs a reason, such as --gpuperf-accept 'new attention kernel, #123'."
        )
    return text


def _history(text: str | None) -> str | None:
    if text is None:
        return None
    from pytest_gpuperf.analysis.history_file import place_of

    try:
        place_of(text)
    except UsageError as error:
        raise pytest.UsageError(f"--gpuperf-history: {error}") from None
    return text


def _tuned(text: str | None, folder: Path) -> Path | None:
    if text is None:
        return None
    from pytest_gpuperf.trials.tune_file import read_best

    try:
        read_best(folder / text)
    except UsageError as error:
        raise pytest.UsageError(f"--gpuperf-tuned: {error}") from None
    return folder / text


def _model(text: str | None, folder: Path) -> str | None:
    if text is None:
        return None
    if not text.strip():
        raise pytest.UsageError("--gpuperf-model is empty: is the variable that it comes from set? Name a model.")
    from pytest_gpuperf.workloads.models import is_hub_id, is_model_folder, shape_of

    if is_model_folder(str(folder / text)):
        return str(folder / text)
    if not is_hub_id(text):  # what the hub has is found out when it is loaded
        try:
            shape_of(text)
        except UsageError as error:
            raise pytest.UsageError(f"--gpuperf-model: {error}") from None
    return text


def _vllm_args(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    from pytest_gpuperf.workloads.vllm_config import check_options

    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise pytest.UsageError(f"--gpuperf-vllm-args is no JSON ({error}): {text}") from None
    if not isinstance(arguments, dict):
        raise pytest.UsageError(f"--gpuperf-vllm-args is no JSON object of names and values: {text}")
    try:
        check_options(arguments)
    except UsageError as error:
        raise pytest.UsageError(f"--gpuperf-vllm-args: {error}") from None
    return arguments


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise pytest.UsageError(f"--gpuperf-budget {text} is not a number of seconds, zero or more.")
    return seconds


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price > 0):
        raise pytest.UsageError(
            f"--gpuperf-price {text} is not a price. Give that of an hour of one GPU, a number above 0 such as 2.50; "
            "of a machine with 8, an eighth of its price."
        )
    return price


def requirement_of(item: pytest.Item) -> "GpuRequirement":
    """What the test's closest `gpu` marker asks for; without one, one device of any kind.

    Raises:
        UsageError: An unknown or ill-typed argument.
    """
    from pytest_gpuperf.requirement import GpuRequirement

    mark = item.get_closest_marker("gpu")
    return GpuRequirement() if mark is None else GpuRequirement.from_arguments(item.name, mark.args, mark.kwargs)


def criterion_of(item: pytest.Item) -> PerfCriterion:
    """What the test's closest `perf` marker asks for.

    Raises:
        UsageError: An unknown or ill-typed argument.
    """
    from pytest_gpuperf.timing import GPU_PLANS
    from pytest_gpuperf.units import parse_tolerance

    mark = item.get_closest_marker("perf")
    if mark is None:
        return PerfCriterion()
    if mark.args:
        raise UsageError(f"@perf of {item.name} takes no positional arguments. Valid: mode, tolerance.")
    for name in mark.kwargs:
        if name not in ("mode", "tolerance"):
            raise UsageError(f"Unknown argument {name!r} in @perf of {item.name}. Valid: mode, tolerance.")
    mode, tolerance = mark.kwargs.get("mode"), mark.kwargs.get("tolerance")
    if mode is not None and mode not in tuple(GPU_PLANS):
        raise UsageError(
            f"mode={mode!r} in @perf of {item.name} does not exist. Valid: {', '.join(sorted(GPU_PLANS))}."
        )
    try:
        return PerfCriterion(tolerance=None if tolerance is None else parse_tolerance(tolerance), mode=mode)
    except UsageError as error:
        raise UsageError(f"In @perf of {item.name}: {error}") from None
