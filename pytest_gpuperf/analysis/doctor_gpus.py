"""Findings about the GPUs: what each is, how it is set, whether it is well, and how two of them are connected.

What several GPUs have in common is one finding that names them all.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pytest_gpuperf.analysis.finding import Finding, gpu_names, note, ok, problem, split_message
from pytest_gpuperf.analysis.host import Facts, Gpu, Pair
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_value

#: An idle GPU is warmer only if its neighbours, or the room, are hot, or if its fans stand still.
_WARM_C = 60.0
#: An idle driver keeps less than this, without what it reserves.
_FOREIGN_BYTES = 200 * 2**20
#: What holds a clock down though there is no work; "idle" and "clock setting" are their own findings.
_BAD_HOLDS = frozenset({"power cap", "hardware slowdown", "heat (driver)", "heat (hardware)", "power brake"})
_MOST_PROCESSES = 3
_MOST_PAIRS = 6


class Complaint(Record, frozen=True, kw_only=True):
    """What is not well with one GPU.

    Attributes:
        mend: With `{i}` where nvidia-smi wants to be told which GPUs: `-i 0,1 `, or nothing for all.
    """

    level: Literal["note", "warning", "problem"]
    text: str
    mend: str


Check = Callable[[Gpu], Iterator[Complaint]]


def gpu_findings(facts: Facts) -> Iterator[Finding]:
    """Judge each GPU, those with the same finding together."""
    gpus = [gpu for gpu in facts.gpus or () if gpu.problem is None]
    for gpu in facts.gpus or ():
        if gpu.problem is not None:
            yield problem("GPU", *split_message(gpu.problem))
    if facts.gpus == ():
        yield problem("GPU", "the driver shows no GPU to this process", "nvidia-smi -L; ask the container for GPUs")
    if not gpus:
        return
    leased = {lock.gpu for lock in facts.locks.held} if facts.locks else set()
    looks: tuple[tuple[tuple[Check, ...], Callable[[Sequence[Gpu]], str]], ...] = (
        ((_mig, _persistence, _compute_mode, _ecc, _power_limit), _settings_in_words),
        ((_errors, _rows), _health_in_words),
        ((_clock,), _clock_in_words),
        ((_heat,), _heat_in_words),
        ((lambda gpu: _others(gpu, is_leased=gpu.info.index in leased),), _others_in_words),
        ((_pcie,), _pcie_in_words),
    )
    yield from _kinds(gpus)
    yield from _unlike(gpus)
    for checks, in_words in looks:
        yield from _grouped(gpus, checks) or [ok("GPU", in_words(gpus))]


def topology_findings(facts: Facts) -> Iterator[Finding]:
    """Say which pairs of GPUs are connected by NVLink."""
    pairs = facts.pairs
    if not pairs:
        return
    linked = [pair for pair in pairs if pair.link == "nvlink"]
    if len(linked) == len(pairs):
        yield ok("topology", f"NVLink in {_pair_count(pairs)}")
        return
    others = ", ".join(sorted({pair.link or "not known" for pair in pairs} - {"nvlink"}))
    text = f"no NVLink in {_pair_count(pairs)}, which meet at: {others}"
    if linked:
        lacking = [f"{pair.a}-{pair.b}" for pair in pairs if pair.link != "nvlink"]
        more = f" and {len(lacking) - _MOST_PAIRS} more" if len(lacking) > _MOST_PAIRS else ""
        listed = ", ".join(lacking[:_MOST_PAIRS])
        text = f"NVLink in {len(linked)} of {len(pairs)} pairs of GPUs, not in {listed}{more}, which meet at: {others}"
    yield note("topology", text, "Tests of several GPUs are slower there; see `nvidia-smi topo -m`.")


def _pair_count(pairs: Sequence[Pair]) -> str:
    return "the one pair of GPUs" if len(pairs) == 1 else f"all {len(pairs)} pairs of GPUs"


def _grouped(gpus: Sequence[Gpu], checks: Sequence[Check]) -> list[Finding]:
    groups: dict[Complaint, list[int]] = {}
    for check in checks:
        for gpu in gpus:
            for complaint in check(gpu):
                groups.setdefault(complaint, []).append(gpu.info.index)
    found = []
    for complaint, indices in groups.items():
        chosen = "" if len(indices) == len(gpus) else f"-i {','.join(map(str, indices))} "
        mend = complaint.mend.replace("{i}", chosen)
        text = f"{gpu_names(indices)}: {complaint.text}"
        found.append(Finding(level=complaint.level, topic="GPU", text=text, mend=mend))
    return found


def _kinds(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    kinds: dict[tuple[str, int, bool], list[int]] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.info.name, gpu.info.memory_bytes, gpu.is_in_table), []).append(gpu.info.index)
    for (name, memory_bytes, is_in_table), indices in kinds.items():
        text = f"{gpu_names(indices)}: {name}, {format_value(memory_bytes, 'B')}"
        if is_in_table:
            yield ok("GPU", f"{text}, in the table of published figures")
        else:
            mend = '`gpuperf specs --all` shows them; a limit `of="peak"` is stricter here, baselines are not touched.'
            yield note("GPU", f"{text}, not in the table: its peaks are computed upper bounds", mend)


def _unlike(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    for name in dict.fromkeys(gpu.info.name for gpu in gpus):
        alike = [gpu.info for gpu in gpus if gpu.info.name == name]
        for what, values, unit in (
            ("power limit", [info.power_limit_w for info in alike], "W"),
            ("highest SM clock", [info.max_sm_clock_mhz for info in alike], "MHz"),
            ("highest memory clock", [info.max_memory_clock_mhz for info in alike], "MHz"),
        ):
            if len(known := sorted({value for value in values if value is not None})) > 1:
                listed = ", ".join(f"{value:.0f}" for value in known)
                text = f"the {len(alike)} {name} differ: {what} {listed} {unit}"
                mend = f"nvidia-smi -q -d {'POWER' if unit == 'W' else 'CLOCK'}; tests that share them scatter by it"
                yield Finding(level="warning", topic="GPU", text=text, mend=mend)


def _mig(gpu: Gpu) -> Iterator[Complaint]:
    if not gpu.info.mig_enabled:
        return
    off = "for the whole GPU: sudo nvidia-smi {i}-mig 0"
    if not gpu.instances:
        make = "sudo nvidia-smi mig {i}-cgi 0 -C, or " + off
        yield Complaint(level="problem", text="MIG is on and has no instance: CUDA sees nothing", mend=make)
    else:
        text = f"MIG is on, {len(gpu.instances)} instances: each has a part of the GPU, without published peaks"
        yield Complaint(level="note", text=text, mend=off)


def _persistence(gpu: Gpu) -> Iterator[Complaint]:
    if gpu.info.persistence is False:
        text = "persistence mode is off: the driver unloads between runs, and each first call takes seconds"
        yield Complaint(level="note", text=text, mend="sudo nvidia-smi {i}-pm 1")


def _compute_mode(gpu: Gpu) -> Iterator[Complaint]:
    mode, mend = gpu.condition.compute_mode, "sudo nvidia-smi {i}-c 0"
    if mode == "prohibited":
        yield Complaint(level="problem", text="compute mode prohibited: no program may use CUDA", mend=mend)
    elif mode == "exclusive process":
        text = "compute mode exclusive: a test's second look, in a process of its own, finds the GPU taken"
        yield Complaint(level="warning", text=text, mend=mend)


def _ecc(gpu: Gpu) -> Iterator[Complaint]:
    if gpu.info.ecc_enabled is False:
        text = "ECC is off: a flipped bit of memory changes results unseen"
        yield Complaint(level="note", text=text, mend="sudo nvidia-smi {i}-e 1, then reboot")


def _power_limit(gpu: Gpu) -> Iterator[Complaint]:
    limit_w, default_w = gpu.info.power_limit_w, gpu.info.default_power_limit_w
    if limit_w is not None and default_w is not None and limit_w < default_w - 0.5:
        text = f"power limit {limit_w:.0f} W, below the default of {default_w:.0f} W: clocks are lower under load"
        yield Complaint(level="warning", text=text, mend=f"sudo nvidia-smi {{i}}-pl {default_w:.0f}")


def _settings_in_words(gpus: Sequence[Gpu]) -> str:
    infos = [gpu.info for gpu in gpus]
    parts = [
        "MIG off" if all(info.mig_enabled is False for info in infos) else "",
        "persistence mode on" if all(info.persistence for info in infos) else "",
        "compute mode default" if all(gpu.condition.compute_mode == "default" for gpu in gpus) else "",
        "ECC on" if all(info.ecc_enabled for info in infos) else "",
        _span("power limit", [info.power_limit_w for info in infos], "W"),
    ]
    return ", ".join(filter(None, parts)) or "the driver tells no settings"


def _errors(gpu: Gpu) -> Iterator[Complaint]:
    corrected, uncorrected = gpu.condition.ecc_corrected, gpu.condition.ecc_uncorrected
    if uncorrected:
        text = f"{uncorrected} uncorrected ECC errors since the driver was loaded: results cannot be trusted"
        mend = "Take it out of use; sudo nvidia-smi {i}--gpu-reset; if they come back, have it replaced"
        yield Complaint(level="problem", text=text, mend=mend)
    if corrected:
        text = f"{corrected} corrected ECC errors since the driver was loaded"
        yield Complaint(level="note", text=text, mend="Watch whether they grow: nvidia-smi {i}-q -d ECC")


def _rows(gpu: Gpu) -> Iterator[Complaint]:
    if gpu.condition.has_remap_failed:
        text = "a broken row of memory could not be replaced: no spare row was left"
        yield Complaint(level="problem", text=text, mend="Have the GPU replaced: nvidia-smi {i}-q -d ROW_REMAPPER")
    elif gpu.condition.is_remap_pending:
        text = "a broken row of memory waits to be replaced, which a reset does"
        yield Complaint(level="warning", text=text, mend="sudo nvidia-smi {i}--gpu-reset, while nobody uses it")


def _health_in_words(gpus: Sequence[Gpu]) -> str:
    conditions = [gpu.condition for gpu in gpus]
    if all(one.ecc_uncorrected is None and one.has_remap_failed is None for one in conditions):
        return "the driver tells nothing of memory errors"
    rows = [one.remapped_rows for one in conditions if one.remapped_rows is not None]
    return "no ECC errors, no row of memory waits to be replaced" + (f" ({sum(rows)} were)" if any(rows) else "")


def _clock(gpu: Gpu) -> Iterator[Complaint]:
    clock = _of(gpu.usage.sm_clock_mhz or gpu.state.sm_clock_mhz, gpu.info.max_sm_clock_mhz)
    holds = set(gpu.usage.holds or ())
    if "clock setting" in holds:
        text = f"the SM clock is held down by a setting (locked or application clocks): {clock}"
        mend = "sudo nvidia-smi {i}-rgc; sudo nvidia-smi {i}-rac (or leave it, if it is meant)"
        yield Complaint(level="warning", text=text, mend=mend)
    if bad := sorted(holds & _BAD_HOLDS):
        if gpu.is_busy and bad == ["power cap"]:  # as a power-limited GEMM does
            return
        while_idle = "" if gpu.is_busy else " while idle"
        text = f"the SM clock is held down{while_idle} by {', '.join(bad)}: {clock}"
        mend = "nvidia-smi {i}-q -d PERFORMANCE,TEMPERATURE,POWER; look at fans, power cables and the room"
        yield Complaint(level="warning", text=text, mend=mend)


def _clock_in_words(gpus: Sequence[Gpu]) -> str:
    now = _span("SM clock", [gpu.usage.sm_clock_mhz or gpu.state.sm_clock_mhz for gpu in gpus], "MHz")
    most = _span("at most", [gpu.info.max_sm_clock_mhz for gpu in gpus], "MHz")
    held = "held down by nothing" if all(gpu.usage.holds is not None for gpu in gpus) else ""
    return ", ".join(filter(None, (now, most, held))) or "the driver tells no clocks"


def _heat(gpu: Gpu) -> Iterator[Complaint]:
    temperature_c = gpu.state.temperature_c
    if temperature_c is not None and temperature_c > _WARM_C and not gpu.is_busy:
        text = f"{temperature_c:.0f} °C while idle, above {_WARM_C:.0f} °C: it will be too hot under load"
        yield Complaint(
            level="warning", text=text, mend="Look at fans and the room, or let it cool: nvidia-smi {i}-l 5"
        )


def _heat_in_words(gpus: Sequence[Gpu]) -> str:
    return _span("temperature", [gpu.state.temperature_c for gpu in gpus], "°C") or "the driver tells no temperature"


def _others(gpu: Gpu, *, is_leased: bool) -> Iterator[Complaint]:
    used = gpu.state.memory_used_bytes or 0
    others = gpu.others or ()
    if not others and used <= _FOREIGN_BYTES:
        return
    memory = f"{format_value(used, 'B')} in use"
    if is_leased:
        yield Complaint(level="note", text=f"{memory}, by a run of pytest-gpuperf", mend="Wait for it to end.")
        return
    named = [f"{one.pid} ({one.command or 'not to be seen from here'})" for one in others[:_MOST_PROCESSES]]
    more = f" and {len(others) - _MOST_PROCESSES} more" if len(others) > _MOST_PROCESSES else ""
    who = f" by other processes: {', '.join(named)}{more}" if named else " by processes that are not to be seen"
    mend = "End them (`nvidia-smi`), or keep off: export CUDA_VISIBLE_DEVICES=<the other GPUs>"
    yield Complaint(level="warning", text=memory + who, mend=mend)


def _others_in_words(gpus: Sequence[Gpu]) -> str:
    known = [gpu.state.memory_used_bytes for gpu in gpus if gpu.state.memory_used_bytes is not None]
    used = f"at most {format_value(max(known), 'B')} in use" if known else "memory in use not known"
    if all(gpu.others is None for gpu in gpus):
        return f"{used}; the driver lists no processes"
    return f"no other processes, {used}"


def _pcie(gpu: Gpu) -> Iterator[Complaint]:
    now = (gpu.condition.pcie_generation, gpu.condition.pcie_width)
    most = (gpu.info.pcie_generation, gpu.info.pcie_width)
    lower = [a < b for a, b in zip(now, most, strict=True) if a is not None and b is not None]
    if not any(lower):
        return
    link = f"PCIe link gen {now[0]} x{now[1]} of gen {most[0]} x{most[1]}"
    if gpu.is_busy:
        mend = "nvidia-smi {i}-q -d PERFORMANCE; look at slot, riser and BIOS: copies are slower"
        yield Complaint(level="warning", text=f"{link} under load", mend=mend)
    else:
        text = f"{link} while idle, which says little: links save power"
        yield Complaint(level="note", text=text, mend="Look again under load: `gpuperf doctor` while a test runs")


def _pcie_in_words(gpus: Sequence[Gpu]) -> str:
    links = sorted({(gpu.condition.pcie_generation or 0, gpu.condition.pcie_width or 0) for gpu in gpus})
    if any(0 in link for link in links):
        return "the driver tells nothing of the PCIe link"
    return (
        "PCIe link " + ", ".join(f"gen {generation} x{width}" for generation, width in links) + ", as wide as it goes"
    )


def _of(value: float | None, most: float | None) -> str:
    known = "not known" if value is None else f"{value:.0f} MHz"
    return known if most is None else f"{known} of {most:.0f}"


def _span(what: str, values: Sequence[float | None], unit: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):.0f}", f"{max(known):.0f}"
    return f"{what} {low} {unit}" if low == high else f"{what} {low} to {high} {unit}"
