"""Exclusive use of devices across the workers of a run and across separate runs on one host.

Whoever wants devices draws a ticket, which names the locks that it wants, and takes no lock that a lower ticket wants:
a test that needs eight GPUs is not overtaken for ever by tests that need one. It takes all of a set or nothing, so
nobody holds one device and waits for another. All are `flock`s, tickets too: of a process that was killed nothing is
left that counts.
"""

import contextlib
import os
import pwd
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pytest_gpuperf.devices import Device, hash_of
from pytest_gpuperf.errors import DeviceError, LeaseTimeout
from pytest_gpuperf.locks import is_held, try_lock
from pytest_gpuperf.processes import is_running
from pytest_gpuperf.records import Record
from pytest_gpuperf.requirement import Exclusivity

#: How long a test waits for devices that others hold, and when it says so.
TIMEOUT_S = 3600.0
#: How long a worker of pytest-xdist waits for its own GPU before it takes another one that is free.
PATIENCE_S = 60.0
FIRST_WORD_S = 30.0
NEXT_WORD_S = 300.0
#: Fixed, because runs by ssh, cron and CI have other temporary folders and must exclude each other all the same.
_SYSTEM_FOLDER = Path("/run/lock/gpuperf")
_SHARED_FOLDER = Path("/tmp")  # noqa: S108 - the folder in it is checked to be the user's own
_POLL_S = 0.05
_QUEUE_POLL_S = 0.005
_HOST, _QUEUE, _TICKET = "host.lock", "queue.lock", "ticket-"
_MOST_NAMED = 4

#: Names of lock files -> whether to hold it alone, or shared.
Claim = Mapping[str, bool]


class Lease(Record, frozen=True, kw_only=True):
    """Devices that this process holds.

    Attributes:
        devices: In the order of the set that was taken.
        descriptors: Of the locks. A process that works for this one inherits them (`pass_fds`), so that the devices
            stay held until both are gone.
    """

    devices: tuple[Device, ...]
    descriptors: tuple[int, ...] = ()


class Holder(Record, frozen=True, kw_only=True):
    """Who holds a lock, or waits, as it wrote into the file.

    Attributes:
        test: Node id, or `None` outside a test.
        since: `2026-11-21 10:12:51 UTC`.
    """

    pid: int
    user: str
    since: str
    test: str | None = None

    def __str__(self) -> str:
        """As messages have it: `pid 71 (test_a.py::test_one, alice, since 2026-11-21 10:12:51 UTC)`."""
        return f"pid {self.pid} ({', '.join(filter(None, (self.test, self.user)))}, since {self.since})"


class Ticket(Record, frozen=True, kw_only=True):
    """What somebody waits for, as it wrote into the ticket's file.

    Attributes:
        claim: Every lock that one of the sets needs that would do.
        holder: Of the ticket; `None`: it left no word.
    """

    claim: dict[str, bool]
    holder: Holder | None = None


