"""Sources of many files: a folder, a pattern or a range of archives or tables, which are one data set together."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from simclr_dist.data.account import NAMES_SHOWN, SourceOptions
from simclr_dist.data.sources.layout import kind_of_split
from simclr_dist.data.sources.listing import TAR_SUFFIXES, Listing, Parts, choose_images, stamp
from simclr_dist.data.sources.parquet import list_parquet
from simclr_dist.data.sources.tables import TABLE_SUFFIXES, list_table
from simclr_dist.data.sources.tars import list_tar
from simclr_dist.data.sources.zips import list_zip
from simclr_dist.errors import DataError

_MOST_NAMES = 100_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
# What numbers a shard, behind the name that it has in common with others.
_NUMBER = re.compile(r"[-_.]?\d+(?:[-_]of[-_]\d+)?$")

SUFFIXES = {
    **dict.fromkeys(TAR_SUFFIXES, "tar"),
    ".zip": "zip",
    ".parquet": "parquet",
    **dict.fromkeys(TABLE_SUFFIXES, "table"),
}


def kind_of(name: str) -> str | None:
    """`tar`, `zip`, `parquet` or `table`, by the suffix; None for other files."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def is_pattern(source: str) -> bool:
    """Whether it names files by * ? [ ] or { }, unless a file is called so."""
    return (glob.has_magic(source) or "{" in source) and not os.path.lexists(source)


def expand(pattern: str) -> list[str]:
    """The files of a pattern, sorted: `*`, `?`, `[…]`; and `{000..012}` and `{a,b}`, each of which must be there.

    Raises DataError where there is none, or one of a range is missing.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in braces(pattern):
        if glob.has_magic(name):
            found += glob.glob(name, recursive=True)
        else:
            (found if os.path.exists(name) else missing).append(name)
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
        raise DataError(f"{pattern}: {len(missing):,} of {len(missing) + len(found):,} files are missing: {shown}")
    if not found:
        raise DataError(f"{pattern}: no file is called so")
    return sorted(set(found))


def braces(pattern: str) -> list[str]:
    """All that `{000..012}` and `{a,b}` stand for; a range has as many digits as its first number. Raises DataError."""
    names = [pattern]
    while any(map(_BRACES.search, names)):
        names = list(islice((name for before in names for name in _one_brace(before, pattern)), _MOST_NAMES + 1))
        if len(names) > _MOST_NAMES:
            raise DataError(f"{pattern}: stands for more than {_MOST_NAMES:,} names")
    return names


def _one_brace(name: str, pattern: str) -> Iterator[str]:
    found = _BRACES.search(name)
    if found is None:
        yield name
        return
    before, after = name[: found.start()], name[found.end() :]
    numbers = _RANGE.fullmatch(found[1])
    if numbers is None:
        if "," not in found[1]:
            raise DataError(f"{pattern}: {found[0]} is neither a range such as {{000..012}} nor a list such as {{a,b}}")
        for word in found[1].split(","):
            yield before + word + after
        return
    first, last = int(numbers[1]), int(numbers[2])
    if not first <= last < first + _MOST_NAMES:
        raise DataError(f"{pattern}: {found[0]} is no range of at most {_MOST_NAMES:,} numbers, the smaller one first")
    for number in range(first, last + 1):
        yield f"{before}{number:0{len(numbers[1])}}{after}"


def list_file(path: Path, options: SourceOptions) -> Listing:
    """Of an archive or a table. Raises DataError, OSError."""
    kind = kind_of(path.name)
    if kind is None:
        raise DataError(f"{path}: neither a folder nor an archive or table ({', '.join(SUFFIXES)})")
    if kind == "table":
        root = "" if str(path.parent) == "." else f"{path.parent}/"
        listing = Listing(str(path), root, is_archive=False)
        list_table(path, listing, options)
    else:
        listing = Listing(str(path), f"{path}/", is_archive=True)
        _add(kind, [((), path)], listing, options)
    listing.stamps.append(stamp(str(path)))
    return listing


def list_files(paths: Sequence[str], origin: str, options: SourceOptions) -> Listing:
    """Of all files that a pattern means. Raises DataError, OSError."""
    folders = sorted(path for path in paths if os.path.isdir(path))
    if folders:
        raise DataError(f"{origin}: {folders[0]} is a folder; name files, or give one folder that holds them all")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    listing = Listing(origin, f"{root.rstrip('/')}/" if root else "", is_archive=True)
    found = [(tuple(os.path.relpath(path, root or ".").split("/")), Path(path)) for path in paths]
    _list_shards(found, listing, options)
    return listing


def list_shards_of_folder(folder: Listing, options: SourceOptions) -> Listing | None:
    """The listing of a folder as that of the shards in it; None for a folder with images, or without shards.

    Raises DataError, OSError.
    """
    shards = [found for found in folder.files if kind_of(found.parts[-1]) not in (None, "table")]
    if not shards or choose_images(folder.files)[0]:
        return None
    listing = Listing(folder.origin, folder.prefix, is_archive=True, stamps=folder.stamps, left_out=folder.left_out)
    listing.notes, names = folder.notes, {found.name for found in shards}
    listing.left_out += choose_images([found for found in folder.files if found.name not in names])[1]
    _list_shards([(found.parts, Path(found.name)) for found in shards], listing, options)
    return listing


def _list_shards(shards: Sequence[tuple[Parts, Path]], listing: Listing, options: SourceOptions) -> None:
    """shards: the path of each below the source, and its file."""
    kinds = Counter(kind_of(path.name) for _, path in shards)
    if len(kinds) > 1 or None in kinds or "table" in kinds:
        endings = ", ".join(f"{count:,} × {kind or 'other files'}" for kind, count in kinds.items())
        raise DataError(f"{listing.origin}: its files are {endings}; name archives or parquet files of one kind")
    kind = next(iter(kinds))
    assert kind is not None
    places = [(_place(parts), path) for parts, path in shards]
    listing.shards = {place for place, _ in places}
    _add(kind, places, listing, options)
    listing.stamps += [stamp(str(path)) for _, path in places]
    listing.sentence = "; ".join(filter(None, [f"{len(places):,} {kind} files", listing.sentence]))


def _place(parts: Parts) -> Parts:
    """Where a shard's images lie: in folders, one of them the split that its name begins with, and in itself."""
    name = parts[-1]
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len)
    stem = name[: -len(suffix)]
    in_common = _NUMBER.sub("", stem)
    return (*parts[:-1], *([in_common] if kind_of_split(in_common) else []), stem)


def _add(kind: str, places: Sequence[tuple[Parts, Path]], listing: Listing, options: SourceOptions) -> None:
    if kind == "parquet":
        list_parquet(places, listing, options)
        return
    for parts, path in places:
        before = len(listing.files)
        (list_tar if kind == "tar" else list_zip)(path, parts, listing)
        listing.files[before:] = sorted(listing.files[before:], key=lambda found: found.parts)
    listing.folders.sort()
