"""Which .beton files a source names, and in which order: the numbers of the samples follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.config import SHARD_SUFFIX
from simclr_dist.data.beton.remote_tables import stand_ins
from simclr_dist.data.beton.shard_cache import shard_cache
from simclr_dist.errors import DataError
from simclr_dist.source_text import is_pattern, is_url, lines, matches

SUFFIX = SHARD_SUFFIX


@dataclass(frozen=True)
class ShardFiles:
    """others: what lies in their folder and is not taken."""

    paths: tuple[Path, ...]
    others: tuple[str, ...] = ()


def names_beton(source: str | Path) -> bool:
    """Whether the source is a .beton file or several, and not images. Asks no store for that.

    Raises DataError where that is not clear.
    """
    if all(is_url(place, SUFFIX) for place in lines(str(source))):
        return True
    return beton_files(source) is not None


def beton_files(source: str | Path) -> ShardFiles | None:
    """Of a file, a folder of them, a pattern, a URL, or lines of these; None: the source is something else.

    Of a URL they are stand-ins, which hold the tables alone: see remote_tables.py. Lines stay in their order; the files
    of a folder or a pattern are sorted by name, as text. A folder is one of shards if it holds .beton files and neither
    folders nor images. Raises DataError.
    """
    places = lines(str(source))
    found = [_of_place(place) for place in places]
    if found == [None]:
        return None
    for place, files in zip(places, found, strict=True):
        if files is None:
            raise DataError(
                f"{place}: is no .beton file, nor a folder of them; several sources can be one data set only as .beton "
                f"files: simclr-dist prepare {place} OUT.beton"
            )
    paths = tuple(path for files in found if files is not None for path in files.paths)
    return ShardFiles(paths, tuple(name for files in found if files is not None for name in files.others))


def _of_place(place: str) -> ShardFiles | None:
    if is_url(place):
        return ShardFiles(stand_ins(place, shard_cache())) if is_url(place, SUFFIX) else None
    if is_pattern(place):
        paths = [path for path in matches(place) if path.endswith(SUFFIX)]
        if not paths:
            return None
        _refuse_other_splits(place, paths)
        return ShardFiles(tuple(map(Path, paths)))
    if os.path.isdir(place):
        return _of_folder(place)
    return ShardFiles((Path(place),)) if place.endswith(SUFFIX) else None


def _of_folder(folder: str) -> ShardFiles | None:
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
            if not any(entry.name.endswith(SUFFIX) for entry in entries) or any(entry.is_dir() for entry in entries):
                return None
    except OSError:
        return None  # told where it is opened as a folder of images
    from simclr_dist.data.sources.listing import image_suffixes

    names = sorted(entry.name for entry in entries)
    if any(os.path.splitext(name)[1].lower() in image_suffixes() for name in names):
        return None
    shards = [name for name in names if name.endswith(SUFFIX)]
    sidecars = {f"{name}{ending}" for name in shards for ending in (".json", ".json.next")}
    _refuse_other_splits(folder, shards)
    others = tuple(name for name in names if name not in sidecars and not name.endswith(SUFFIX))
    return ShardFiles(tuple(Path(folder, name) for name in shards), others)


def _refuse_other_splits(place: str, names: Sequence[str]) -> None:
    """train.beton and test.beton in one folder are hardly meant to be one data set."""
    from simclr_dist.data.sources.layout import kind_of_split

    splits: dict[str | None, str] = {}
    for name in names:
        splits.setdefault(kind_of_split(os.path.basename(name).removesuffix(SUFFIX)), os.path.basename(name))
    if len(splits) > 1:
        examples = ", ".join(splits.values())
        raise DataError(
            f"{place}: its .beton files look like different parts of a data set: {examples}. Say which are meant with "
            f"a pattern, such as {_pattern(place, next(iter(splits.values())))}, or list them one by one"
        )


def _pattern(place: str, example: str) -> str:
    folder = place if os.path.isdir(place) else os.path.dirname(place)
    word = "".join(c for c in example.removesuffix(SUFFIX) if c.isalpha() or c == "_") or "shard"
    return os.path.join(folder, f"{word}*{SUFFIX}")
