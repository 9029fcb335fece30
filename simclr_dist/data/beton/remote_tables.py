"""The tables of shards behind URLs, read without their pixels: all that is needed to number, order and label samples.

Of each shard there is a stand-in in the cache: a file of its length with the bytes of its tables in their places, and
holes where the records are. It opens and is checked as the shard itself, with its JSON file beside it. The tables are
read by ranges of bytes; from a server that gives none, the shard is fetched whole, which is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from simclr_dist.atomic import replace_text, replaces
from simclr_dist.bounded_json import read_json
from simclr_dist.data.beton.reader import (
    DESCRIPTOR,
    HEADER,
    LONGEST_SIDECAR,
    VERSION,
    metadata_type,
    sidecar_path,
)
from simclr_dist.data.beton.shard_cache import ADVICE, CachedShard, ShardCache, name_of, open_part
from simclr_dist.data.sources.remote import (
    NoPartsError,
    RemoteFile,
    RemoteState,
    UnavailableError,
    refuse_secrets,
    remote_files,
    tried,
)
from simclr_dist.errors import DataError

_AT_A_TIME = 16  # requests: each waits for the network
_FRESH_S = 600.0  # so long a store is not asked again: the processes of a training start together
_BLOCK = 64 << 20
_known: dict[tuple[str, Path], tuple[Path, ...]] = {}
_remote: dict[Path, tuple[RemoteFile, RemoteState]] = {}


def stand_ins(url: str, cache: ShardCache) -> tuple[Path, ...]:
    """Those of the shards that a URL names, asked for once a process. Raises DataError."""
    key = url, cache.place.folder
    if key not in _known:
        refuse_secrets(url)
        files = remote_files(url, cache.place.silence_s)
        with cache.on_disk(), cache.locked("tables.lock"), ThreadPoolExecutor(_AT_A_TIME) as pool:
            try:
                _known[key] = tuple(pool.map(lambda file: _stand_in(file, cache), files))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return _known[key]


def shown_path(path: Path) -> str:
    """For people: the URL where `path` stands for a shard of a store."""
    return _remote[path][0].shown if path in _remote else str(path)


def cached_shard(path: Path, fingerprint: str, written_digest: str | None) -> CachedShard | None:
    """The shard that a stand-in stands for; None: the file is none. The digests are those of its tables."""
    if path not in _remote:
        return None
    file, state = _remote[path]
    return CachedShard(file, state.num_bytes or 0, fingerprint, written_digest, state.version)


def _stand_in(file: RemoteFile, cache: ShardCache) -> Path:
    name = file.name.rpartition("/")[2]
    path = cache.tables / hashlib.sha256(file.shown.encode()).hexdigest()[:24] / name
    record = path.with_name("store.json")
    before, asked_s = _asked_before(record, path)
    if before is None or not 0 <= time.time() - asked_s < _FRESH_S:
        now = tried(file.state)
        if before is None or not now.version or now != before:
            now = _write_tables(file, now, path, cache)
        _write_sidecar(file, path, cache)
        said = [now.num_bytes, list(now.version), path.stat().st_mtime_ns, time.time()]
        replace_text(record, json.dumps(said))
        before = now
    _remote[path] = file, before
    return path


def _asked_before(record: Path, path: Path) -> tuple[RemoteState | None, float]:
    """What the store said of the shard, and when; None: that is not known, or there are no tables as they were read."""
    with suppress(OSError, ValueError, TypeError):
        num_bytes, version, changed_ns, asked_s = read_json(record, most_bytes=1 << 16)
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) == (num_bytes, changed_ns) and all(
            isinstance(part, str) for part in version
        ):
            return RemoteState(num_bytes, tuple(version)), float(asked_s)
    return None, 0.0


def _write_tables(file: RemoteFile, state: RemoteState, path: Path, cache: ShardCache) -> RemoteState:
    """The state with the number of bytes in any case."""
    try:
        if state.num_bytes is None:
            raise NoPartsError
        num_bytes = state.num_bytes

        def by_ranges() -> None:
            with file.parts() as read:
                _write_stand_in(read, num_bytes, path, file)

        tried(by_ranges)
        return state
    except NoPartsError:
        return _write_from_whole(file, state, path, cache)


def _write_from_whole(file: RemoteFile, state: RemoteState, path: Path, cache: ShardCache) -> RemoteState:
    cache.tell(
        f"{file.shown.rpartition('/')[0]}: its server gives no parts of files, so shards are fetched whole to read "
        f"their tables; these stay in {cache.tables}"
    )
    size = state.num_bytes or 0
    name = name_of([file.shown], size)
    with cache.claimed(name, size, (), True) as part:
        if part is None:
            raise DataError(f"{file.shown}: is being fetched already; is it named twice?")
        tried(lambda: file.copy(part, state.num_bytes, ADVICE))
        whole = RemoteState(part.stat().st_size, state.version)
        with open(part, "rb") as copy:
            _write_stand_in(lambda begin, end: os.pread(copy.fileno(), end - begin, begin), size, path, file)
        with open_part(part, file) as beton:
            shard = CachedShard(file, beton.num_bytes, beton.fingerprint, beton.written_digest, state.version)
        cache.keep(part, shard)
    return whole


def _write_stand_in(read: Callable[[int, int], bytes], num_bytes: int, path: Path, file: RemoteFile) -> None:
    """Copies the tables to their places. Raises UnavailableError where they are not those of a whole .beton file."""
    with replaces(path) as new:
        with new.open("r+b") as out:
            out.truncate(num_bytes)

            def copy(begin: int, end: int) -> bytes:
                """Raises UnavailableError where it lies outside of the file."""
                if not 0 <= begin <= end <= num_bytes:
                    raise UnavailableError(f"{file.shown}: is no whole .beton file: {num_bytes:,} bytes", is_final=True)
                content = b""
                for at in range(begin, end, _BLOCK):
                    content = read(at, min(end, at + _BLOCK))
                    out.seek(at)
                    out.write(content)
                return content

            header = np.frombuffer(copy(0, HEADER.itemsize), HEADER)[0]
            if header["version"] != VERSION:
                raise UnavailableError(f"{file.shown}: is no .beton file of version {VERSION}", is_final=True)
            end = HEADER.itemsize + int(header["num_fields"]) * DESCRIPTOR.itemsize
            descriptors = np.frombuffer(copy(HEADER.itemsize, end), DESCRIPTOR)
            try:
                row = metadata_type([int(type_id) for type_id in descriptors["type_id"]])
            except KeyError:
                raise UnavailableError(f"{file.shown}: is no .beton file that ffcv knows", is_final=True) from None
            copy(end, end + int(header["num_samples"]) * row.itemsize)
            copy(int(header["alloc_table_ptr"]), num_bytes)
            out.flush()
        with open_part(new, file):
            pass


def _write_sidecar(file: RemoteFile, path: Path, cache: ShardCache) -> None:
    """None where the store has none, as for files of ffcv's own writer."""
    place = sidecar_path(path)
    beside = RemoteFile(file.system, f"{file.name}.json", file.scheme)
    try:
        content = tried(lambda: beside.read(LONGEST_SIDECAR))
    except UnavailableError as error:
        if not error.is_refused:
            raise
        content = None  # what S3 answers for a file that is not there, to those who may not list
        cache.tell(f"{error}; its class names are not used")
    if content is None:
        place.unlink(missing_ok=True)
        return
    with replaces(place) as new:
        new.write_bytes(content)
