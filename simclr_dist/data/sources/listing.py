"""Everything that was found at a source, and which of it are images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from PIL import Image

Parts = tuple[str, ...]
"""A path relative to the source, folder by folder."""

Stamp = tuple[str, int, int]
"""A file or folder, the time of its last change in ns, and its size."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")

# Folders that programs make for themselves beside people's images.
_TOOL_FOLDERS = frozenset({"@eadir", "__macosx", "__pycache__", "$recycle.bin", "#recycle", "lost+found"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
_ARCHIVES = (*TAR_SUFFIXES, ".tbz2", ".tar.zst", ".zip", ".7z", ".rar")
# Formats with images in them that Pillow does not open.
_UNSUPPORTED = frozenset(
    {".heic", ".heif", ".jxl", ".npz", ".dcm", ".nii", ".svg", ".exr", ".hdr"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raw", ".svs", ".ndpi"}
)
ARRAYS = ".npy"
# Pillow registers these too, but they are documents, films and containers, most of which it cannot read.
_NOT_IMAGES = frozenset({"PDF", "EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF", "IPTC"})
# Formats that their first bytes tell beyond doubt.
_KNOWN_BY_CONTENT = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000", "AVIF", "QOI")


class Found(NamedTuple):
    """A file, or the bytes of one inside an archive. size -1: the whole file. name: as messages call it."""

    parts: Parts
    name: str
    path: str
    offset: int = 0
    size: int = -1


@dataclass
class Listing:
    """Everything at a source, sorted by path.

    prefix: what all names begin with. folders: those that were entered. left_out, notes: (reason, path).
    stamps: of what has to be unchanged for the listing to be true.
    keep: a temporary file that must exist as long as the files are read.
    """

    origin: str
    prefix: str
    is_archive: bool
    files: list[Found] = field(default_factory=list)
    folders: list[Parts] = field(default_factory=list)
    left_out: list[tuple[str, Parts]] = field(default_factory=list)
    notes: list[tuple[str, Parts]] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    keep: Any = None


def stamp(path: str) -> Stamp:
    """Raises OSError."""
    found = os.stat(path)
    return path, found.st_mtime_ns, found.st_size


def is_tool_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in _TOOL_FOLDERS


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that this Pillow opens."""
    formats = {*image_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that are tried, whatever a file is called: Pillow runs Ghostscript for a page of EPS."""
    Image.preinit()  # first, so that common formats stay the first that Pillow tries
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NOT_IMAGES)


def choose_images(
    files: list[Found], *, arrays_too: bool = False
) -> tuple[list[Found], list[tuple[str, Parts]], list[tuple[str, Parts]]]:
    """(images, the other files with the reason for each, images with a note). arrays_too: numpy's are images."""
    images: list[Found] = []
    others: list[tuple[str, Parts]] = []
    for found in files:
        is_array = arrays_too and _suffix(found.parts[-1].lower()) == ARRAYS and not found.parts[-1].startswith(".")
        reason = None if is_array else _why_no_image(found)
        if reason is None:
            images.append(found)
        else:
            others.append((reason, found.parts))
    images, parts_of_samples = _without_parts_of_samples(images)
    notes = [
        ("has the name of another image but for the suffix", later.parts)
        for earlier, later in pairwise(images)
        if earlier.parts[:-1] == later.parts[:-1] and _stem(earlier.parts[-1]) == _stem(later.parts[-1])
    ]
    return images, others + parts_of_samples, notes


def _why_no_image(found: Found) -> str | None:
    name = found.parts[-1].lower()
    if name.startswith(".") or name in _SYSTEM_FILES:
        return "hidden or system file"
    suffix = _suffix(name)
    if suffix in image_suffixes():
        return None
    if not suffix:
        return None if _is_image_by_content(found) else "not an image (no suffix)"
    archive = next((ending for ending in _ARCHIVES if name.endswith(ending) and ending.endswith(suffix)), None)
    if archive is not None:
        return f"an archive, which is not unpacked ({max((e for e in _ARCHIVES if name.endswith(e)), key=len)})"
    if suffix == ARRAYS:
        return f"an array, which --channels keep takes ({suffix})"
    if suffix in _UNSUPPORTED:
        return f"a format that Pillow does not open ({suffix})"
    return f"not an image ({suffix})"


def _suffix(name: str) -> str:
    """The suffix with its dot; empty if it is none, as in `image.0001`."""
    suffix = name[name.rfind(".") :] if "." in name[1:] else ""
    return suffix if len(suffix) <= 9 and any(c.isalpha() for c in suffix) else ""


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_image_by_content(found: Found) -> bool:
    image_suffixes()  # loads Pillow's formats
    with open(found.path, "rb") as file:
        file.seek(found.offset)
        start = file.read(16 if found.size < 0 else min(16, found.size))
    accepts = (Image.OPEN[name][1] for name in _KNOWN_BY_CONTENT if name in Image.OPEN)
    return any(accept is not None and accept(start) is True for accept in accepts)


def _without_parts_of_samples(images: list[Found]) -> tuple[list[Found], list[tuple[str, Parts]]]:
    """Leaves out `000.seg.png` where `000.jpg` lies beside it: in webdatasets that is a mask of the same sample."""
    compound = [found for found in images if found.parts[-1].count(".") > 1]
    if not compound:
        return images, []
    samples = {(*f.parts[:-1], _stem(f.parts[-1])) for f in images if f.parts[-1].count(".") == 1}
    left_out = {}
    for found in compound:
        key, rest = found.parts[-1].split(".", 1)
        if rest[:1].isalpha() and (*found.parts[:-1], key) in samples:
            ending = "." + rest.lower()
            left_out[found.parts] = f"belongs to the image of the same name, as in a webdataset ({ending})"
    return [f for f in images if f.parts not in left_out], [(reason, parts) for parts, reason in left_out.items()]
