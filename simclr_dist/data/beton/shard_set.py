"""Many .beton files as one data set, whose samples are numbered from the first file to the last.

The tables of all files are read once, in parallel, and kept; files are opened again when samples of theirs are due, a
bounded number at a time. So it makes no difference how many there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN, Account, LeftOut, together
from simclr_dist.data.beton.content import cached_records_digest, content_fingerprint
from simclr_dist.data.beton.open_files import FileState, OpenFiles
from simclr_dist.data.beton.reader import Beton, open_beton, records_of
from simclr_dist.data.beton.remote_tables import cached_shard, shown_path
from simclr_dist.data.beton.shard_cache import CachedShard, shard_cache
from simclr_dist.data.beton.shard_files import ShardFiles, beton_files
from simclr_dist.data.classes import ClassMap, check_labels, union_of_classes
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.pixel_format import together as together_format
from simclr_dist.source_text import is_url, lines, shown

_S = TypeVar("_S")
_T = TypeVar("_T")
_READERS = 8  # reading waits for the disk


@dataclass(frozen=True)
class Shard:
    """What is kept of a file. images, record_bytes, labels: its tables, labels with its own numbers of classes.

    fingerprint: of its tables. written_digest: as of `Beton`.
    """

    path: Path
    state: FileState
    page_size: int
    images: NDArray[Any]
    record_bytes: NDArray[np.int64]
    labels: NDArray[np.int64]
    max_pixels: int
    class_names: tuple[str, ...]
    fingerprint: str
    written_digest: str | None
    sidecar: dict[str, Any]
    account: Account | None
    other_fields: tuple[str, ...]
    kept: PixelFormat | None
    cached: CachedShard | None
    """Of a store: what has to be fetched before a sample is read; `path` holds the tables only."""

    @property
    def shown(self) -> str:
        """Its path or URL, for people."""
        return shown_path(self.path)


@dataclass(frozen=True)
class ShardSet:
    """See `Beton`, whose place it takes. first: int64 [number of files + 1], the number of each one's first sample."""

    source: str
    shards: tuple[Shard, ...]
    others: tuple[str, ...]
    first: NDArray[np.int64]
    images: NDArray[Any]
    record_bytes: NDArray[np.int64]
    labels: NDArray[np.int64]
    max_pixels: int
    class_names: tuple[str, ...]
    class_maps: tuple[ClassMap, ...]
    fingerprint: str
    kept: PixelFormat | None
    sentence: str
    """How the classes of the shards fit together, where they are not the same."""
    _files: OpenFiles

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def pixel_format(self) -> PixelFormat:
        return self.kept or RGB

    @property
    def page_size(self) -> int:
        """The largest."""
        return max(shard.page_size for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.state.num_bytes for shard in self.shards)

    @cached_property
    def content_fingerprint(self) -> str:
        """Of the contents of the shards in their order, and the classes: see `fingerprint_of_shards`. DataError."""
        if len(self.shards) == 1 and self.shards[0].written_digest is not None:
            return content_fingerprint(self.shards[0].written_digest, self.class_names)
        unknown = [shard for shard in self.shards if shard.written_digest is None]
        read = dict(zip([shard.path for shard in unknown], _in_parallel(_read_fingerprint, unknown), strict=True))
        found = [read.get(s.path) or content_fingerprint(s.written_digest or "", s.class_names) for s in self.shards]
        return fingerprint_of_shards(found, self.class_names) if len(found) > 1 else found[0]

    @cached_property
    def account(self) -> Account | None:
        """Those of all shards in one; None where a shard does not tell."""
        found = [shard.account for shard in self.shards]
        accounts = [account for account in found if account is not None]
        if len(accounts) < len(found):
            return None
        first, last = self.shards[0].path, self.shards[-1].path
        sentence = f"{len(self.shards):,} .beton files, {first.name} to {last.name}"
        joined = together(accounts, shown(self.source), f"{sentence}; {self.sentence}" if self.sentence else sentence)
        if not self.others:
            return joined
        others = LeftOut("not a .beton file", len(self.others), self.others[:NAMES_SHOWN])
        return replace(joined, left_out=(*joined.left_out, others))

    def records(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return records_of(self.images, self.record_bytes, ids, shown(self.source))

    def reading(self, ids: NDArray[np.int64]) -> Iterator[tuple[slice, int]]:
        shard = self._shard_of(ids)
        borders = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(ids)]
        for begin, end in pairwise(borders):
            if begin < end:
                number = int(shard[begin])
                cached = self.shards[number].cached
                opened = self._files.reading(number) if cached is None else shard_cache().reading(cached)
                with opened as fd:
                    yield slice(begin, end), fd

    def place(self, sample: int) -> tuple[str, int]:
        number = int(self._shard_of(np.array([sample]))[0])
        return self.shards[number].shown, sample - int(self.first[number])

    def files(self) -> Iterator[tuple[str, int]]:
        for shard in self.shards:
            yield shard.shown, len(shard.labels)

    def num_bytes_of(self, sample: int) -> int:
        return self.shards[int(self._shard_of(np.array([sample]))[0])].state.num_bytes

    def file_of_each(self) -> NDArray[np.int64]:
        return self._shard_of(np.arange(self.num_samples))

    def _shard_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.first, ids, side="right") - 1

    def pages(self) -> NDArray[np.int64]:
        """The page of each sample [n], numbered from the first file to the last."""
        pages, before = [], 0
        for shard in self.shards:
            pages.append((shard.images["data_ptr"] // np.uint64(shard.page_size)).astype(np.int64) + before)
            before += shard.state.num_bytes // shard.page_size + 1
        return np.concatenate(pages)

    @property
    def sidecars(self) -> tuple[dict[str, Any], ...]:
        return tuple(shard.sidecar for shard in self.shards)

    @property
    def written_digests(self) -> tuple[str | None, ...]:
        return tuple(shard.written_digest for shard in self.shards)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_data(source: str | Path) -> Beton | ShardSet:
    """The .beton file or files that a source names. Raises DataError."""
    files = beton_files(source)
    if files is None:
        raise DataError(f"{source}: is neither a .beton file nor a folder or a pattern of them")
    if len(files.paths) == 1 and not is_url(str(source)):
        return open_beton(files.paths[0])
    return _open_shards(str(source), files)


def size_of_data(source: str) -> int:
    """Bytes of the .beton file or files that a source names, as far as they are there. Raises DataError."""
    files = beton_files(source)
    return sum(path.stat().st_size for path in files.paths if path.is_file()) if files else 0


def sizes_of_places(source: str) -> list[int]:
    """How many samples each line of a source names. Raises DataError."""
    with open_data(source) as data:
        sizes = [count for _, count in data.files()]
    borders = np.cumsum([0, *(len(files.paths) for place in lines(source) if (files := beton_files(place)))])
    return [sum(sizes[begin:end]) for begin, end in pairwise(borders.tolist())]


def _open_shards(source: str, files: ShardFiles) -> ShardSet:
    """What was opened before in this process, and has not changed, is not read again."""
    states = [_state(path) for path in files.paths]
    _refuse_twice(files.paths, states)
    key = source, files, tuple(states)
    known = _opened.pop(key, None) or _read(source, files)
    _opened[key] = known
    if len(_opened) > _MOST_OPENED:
        _opened.popitem(last=False)
    return replace(known, _files=OpenFiles(files.paths, [shard.state for shard in known.shards]))


_opened: OrderedDict[tuple[str, ShardFiles, tuple[FileState, ...]], ShardSet] = OrderedDict()
_MOST_OPENED = 4


def _read(source: str, files: ShardFiles) -> ShardSet:
    shards = _in_parallel(_read_shard, files.paths)
    classes = union_of_classes([(s.shown, s.class_names, _is_named(s)) for s in shards])
    fingerprints = hashlib.sha256("".join(shard.fingerprint for shard in shards).encode())
    return ShardSet(
        source=source,
        shards=tuple(shards),
        others=files.others,
        first=np.cumsum([0, *(len(shard.labels) for shard in shards)]),
        images=np.concatenate([shard.images for shard in shards]),
        record_bytes=np.concatenate([shard.record_bytes for shard in shards]),
        labels=np.concatenate([m(shard.labels) for m, shard in zip(classes.maps, shards, strict=True)]),
        max_pixels=max(shard.max_pixels for shard in shards),
        class_names=classes.names,
        class_maps=classes.maps,
        fingerprint=fingerprints.hexdigest()[:32] if len(shards) > 1 else shards[0].fingerprint,
        kept=kept_together([(shard.shown, shard.kept, _num_pixels(shard)) for shard in shards]),
        sentence=classes.sentence,
        _files=OpenFiles((), ()),
    )


def _refuse_twice(paths: Sequence[Path], states: Sequence[FileState]) -> None:
    seen: dict[tuple[int, int], int] = {}
    for number, (path, state) in enumerate(zip(paths, states, strict=True)):
        earlier = seen.setdefault((state.device, state.inode), number)
        if earlier != number:
            also = shown_path(paths[earlier])
            raise DataError(
                f"{shown_path(path)}: is named twice as a part of one data set (also as {also}); name it once"
            )


def _state(path: Path) -> FileState:
    try:
        return FileState.of(os.stat(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it is a part of a data set of several files") from None


def _read_shard(path: Path) -> Shard:
    with open_beton(path, mapped=False) as beton:
        check_labels(shown_path(path), beton.class_names, beton.labels)
        return Shard(
            path=path,
            state=FileState.of(os.fstat(beton.fd)),
            page_size=beton.page_size,
            images=np.array(beton.images),
            record_bytes=beton.record_bytes,
            labels=beton.labels,
            max_pixels=beton.max_pixels,
            class_names=beton.class_names,
            fingerprint=beton.fingerprint,
            written_digest=beton.written_digest,
            sidecar=beton.sidecar,
            account=beton.account,
            other_fields=beton.other_fields,
            kept=beton.kept,
            cached=cached_shard(path, beton.fingerprint, beton.written_digest),
        )


def _num_pixels(shard: Shard) -> float:
    return float((shard.images["height"].astype(np.int64) * shard.images["width"]).sum())


def kept_together(parts: Sequence[tuple[str, PixelFormat | None, float]]) -> PixelFormat | None:
    """`Beton.kept` of several files as one: name, that of each and its number of pixels. Raises DataError."""
    kept = [(name, found, count) for name, found, count in parts if found is not None]
    if not kept:
        return None
    advice = "prepare them alike (`simclr-dist prepare --channels`)"
    if len(kept) < len(parts):
        other = next(name for name, found, _ in parts if found is None)
        raise DataError(f"{kept[0][0]} keeps the channels of its images, and {other} holds RGB images; {advice}")
    try:
        return together_format(kept)
    except ValueError as error:
        raise DataError(f"{error}; {advice}") from None


def _is_named(shard: Shard) -> bool:
    """Whether its classes have names; without labels it has none to name."""
    return "class_names" in shard.sidecar or not shard.class_names


def _read_fingerprint(shard: Shard) -> str:
    if shard.cached is None:
        with open_beton(shard.path) as beton:
            return beton.content_fingerprint
    cache = shard_cache()
    with cache.reading(shard.cached), open_beton(cache.path(shard.cached), mapped=False) as whole:
        return content_fingerprint(cached_records_digest(whole), shard.class_names)


def fingerprint_of_shards(fingerprints: Sequence[str], class_names: Sequence[str]) -> str:
    """Of the fingerprints of shards in their order: where they lie and what they are called does not matter.

    It is not that of one file with the same samples: a digest of all records would need all of them to be read.
    """
    return hashlib.sha256(json.dumps(["shards", list(fingerprints), list(class_names)]).encode()).hexdigest()[:32]


def _in_parallel(what: Callable[[_S], _T], things: Sequence[_S]) -> list[_T]:
    """In their order. The first error ends it."""
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            return list(pool.map(what, things))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
