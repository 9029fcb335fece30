"""Shards of a store on this machine's disk: each fetched once, verified, deleted when others are needed sooner.

    cache_dir/shards/KEY-SIZE.beton        verified, for any training that reads the same shard
    cache_dir/shards/KEY-SIZE.beton.part   being fetched; locked by whoever does it
    cache_dir/tables/…                     what the numbering of samples needs of each shard (remote_tables.py)

All coordination of processes is by locks of the files themselves, which end with their process: a reader holds a shared
lock of what it reads, so nobody deletes it; who fetches holds the lock of its `.part`, so nobody else does, and what a
dead process has left is begun anew. A file gets its name when it is verified, and its time of change then says so
(`CachedShard.mark_ns`): whoever writes to it later changes that, and it is fetched again.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from simclr_dist.data.beton.content import read_records_digest
from simclr_dist.data.beton.reader import Beton, open_beton
from simclr_dist.data.sources.remote import RemoteFile, UnavailableError
from simclr_dist.errors import DataError

ADVICE = "make room there, or choose another data.cache_dir"
PART = ".part"
_NAME = re.compile(r"[0-9a-f]{24}-(\d+)\.beton(?:\.part)?")
_POLL_S = 0.05
_WAIT_FOR_ROOM = 40  # looks
_LONGEST_PAUSE_S = 15.0
_USED_NS = 60_000_000_000  # a file that was used in the last minute need not be marked as used again
_NO_LIMIT = 1 << 62
NEVER = 1 << 62
"""In place of the step at which a shard is needed next."""


@dataclass(frozen=True)
class CachedShard:
    """A shard of a store, as its tables say it is. fingerprint: of the tables. version: as the store has it.

    written_digest: of its records; None: its writer left none, and its content is known by place and version.
    """

    file: RemoteFile
    num_bytes: int
    fingerprint: str
    written_digest: str | None
    version: tuple[str, ...]
    name: str = field(init=False)
    """In the cache."""
    mark_ns: int = field(init=False)
    """The time of change of its verified copy; whole seconds, which every file system keeps."""

    def __post_init__(self) -> None:
        content = [self.written_digest] if self.written_digest else [self.file.shown, *self.version]
        name = name_of([self.fingerprint, *content], self.num_bytes)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "mark_ns", (1_000_000_000 + 2 * int(name[:7], 16)) * 1_000_000_000)


def name_of(parts: list[str], num_bytes: int) -> str:
    return f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}-{num_bytes}.beton"


class NoRoomError(Exception):
    """What is in the cache is needed sooner."""


@dataclass(frozen=True)
class CachePlace:
    """The settings. num_bytes: that the shards may take; None: all stay. timeout_s: how long a store may fail."""

    folder: Path
    num_bytes: int | None
    timeout_s: float

    @property
    def limit(self) -> int:
        return _NO_LIMIT if self.num_bytes is None else self.num_bytes

    @property
    def silence_s(self) -> float:
        """After which a server counts as gone: there is time for another try."""
        return self.timeout_s / 2


class ShardCache:
    """For any number of threads, and processes of one machine. Raises DataError where the folder cannot be used."""

    def __init__(self, place: CachePlace) -> None:
        self.place = place
        self.tables = place.folder / "tables"
        self._shards = place.folder / "shards"
        self._shards_text = f"{self._shards}/"
        self._needed: Callable[[], Mapping[str, int]] = dict
        self._needed_now = -1
        self._told: set[str] = set()
        self._failures: dict[str, UnavailableError] = {}  # of the last try of each shard, by any thread
        with self.on_disk():
            for folder in (self._shards, self.tables):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            with self.locked("lock"):
                pass

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Around whatever uses the folder. Raises UnavailableError in place of OSError."""
        try:
            yield
        except OSError as error:
            text = (
                f"data.cache_dir: {self.place.folder} cannot be used: {error.strerror}; choose a folder on a local disk"
            )
            raise UnavailableError(text, is_final=True) from None

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """By one process and thread at a time. Raises OSError."""
        fd = os.open(self.place.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def follow(self, needed: Callable[[], Mapping[str, int]], now: int) -> None:
        """Deletes by an order from here on. needed: the step at which each name is needed next; those up to `now` stay.
        What it does not name goes first, what was not read for longest before the rest.
        """
        self._needed, self._needed_now = needed, now

    def names(self) -> dict[str, int]:
        """The names of all files, also of those that are being fetched, and their bytes when they are whole."""
        with self.on_disk():
            found = [(name, _NAME.fullmatch(name)) for name in os.listdir(self._shards)]
        return {name: int(match[1]) for name, match in found if match}

    def path(self, shard: CachedShard) -> Path:
        return self._shards / shard.name

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    @contextmanager
    def reading(self, shard: CachedShard) -> Iterator[int]:
        """A descriptor of the whole, verified shard, which is fetched where it is not there. Raises DataError."""
        fd = self._open(shard)
        if fd is None:
            patience = _Patience(self.place.timeout_s)
            while fd is None:
                self._fetch_patiently(shard, patience)
                fd = self._open(shard)
        try:
            yield fd
        finally:
            os.close(fd)  # gives the lock back

    def _open(self, shard: CachedShard) -> int | None:
        """None: it is not there, or not as it was verified."""
        path = f"{self._shards_text}{shard.name}"  # asked for each image: a Path takes as long as opening it
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None
        fcntl.flock(fd, fcntl.LOCK_SH)
        found = os.fstat(fd)
        if found.st_nlink and (found.st_size, found.st_mtime_ns) == (shard.num_bytes, shard.mark_ns):
            if time.time_ns() - found.st_atime_ns > _USED_NS:
                with suppress(OSError):
                    os.utime(fd, ns=(time.time_ns(), shard.mark_ns))
            return fd
        with self.on_disk(), self.locked("lock"):
            is_damaged = _is_at(fd, path)
            if is_damaged:
                os.unlink(path)
        os.close(fd)
        if is_damaged:  # else it was deleted when it had been opened
            self.tell(f"{path}: was changed since it was verified; {shard.file.shown} is fetched again")
        return None

    def _fetch_patiently(self, shard: CachedShard, patience: _Patience) -> None:
        """One try, or a look at that of another process. Raises DataError when patience is at its end."""
        try:
            if self.fetch(shard, exceed=patience.without_room > _WAIT_FOR_ROOM, each=patience.has_come):
                return
            with suppress(OSError):
                patience.has_come(os.stat(f"{self.path(shard)}{PART}").st_size)
            patience.last = (
                self._failures.get(shard.name)
                or patience.last
                or UnavailableError(f"{shard.file.shown}: another process does not get on with it")
            )
            if patience.is_at_its_end():
                raise patience.last
            time.sleep(_POLL_S)
        except NoRoomError:  # others read, or still fetch, what could go
            patience.without_room += 1
            time.sleep(_POLL_S)
        except UnavailableError as error:
            if error.is_final:
                raise
            patience.last, patience.tries = error, patience.tries + 1
            if patience.is_at_its_end():
                raise DataError(
                    f"{error} ({patience.tries} tries, nothing new for {self.place.timeout_s:g} s: "
                    "data.fetch_timeout_s)"
                ) from None
            self.tell(f"{error}; trying again for {self.place.timeout_s:g} s (data.fetch_timeout_s)")
            time.sleep(min(2.0**patience.tries / 2, _LONGEST_PAUSE_S, self.place.timeout_s / 4))

    def tell(self, text: str) -> None:
        """A warning, once."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)

    # -----------------------------------------------------------------------------------------------------------------
    # Fetching

    def fetch(
        self,
        shard: CachedShard,
        *,
        keep: Collection[str] = (),
        exceed: bool = False,
        each: Callable[[int], object] = lambda _: None,
    ) -> bool:
        """One try. False: another process or thread is at it.

        keep: names that it must not displace. exceed: rather have the cache too large than not have the shard.
        each: see RemoteFile.copy. Raises UnavailableError, NoRoomError.
        """
        with self.claimed(shard.name, shard.num_bytes, keep, exceed) as part:
            if part is None:
                return False
            if self._is_held(shard):
                return True
            try:
                shard.file.copy(part, shard.num_bytes, ADVICE, each)
                self.keep(part, shard)
            except UnavailableError as error:
                self._failures[shard.name] = error
                raise
            self._failures.pop(shard.name, None)
            return True

    @contextmanager
    def claimed(self, name: str, num_bytes: int, keep: Collection[str], exceed: bool) -> Iterator[Path | None]:
        """The empty file `NAME.part` for this thread alone, with room for so many bytes, deleted afterwards unless it
        was kept; None: another has it. keep, exceed: see `fetch`. Raises UnavailableError, NoRoomError.
        """
        part = self._shards / f"{name}{PART}"
        with ExitStack() as stack:
            with self.on_disk(), self.locked("lock"):
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                stack.callback(os.close, fd)
                is_ours = _lock_at_once(fd) and _is_at(fd, part)
                if is_ours:
                    stack.callback(lambda: part.unlink() if _is_at(fd, part) else None)
                    os.ftruncate(fd, 0)
                    self._make_room(part.name, num_bytes, keep, exceed)
            yield part if is_ours else None

    def keep(self, part: Path, shard: CachedShard) -> None:
        """Gives a fetched file its name, if it is what the tables said. Raises UnavailableError."""
        with open_part(part, shard.file) as beton:
            if beton.fingerprint != shard.fingerprint or beton.num_bytes != shard.num_bytes:
                raise UnavailableError(
                    f"{shard.file.shown}: is another file than when its tables were read; start again"
                )
            if shard.written_digest is not None and read_records_digest(beton) != shard.written_digest:
                raise UnavailableError(
                    f"{shard.file.shown}: what came is not what was written: pixels or labels differ"
                )
            with self.on_disk():
                os.fsync(beton.fd)
                os.utime(beton.fd, ns=(time.time_ns(), shard.mark_ns))
                os.replace(part, self.path(shard))

    def _is_held(self, shard: CachedShard) -> bool:
        try:
            found = os.stat(self.path(shard))
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (shard.num_bytes, shard.mark_ns)

    # -----------------------------------------------------------------------------------------------------------------
    # Room

    def _make_room(self, name: str, num_bytes: int, keep: Collection[str], exceed: bool) -> None:
        """For a file of that name; the lock is held. keep, exceed: see `fetch`. Raises NoRoomError."""
        if self.place.num_bytes is None:
            return
        there = {other: size for other, size in self.names().items() if other != name}
        excess = sum(there.values()) + num_bytes - self.place.num_bytes
        if excess <= 0:
            return
        next_use = self._needed()
        uses = {other: next_use.get(other.removesuffix(PART), NEVER) for other in there}
        later = [o for o in there if uses[o] > self._needed_now and o.removesuffix(PART) not in keep]
        if not exceed and sum(there[other] for other in later) < excess:
            raise NoRoomError
        for other in sorted(later, key=lambda other: (-uses[other], self._used_ns(other))):
            if excess > 0 and self._delete(other):
                excess -= there[other]
        if excess > 0 and not exceed:
            raise NoRoomError
        if excess > 0:
            self.tell(
                f"data.cache_size: {in_gb(self.place.num_bytes)} do not hold all shards that are read at once; "
                f"{self.place.folder} is larger now"
            )

    def _used_ns(self, name: str) -> int:
        try:
            return os.stat(self._shards / name).st_atime_ns
        except OSError:
            return 0

    def _delete(self, name: str) -> bool:
        """False where somebody reads or writes it."""
        path = self._shards / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            if not _lock_at_once(fd):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(fd)

    def refuse_if_too_small(self, at_once: int, shards: Mapping[str, int]) -> None:
        """at_once: bytes of the shards that are read at the same time. shards: all, by name. Raises DataError."""
        place, total = self.place, sum(shards.values())
        if at_once > place.limit:
            raise DataError(
                f"data.cache_size: {in_gb(place.limit)}, but {in_gb(at_once)} of shards are read at once, of "
                f"{in_gb(total)} in all: raise it, or read fewer at a time with data.order=shard_local and a smaller "
                "data.order_window, or smaller shards (`simclr-dist split`)"
            )
        held = sum(size for name, size in self.names().items() if not name.endswith(PART))
        missing = min(
            sum(size for name, size in shards.items() if not (self._shards / name).exists()), place.limit - held
        )
        free = shutil.disk_usage(place.folder).free
        if missing > free:
            raise DataError(
                f"data.cache_dir: {in_gb(free)} are free in {place.folder}, but shards of {in_gb(missing)} are to "
                "come: make room, choose another folder, or set data.cache_size to what there is"
            )


def in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


@contextmanager
def open_part(part: Path, file: RemoteFile) -> Iterator[Beton]:
    """A fetched file that has no name yet, opened and checked. Raises UnavailableError: a try may bring it whole."""
    try:
        beton = open_beton(part, mapped=False)
    except DataError as error:
        what = str(error).removeprefix(f"{part}: ").partition("; make the file again")[0]
        raise UnavailableError(f"{file.shown}: what came is {what}") from None
    with beton:
        yield beton


class _Patience:
    """At its end when nothing new has come for a while: another try that gets as far as the last one is nothing new."""

    def __init__(self, timeout_s: float) -> None:
        self.last: UnavailableError | None = None
        self.tries = self.without_room = 0
        self._timeout_s, self._furthest, self._since_s = timeout_s, 0, time.monotonic()

    def has_come(self, num_bytes: int) -> None:
        if num_bytes > self._furthest:
            self._furthest, self._since_s = num_bytes, time.monotonic()

    def is_at_its_end(self) -> bool:
        return time.monotonic() - self._since_s > self._timeout_s


def _lock_at_once(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path | str) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there, ours = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


# ---------------------------------------------------------------------------------------------------------------------
# The one of this process

_place: CachePlace | None = None
_opened: dict[CachePlace, ShardCache] = {}
_opening = threading.Lock()


def keep_shards_in(place: CachePlace | None) -> None:
    """Where shards of stores are kept by this process from here on. Opens nothing. None: in a folder of its own, which
    ends with it.
    """
    global _place
    _place = place


def shard_cache() -> ShardCache:
    """Raises DataError where its folder cannot be used."""
    place = _place or _of_this_process()
    with _opening:
        if place not in _opened:
            _opened[place] = ShardCache(place)
        return _opened[place]


@cache
def _of_this_process() -> CachePlace:
    folder = Path(tempfile.mkdtemp(prefix="simclr-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return CachePlace(folder, None, 60.0)
