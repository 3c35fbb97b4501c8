"""What is simulated: three kinds of noise, what users have besides, and noise that is not normal."""

from msgspec.structs import replace

from benchmarks.verdict.noise import POOL, QUIET, SERVING, Noise
from benchmarks.verdict.simulate import LEARNED, PACKAGE, Scenario, round_robin
from pytest_gpuperf.records import Kind

BASES: dict[str, tuple[Noise, Kind]] = {
    "quiet": (QUIET, "compute"),
    "serving": (SERVING, "end-to-end"),
    "pool": (POOL, "end-to-end"),
}
UNUSUAL: dict[str, dict[str, object]] = {
    "heavy tails (t, 3 dof)": {"tail": "t3"},
    "stragglers (2 % of processes +30 %)": {"tail": "stragglers"},
    "drift in a visit (AR 0.9)": {"drift": 0.9},
    "two clocks 3 % apart, by process": {"modes": "process"},
    "two clocks 3 % apart, by session": {"modes": "session"},
}
CURVED = ("quiet", "serving")
CURVE_EFFECTS = tuple(percent / 100 for percent in range(1, 13))


def base_scenarios() -> list[Scenario]:
    """Five sessions, priors learned."""
    return [
        Scenario(name=name, noise=noise, kind=kind, nulls=100_000, judged=1000, powered=1000)
        for name, (noise, kind) in BASES.items()
    ]


def all_scenarios() -> list[Scenario]:
    """Everything against a stored baseline."""
    found: list[Scenario] = []
    for base in base_scenarios():
        less = replace(base, nulls=30_000, judged=600, powered=400, variants=LEARNED[:2])
        name = base.name
        found += [
            base,
            replace(less, name=f"{name}, package priors", powered=400, variants=PACKAGE[:2]),
            replace(less, name=f"{name}, 20 sessions", devices=(0,) * 20),
            replace(less, name=f"{name}, tolerance 3 %", tolerance=0.03),
        ]
    bases = [base for base in base_scenarios() if base.name in CURVED]
    for base in bases:
        curve = replace(base, name=f"{base.name}, curve", effects=CURVE_EFFECTS, variants=LEARNED[:1])
        found.append(replace(curve, nulls=400, judged=0, powered=400, suite_every=10))
        found += [_unusual(base, name) for name in UNUSUAL]
        found += _several_devices(base)
    return found


def pair_scenarios() -> list[Scenario]:
    """Pairs in one visit, where the spread between sessions cancels."""
    bases = [replace(base, nulls=50_000, judged=500, powered=1000, variants=()) for base in base_scenarios()]
    unusual = [_unusual(bases[1], name) for name in UNUSUAL if "session" not in name]
    return [*bases, *(replace(scenario, powered=500, variants=()) for scenario in unusual)]


def _unusual(base: Scenario, name: str) -> Scenario:
    noise = replace(base.noise, **UNUSUAL[name])
    return replace(
        base,
        name=f"{base.name}, {name}",
        noise=noise,
        nulls=20_000,
        judged=300,
        powered=200,
        variants=LEARNED[:2],
        suite_every=500,
    )


def _several_devices(base: Scenario) -> list[Scenario]:
    """Four devices that differ by 1 %, visited in turn; then the judged one is of them, or is a fifth."""
    several = replace(
        base,
        noise=replace(base.noise, device=0.01),
        devices=round_robin(4, base.sessions),
        nulls=5000,
        judged=300,
        powered=200,
        variants=LEARNED[:2],
        suite_every=125,
    )
    return [
        replace(several, name=f"{base.name}, devices differ by 1 %, a known one", device=1),
        replace(several, name=f"{base.name}, devices differ by 1 %, an unseen one", device=4),
    ]
