"""Findings about which GPUs the world around leaves to this process: CUDA_VISIBLE_DEVICES, Slurm, containers."""

from collections.abc import Iterator, Sequence

from pytest_gpuperf.analysis.finding import Finding, note, ok, problem, warning
from pytest_gpuperf.analysis.host import Assignment, Facts, Gpu

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SLURM_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


def assignment_findings(facts: Facts) -> Iterator[Finding]:
    """Say what is left of the GPUs, and which entry of a variable is wrong."""
    assignment = facts.assignment
    if assignment is None:
        return
    yield from _visible(assignment, facts.gpus)
    yield from _order(assignment, facts.gpus or ())
    yield from _slurm(assignment, facts.gpus)
    yield from _runtime(assignment, facts.gpus)


def _visible(assignment: Assignment, gpus: Sequence[Gpu] | None) -> Iterator[Finding]:
    text = assignment.variables.get(_VISIBLE)
    setting = f"{_VISIBLE} is not set" if text is None else f"{_VISIBLE}={text}"
    if not gpus:
        if text is not None:
            yield note("assignment", f"{setting}, and there is no GPU", f"unset {_VISIBLE}")
        return
    left = f"{len(assignment.visible)} of {len(gpus)} GPUs can be used"
    if text is not None and text.strip() in ("", "-1"):
        yield warning("assignment", f"{setting} hides every GPU", f"unset {_VISIBLE}")
    elif assignment.wrong is not None or not assignment.visible:
        level = warning if assignment.visible else problem
        why = f": {assignment.wrong.rstrip('.')}" if assignment.wrong else ""
        mend = (
            "See what there is: nvidia-smi -L"
            if text is None
            else f"unset {_VISIBLE}, or name UUIDs of `nvidia-smi -L`"
        )
        yield level("assignment", f"{setting}, and {left}{why}", mend)
    else:
        yield ok("assignment", f"{setting}: {left}")


def _order(assignment: Assignment, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    order = assignment.variables.get("CUDA_DEVICE_ORDER")
    if len({gpu.info.name for gpu in gpus}) > 1 and order != "PCI_BUS_ID":
        text = (
            f"CUDA_DEVICE_ORDER is {order or 'not set'} and the GPUs differ: CUDA numbers the fastest first, NVML not"
        )
        yield note("assignment", text, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")


def _slurm(assignment: Assignment, gpus: Sequence[Gpu] | None) -> Iterator[Finding]:
    variables = assignment.variables
    job = variables.get("SLURM_JOB_ID")
    if job is None or not gpus:
        return
    name = next((one for one in _SLURM_GPUS if variables.get(one)), None)
    if name is None:
        text = f"Slurm job {job} was given no GPU, and {len(gpus)} can be opened: others may own them"
        yield warning("assignment", text, "srun --gres=gpu:1 ..., or sbatch --gres=gpu:1")
    else:
        yield _given(assignment, f"Slurm job {job}: {name}={variables[name]}", len(gpus))


def _runtime(assignment: Assignment, gpus: Sequence[Gpu] | None) -> Iterator[Finding]:
    given = assignment.variables.get("NVIDIA_VISIBLE_DEVICES")
    where = "Kubernetes pod" if "KUBERNETES_SERVICE_HOST" in assignment.variables else "container"
    if given is None:
        if where == "Kubernetes pod" and not gpus:
            yield note("assignment", "a Kubernetes pod without a GPU", "resources: limits: nvidia.com/gpu: 1")
        return
    if given in ("", "void", "none") and not gpus:
        mend = "docker run --gpus all; in Kubernetes: resources: limits: nvidia.com/gpu: 1"
        yield note("assignment", f"NVIDIA_VISIBLE_DEVICES={given}: the {where} was started without GPUs", mend)
    elif any(name in assignment.variables for name in _SLURM_GPUS):
        yield ok("assignment", f"NVIDIA_VISIBLE_DEVICES={given}")
    else:
        yield _given(assignment, f"NVIDIA_VISIBLE_DEVICES={given}", len(gpus or ()))


def _given(assignment: Assignment, setting: str, count: int) -> Finding:
    if assignment.assigned is None:
        return ok("assignment", setting)
    if not assignment.assigned:
        return problem("assignment", f"{setting}: what it names does not answer", "Ask for another GPU, or host.")
    text = f"{setting}: pytest-gpuperf keeps to {len(assignment.assigned)} of {count} GPUs, other programs see all"
    return note("assignment", text, f"export {_VISIBLE}={','.join(assignment.assigned)}")
