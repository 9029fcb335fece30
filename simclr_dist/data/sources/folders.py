"""Images in folders and tar archives, sorted by path; class and split are read from the path."""

from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from simclr_dist.data.sources.account import Account
from simclr_dist.data.sources.images import FileImages
from simclr_dist.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "unlabeled"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")

_Entry = tuple[PurePosixPath, str, int, int]  # relative path, file, offset, size


def open_folder(root: Path, split: str | None) -> FileImages:
    """The images under `root`, links followed. Raises DataError."""
    return _from_paths(_walk(root), split, str(root))


def _walk(root: Path) -> Iterator[_Entry]:
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        here = Path(folder)
        for name in files:
            if _is_image(name):
                yield PurePosixPath((here / name).relative_to(root).as_posix()), str(here / name), 0, -1


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def open_tar(path: Path, split: str | None) -> FileImages:
    """The images in an archive, read in place; a compressed one is decompressed to a temporary file.

    Raises DataError.
    """
    try:
        with tarfile.open(path, "r:"):
            plain, keep = path, None
    except tarfile.TarError:
        keep = _decompressed(path)
        plain = Path(keep.name)
    try:
        with open(plain, "rb") as file:
            entries = [(name, str(plain), offset, size) for name, offset, size in _tar_images(file, PurePosixPath())]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: is not a complete tar archive: {error}") from None
    return _from_paths(entries, split, str(path), keep)


def _decompressed(path: Path) -> Any:
    """The archive without its compression, in a temporary file that is deleted when it is closed."""
    import bz2
    import lzma
    import shutil

    openers: dict[str, Callable[..., Any]] = {"gz": gzip.open, "tgz": gzip.open, "xz": lzma.open, "txz": lzma.open}
    opener = openers.get(path.name.rpartition(".")[2], bz2.open)
    keep = tempfile.NamedTemporaryFile(prefix="simclr-", suffix=".tar")  # noqa: SIM115 - lives as long as the source
    try:
        with opener(path, "rb") as compressed:
            shutil.copyfileobj(compressed, keep, 1 << 20)
        keep.flush()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        keep.close()
        raise DataError(f"{path}: cannot be decompressed: {error} (TMPDIR={tempfile.gettempdir()})") from None
    return keep


def _tar_images(file: IO[bytes], prefix: PurePosixPath) -> Iterator[tuple[PurePosixPath, int, int]]:
    """Name, offset and size of every image; tars inside (as in ImageNet's own archive) count as class folders."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        inner = []
        for member in archive:
            name = PurePosixPath(member.name.lstrip("/"))
            if not member.isreg():
                continue
            if _is_image(name.name):
                yield prefix / name, member.offset_data, member.size
            elif name.suffix == ".tar":
                inner.append((prefix / name.with_suffix(""), member.offset_data))
    for name, offset in inner:
        file.seek(offset)
        yield from _tar_images(file, name)


def _from_paths(entries: Iterable[_Entry], split: str | None, origin: str, keep: Any = None) -> FileImages:
    """Reads split and class of each image from its path: [common/folders/][split/]class/…/image.jpg."""
    found = sorted(entries, key=lambda entry: entry[0].parts)
    if not found:
        raise DataError(f"{origin}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    parts = [entry[0].parts for entry in found]
    # One folder around everything is dropped, unless it is the split or the only class.
    while all(len(p) > 2 for p in parts) and len({p[0] for p in parts}) == 1 and parts[0][0] not in SPLIT_NAMES:
        parts = [p[1:] for p in parts]
    heads = {p[0] for p in parts}
    if heads <= SPLIT_NAMES and all(len(p) > 1 for p in parts):
        if split is None and len(heads) == 1:
            split = next(iter(heads))
        if split not in heads:
            asked = "say which with --split" if split is None else f"there is no `{split}`"
            raise DataError(f"{origin}: has the splits {', '.join(sorted(heads))}; {asked}")
        chosen = [i for i, p in enumerate(parts) if p[0] == split]
        found, parts = [found[i] for i in chosen], [parts[i][1:] for i in chosen]
    elif split is not None:
        raise DataError(f"{origin}: has no splits (folders such as train and test), but `{split}` was asked for")
    class_names = tuple(sorted({p[0] for p in parts if len(p) > 1}))
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number[p[0]] if len(p) > 1 else -1 for p in parts], np.int64)
    named = [
        (f"{origin}/{relative}" if size >= 0 else path, path, offset, size) for relative, path, offset, size in found
    ]
    return FileImages(class_names, labels, named, Account(origin, "", len(named)), origin, keep)
