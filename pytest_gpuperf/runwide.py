"""Did the whole machine move? Many unrelated tests that got slower together are one event, not many. Pure."""

from collections.abc import Sequence
from statistics import median

from pytest_gpuperf.records import Record, TestRecord, Verdict
from pytest_gpuperf.units import format_percent

#: More than this many tests, and more than this share of those compared, move together. A smaller share would take a
#: change that slows a quarter of a suite for the machine.
LEAST_TESTS, LEAST_SHARE = 3, 0.5
#: Alike: within half the median slowdown of it, or two points.
_ALIKE_SHARE, _ALIKE_POINTS = 0.5, 0.02


class Together(Record, frozen=True, kw_only=True):
    """Tests that got slower together.

    Attributes:
        tests: Their ids.
        compared: How many tests were compared with a baseline.
        change: Their median slowdown, as a fraction.
    """

    tests: frozenset[str]
    compared: int
    change: float

    @property
    def words(self) -> str:
        """For the reason and the summary."""
        return (
            f"{len(self.tests)} of {self.compared} compared tests, of different functions, got slower together, "
            f"by {format_percent(self.change)} in the median"
        )


def moved_together(records: Sequence[TestRecord]) -> Together | None:
    """Say whether so many unrelated tests got slower, and so much alike, that it is the machine.

    More than three tests and more than half of those compared, of two test functions or more, each beyond its
    tolerance, and each by much the same as the median.

    Args:
        records: All tests of a run on one machine, judged.
    """
    compared = [record for record in records if any(verdict.change is not None for verdict in record.verdicts)]
    moved = {str(record.key): slowest for record in compared if (slowest := _slowdown(record)) is not None}
    if not moved:
        return None
    middle = median(moved.values())
    alike = {
        name for name, change in moved.items() if abs(change - middle) <= max(_ALIKE_SHARE * middle, _ALIKE_POINTS)
    }
    functions = {name.partition("[")[0] for name in alike}
    if len(functions) < 2 or len(alike) <= max(LEAST_TESTS, LEAST_SHARE * len(compared)):
        return None
    return Together(tests=frozenset(alike), compared=len(compared), change=middle)


def _slowdown(record: TestRecord) -> float | None:
    """The largest slowdown of a test beyond its tolerance, as a fraction."""
    return max((verdict.change or 0.0 for verdict in record.verdicts if _is_slower(verdict)), default=None)


def _is_slower(verdict: Verdict) -> bool:
    return verdict.status in ("REGRESSED", "INCONCLUSIVE") and verdict.is_beyond_tolerance