def lock_folder() -> Path:
    """Folder of the lock files: `$GPUPERF_LOCK_DIR`; else /run/lock/gpuperf if root made it; else one's own in /tmp.

    Runs of different users exclude each other only in a folder that they share, which is one of the first two.

    Raises:
        DeviceError: It is a link, no folder, somebody else's own, not for reading and writing, or named from where this
            process is.
    """
    if named := os.environ.get("GPUPERF_LOCK_DIR"):
        share = f"Name another one, or have its owner run `chmod 1777 {named}`."
        return _checked(_made(Path(named)), f"GPUPERF_LOCK_DIR={named}", "Name another one.", no_right=share)
    if _is_of_administrator(_SYSTEM_FOLDER):
        mend = f"Ask for `sudo install -d -m 1777 {_SYSTEM_FOLDER}`, or set GPUPERF_LOCK_DIR."
        return _checked(_SYSTEM_FOLDER, f"The lock folder {_SYSTEM_FOLDER}", mend)
    folder = _SHARED_FOLDER / f"gpuperf-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:  # a container without a /tmp, or one that cannot be written to
        raise DeviceError(
            f"The lock folder {folder} cannot be made: {error.strerror}. Set GPUPERF_LOCK_DIR to a folder on a local "
            "disk that you may write to."
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise DeviceError(f"The lock folder {folder} is not a folder of yours. Remove it or set GPUPERF_LOCK_DIR.")
    return _checked(folder, f"The lock folder {folder}", "Run `chmod u+rwx` on it, or set GPUPERF_LOCK_DIR.")


def _is_of_administrator(folder: Path) -> bool:
    """Whether something is there that root, or this user, made: on most systems anybody may make it."""
    try:
        return folder.lstat().st_uid in (0, os.getuid())
    except FileNotFoundError:
        return False


def _made(folder: Path) -> Path:
    if not folder.is_absolute():
        raise DeviceError(f"GPUPERF_LOCK_DIR={folder} is no whole path: others would not find it. Begin with /.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"GPUPERF_LOCK_DIR={folder} is not a folder to lock in: {error.strerror}."
        raise DeviceError(f"{why} Name another one.") from None
    return folder


def _checked(folder: Path, what: str, mend: str, *, no_right: str | None = None) -> Path:
    if folder.is_symlink():
        raise DeviceError(f"{what} is a link to {folder.resolve()}. {mend}")
    if not folder.is_dir():
        raise DeviceError(f"{what} is not a folder. {mend}")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):  # who cannot list it sees nobody's ticket
        raise DeviceError(f"{what} is not readable and writable for you. {no_right or mend}")
    return folder


def lock_path(folder: Path, uuid: str) -> Path:
    """Name the lock file of a device, in which `holder_of` finds who holds it."""
    return folder / f"device-{hash_of(uuid)}.lock"


def home_path(folder: Path, uuid: str) -> Path:
    """Name the lock file that a run holds while a device is the home of one of its workers."""
    return folder / f"home-{hash_of(uuid)}.lock"


def is_free(device: Device, folder: Path) -> bool:
    """Whether nobody holds a device just now.

    Raises:
        DeviceError: A lock of it cannot be opened.
    """
    return not any(is_held(folder / name) for name in claim_of((device,), "gpu"))


def claim_of(devices: Sequence[Device], exclusive: Exclusivity) -> Claim:
    """List the locks of a lease: the host's, shared unless it is wanted alone, and each device's own.

    A MIG instance shares its GPU with the other instances, and excludes who wants the whole.
    """
    claim = {_HOST: exclusive == "host"}
    claim |= {lock_path(Path(), device.parent_uuid).name: False for device in devices if device.parent_uuid}
    return claim | {lock_path(Path(), device.uuid).name: True for device in devices}


@contextlib.contextmanager
def lease(  # noqa: PLR0913 - what to hold; the rest has defaults
    sets: Sequence[tuple[Device, ...]],
    *,
    exclusive: Exclusivity = "gpu",
    folder: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    on_wait: Callable[[str], None] | None = None,
    waited_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Hold one set of devices exclusively: all of it or nothing.

    Args:
        sets: Those that would do, in order of preference; at least one.
        exclusive: `host`: nobody else may hold any device meanwhile.
        folder: Where the lock files are; `None`: `lock_folder()`.
        timeout_s: How long to wait for others.
        on_wait: Is told after 30 s, and every 5 min from then on, what is waited for and who holds it; `None`: whoever
            reads standard error is.
        waited_s: How long the caller has waited already; it counts.
        clock: Seconds from any start.
        sleep: Waits for some seconds.

    Raises:
        LeaseTimeout: None became free in time; the message names who holds them.
        DeviceError: A lock cannot be opened.
    """
    place = folder or lock_folder()
    claims = [claim_of(devices, exclusive) for devices in sets]
    wait = _Wait(timeout_s, on_wait or _tell, clock, sleep, begin_s=clock() - waited_s, next_word_s=FIRST_WORD_S)
    wanted = f"{_described(sets)}{' and the host to itself' if exclusive == 'host' else ''}"
    with contextlib.ExitStack() as held:
        with _ticket(place, claims, wait) as number:
            while (taken := _take_any(claims, _earlier(place, number), place, held)) is None:
                wait.pause(lambda: f"{wanted}: {_reason(claims, place, number)}")
        index, descriptors = taken
        yield Lease(devices=sets[index], descriptors=descriptors)


@contextlib.contextmanager
def lease_patiently(
    preferred: Sequence[tuple[Device, ...]],
    others: Sequence[tuple[Device, ...]],
    *,
    exclusive: Exclusivity = "gpu",
    patience_s: float = PATIENCE_S,
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[Lease]:
    """Hold one of the preferred sets; if none becomes free for a while, any: another run may hold them for hours.

    Args:
        preferred: Sets that would do, and should.
        others: Sets that would do, too.
        exclusive: See `lease`.
        patience_s: How long to wait for a preferred one alone.
        on_wait: See `lease`.

    Raises:
        LeaseTimeout: See `lease`.
        DeviceError: See `lease`.
    """
    with contextlib.ExitStack() as held:
        limit_s = patience_s if others else TIMEOUT_S
        try:
            lent = held.enter_context(lease(preferred, exclusive=exclusive, timeout_s=limit_s, on_wait=on_wait))
        except LeaseTimeout:
            if not others:
                raise
            any_set = [*preferred, *others]
            lent = held.enter_context(lease(any_set, exclusive=exclusive, on_wait=on_wait, waited_s=patience_s))
        yield lent


def _tell(words: str) -> None:
    print(f"gpuperf: {words}", file=sys.stderr, flush=True)  # noqa: T201 - seen while a command waits


@dataclass(slots=True)
class _Wait:
    """How long a lease has waited, what it says meanwhile, and when it gives up."""

    timeout_s: float
    tell: Callable[[str], None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    begin_s: float
    next_word_s: float

    def pause(self, explain: Callable[[], str], poll_s: float = _POLL_S) -> None:
        waited_s = self.clock() - self.begin_s
        if waited_s >= self.timeout_s:
            waited = f"{waited_s:.{0 if waited_s >= 10 else 2}f} s"
            raise LeaseTimeout(f"No device became free in {waited}. Wanted {explain()} Wait for it or end it.")
        if waited_s >= self.next_word_s:
            self.next_word_s = waited_s + NEXT_WORD_S
            self.tell(f"has waited {waited_s:.0f} s for {explain()}")
        self.sleep(poll_s)


@contextlib.contextmanager
def _ticket(place: Path, claims: Sequence[Claim], wait: _Wait) -> Iterator[int]:
    """Draw the next number and keep it; a number is above those of all that wait."""
    # Before the queue is held: a user's name may come from another host.
    text = msgspec.json.encode(Ticket(claim=_all_of(claims), holder=_myself()))
    busy = f"a ticket: {place / _QUEUE} is held, which `fuser -v` explains."
    with contextlib.ExitStack() as ours:
        with contextlib.ExitStack() as queue:
            while try_lock(place / _QUEUE, queue) is None:
                queue.close()
                wait.pause(lambda: busy, _QUEUE_POLL_S)
            _remove_dead(place)
            number = max(_tickets(place), default=0) + 1
            path = _ticket_path(place, number)
            descriptor = try_lock(path, ours)
            assert descriptor is not None, "nobody else makes tickets while this process holds the queue"
            ours.callback(path.unlink, missing_ok=True)  # before it is closed: then its number may be drawn again
            with contextlib.suppress(OSError):  # a full disk: a ticket that says nothing wants everything
                os.pwrite(descriptor, text, 0)
        yield number


def _all_of(claims: Sequence[Claim]) -> dict[str, bool]:
    """Every lock that one of the claims wants: alone, if one wants it so."""
    names = dict.fromkeys(name for claim in claims for name in claim)
    return {name: any(claim.get(name, False) for claim in claims) for name in names}


def _ticket_path(place: Path, number: int) -> Path:
    return place / f"{_TICKET}{number:012}"


def _tickets(place: Path) -> list[int]:
    """Numbers of all tickets, the lowest first."""
    try:
        names = os.listdir(place)  # noqa: PTH208 - all that wait do so twenty times a second, and Paths are slow
    except OSError as error:
        raise DeviceError(f"The lock folder {place} cannot be listed: {error.strerror}. Start again.") from None
    numbers = [name.removeprefix(_TICKET) for name in names if name.startswith(_TICKET)]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _remove_dead(place: Path) -> None:
    """Remove the tickets of processes that are gone. Only who holds the queue may: a new one is not locked at once."""
    for path in [_ticket_path(place, number) for number in _tickets(place)]:
        if not is_held(path):
            with contextlib.suppress(OSError):  # another user's, in a folder like /tmp: it does not count all the same
                path.unlink()


def _earlier(place: Path, number: int) -> Iterator[Ticket]:
    """The lower tickets of those who are alive, read one by one: whoever waits seldom needs more than the first."""
    paths = (_ticket_path(place, other) for other in _tickets(place) if other < number)
    return map(_read_ticket, filter(is_held, paths))


def _read_ticket(path: Path) -> Ticket:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ticket)
    except (OSError, msgspec.MsgspecError):  # it has just gone, and the next look will find so
        return Ticket(claim={_HOST: True})


def _clash(one: Claim, other: Claim) -> bool:
    return any(one[name] or other[name] for name in one.keys() & other.keys())


def _take_any(
    claims: Sequence[Claim], earlier: Iterator[Ticket], place: Path, held: contextlib.ExitStack
) -> tuple[int, tuple[int, ...]] | None:
    """Lock the first claim that is free as a whole, and that nobody waits for who came earlier."""
    left = dict(enumerate(claims))
    while left and (other := next(earlier, None)):
        left = {index: claim for index, claim in left.items() if not _clash(claim, other.claim)}
    for index, claim in left.items():
        found = _take(claim, place, held)
        if found is not None:
            return index, found
        held.close()
    return None


def _take(claim: Claim, place: Path, held: contextlib.ExitStack) -> tuple[int, ...] | None:
    descriptors = []
    for name, is_alone in claim.items():
        descriptor = try_lock(place / name, held, is_shared=not is_alone)
        if descriptor is None:
            return None
        descriptors.append(descriptor)
    for descriptor, is_alone in zip(descriptors, claim.values(), strict=True):
        if is_alone:
            _sign(descriptor)
    return tuple(descriptors)


def _sign(descriptor: int) -> None:
    """Write down who holds a lock, for whoever waits for it."""
    text = msgspec.json.encode(_myself())
    with contextlib.suppress(OSError):  # a full disk is no reason not to measure
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))


def _myself() -> Holder:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0] or None
    return Holder(pid=os.getpid(), user=_user(), since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", test=test)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container that runs under a number alone
        return f"user {os.getuid()}"


def holder_of(path: Path) -> Holder | None:
    """Read who holds a lock file, or held it last; `None`: nobody known."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(4096), type=Holder)
    except (OSError, msgspec.MsgspecError):
        return None


def _reason(claims: Sequence[Claim], place: Path, number: int) -> str:
    """Why a lease waits: who holds what it wants, and who came earlier."""
    wanted = _all_of(claims)
    paths = [place / name for name in wanted if is_held(place / name)]
    if not paths:  # the host, or a GPU, is shared by those who hold something of it
        paths = [path for path in sorted(place.glob("device-*.lock")) if is_held(path)]
    holders = dict.fromkeys(_words_on_holder(path) for path in paths)
    ahead = [one for one in _earlier(place, number) if _clash(wanted, one.claim)]
    waiters = [str(one.holder or "somebody unknown") for one in ahead]
    queue = f"; {_listed(waiters)} wait{'s' * (len(waiters) == 1)} before it" if waiters else ""
    return f"held by {_listed(list(holders)) or 'nobody any more'}{queue}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more}"


def _words_on_holder(path: Path) -> str:
    holder = holder_of(path)
    if holder is None:
        return f"somebody unknown (`fuser -v {path}`)"
    if not is_running(holder.pid):
        return f"{holder}, which has ended or runs in another container; what it left is shown by `fuser -v {path}`"
    return str(holder)


def _described(sets: Sequence[tuple[Device, ...]]) -> str:
    names = " or ".join(sorted({device.name for devices in sets for device in devices}))
    return names if len(sets[0]) == 1 else f"{len(sets[0])} x {names}"
