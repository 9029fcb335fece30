"""Reads the tables of .beton files and checks that a file is complete, with numpy alone.

Layout (ffcv 1.0.2, version 2), all little-endian:

    header 24 B │ field descriptors 1041 B each │ metadata, one row a sample │ records │ allocation table
                                                                                        (sample, offset, size)

A page is a stretch of `page_size` bytes from a multiple of it; no record crosses the border of two pages.

ffcv itself checks nothing: a truncated table gives wrong images, and an unfinished file crashes the process.
`open_beton` checks that every image lies completely inside the data.

Images of other than 8-bit RGB are the samples themselves [H, W, C], little-endian, in a field of bytes; the numbers
height and width are fields of their own, and the descriptor of the bytes says channels and bits (content.py).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.bounded_json import read_json
from simclr_dist.data.account import Account
from simclr_dist.data.beton.content import cached_records_digest, content_fingerprint, from_arguments
from simclr_dist.data.classes import ClassMap
from simclr_dist.data.image_size import check_num_pixels
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import RGB, PixelFormat

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
FLOAT_FIELD, INT_FIELD, IMAGE_FIELD, BYTES_FIELD = 0, 1, 2, 3
JPEG, RAW = 0, 1
LARGEST_RAW_SIDE = 65535  # metadata has 16 bits
MOST_CLASSES = 1 << 20  # of a file with fewer images; each has a name in memory
LONGEST_SIDECAR = 256 << 20  # it has a line for each image that was left out

_BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# type id: (metadata of a sample, whether it has data of its own)
_FIELDS: dict[int, tuple[Any, bool]] = {
    FLOAT_FIELD: ("<f8", False),
    INT_FIELD: ("<i8", False),
    IMAGE_FIELD: (IMAGE, True),
    BYTES_FIELD: (_BLOB, True),
    4: ("<u8", True),  # array
    5: (_BLOB, True),  # JSON
    6: ("<u8", True),  # tensor
}


def sidecar_path(path: Path) -> Path:
    """The JSON file beside a .beton file, with its class names. Of a link: beside the link, else beside its target."""
    beside = path.with_name(path.name + ".json")
    if not beside.exists() and path.is_symlink():
        target = path.resolve()
        return target.with_name(target.name + ".json")
    return beside


def next_sidecar_path(path: Path) -> Path:
    """The JSON file of a .beton file that is about to take the place of `path`; a kill may leave it there."""
    sidecar = sidecar_path(path)
    return sidecar.with_name(sidecar.name + ".next")


def metadata_type(type_ids: list[int]) -> np.dtype:
    return np.dtype([(f"f{i}", _FIELDS[t][0]) for i, t in enumerate(type_ids)], align=True)


@dataclass(frozen=True)
class Beton:
    """An opened and checked file. Tables are memory-mapped, so that processes share them.

    fd: open until `close`. labels: int64 [n], -1 without a label field.
    written_digest: of the records, as `prepare` computed it; None for files of others.
    kept: the format of pixels that `prepare --channels keep` has kept; None: those of ffcv's image field.
    sidecar: empty where there is none, or one of another file.
    """

    path: Path
    fd: int
    num_bytes: int
    page_size: int
    images: NDArray[Any]  # IMAGE [n]
    labels: NDArray[np.int64]
    record_bytes: NDArray[np.int64]  # [n]
    max_pixels: int
    class_names: tuple[str, ...]
    fingerprint: str
    """A digest of the tables alone, by which release 0.1 told data sets apart."""
    written_digest: str | None
    sidecar: dict[str, Any]
    kept: PixelFormat | None = None
    other_fields: tuple[str, ...] = ()
    """Fields that are neither the image nor its label."""
    sentence: str = ""
    """How the classes of several files fit together; here there is one."""

    @property
    def pixel_format(self) -> PixelFormat:
        return self.kept or RGB

    @property
    def account(self) -> Account | None:
        """What `prepare` took from its source and what it left out, where the sidecar says so."""
        return account_of(self.sidecar)

    @cached_property
    def content_fingerprint(self) -> str:
        """A digest of pixels as stored, labels and class names: the same data have the same one, others another.

        A file without `written_digest` is read for it once. Raises DataError.
        """
        return content_fingerprint(self.written_digest or cached_records_digest(self), self.class_names)

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def class_maps(self) -> tuple[ClassMap, ...]:
        """From the class numbers of each file to those of all."""
        return (ClassMap(np.arange(len(self.class_names), dtype=np.int64), ""),)

    @property
    def sidecars(self) -> tuple[dict[str, Any], ...]:
        return (self.sidecar,)

    @property
    def written_digests(self) -> tuple[str | None, ...]:
        return (self.written_digest,)

    def records(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The records [b, 5] of `ids`: offset, size, mode, height, width. Raises DataError for unknown ids."""
        return records_of(self.images, self.record_bytes, ids, self.path)

    def reading(self, ids: NDArray[np.int64]) -> Iterator[tuple[slice, int]]:
        """The parts of `ids` that lie in one file, and its descriptor, open until the next part is asked for."""
        yield slice(0, len(ids)), self.fd

    def place(self, sample: int) -> tuple[str, int]:
        """The file in which a sample lies, by path or URL, and its number there."""
        return str(self.path), sample

    def files(self) -> Iterator[tuple[str, int]]:
        """Each file, by path or URL, and how many samples lie in it."""
        yield str(self.path), self.num_samples

    def file_of_each(self) -> NDArray[np.int64]:
        """The number of the file of each sample [n]."""
        return np.zeros(self.num_samples, np.int64)

    def num_bytes_of(self, sample: int) -> int:
        """The size of the file of a sample when it was opened."""
        return self.num_bytes

    def pages(self) -> NDArray[np.int64]:
        """The page in which each sample lies [n]."""
        return (self.images["data_ptr"] // np.uint64(self.page_size)).astype(np.int64)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Beton:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def account_of(sidecar: dict[str, Any]) -> Account | None:
    try:
        return Account.from_json(sidecar["account"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def records_of(
    images: NDArray[Any], record_bytes: NDArray[np.int64], ids: NDArray[np.int64], source: str | Path
) -> NDArray[np.int64]:
    """See `Beton.records`. source: for the message."""
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(images)):
        outside = ids[(ids < 0) | (ids >= len(images))][0]
        raise DataError(f"{source}: there is no sample {outside}; it holds 0 to {len(images) - 1}")
    image = images[ids]
    columns = [image["data_ptr"], record_bytes[ids], image["mode"], image["height"], image["width"]]
    return np.stack(columns, axis=1, dtype=np.int64, casting="unsafe")


def open_beton(path: str | Path, *, mapped: bool = True) -> Beton:
    """Opens and checks a file. Raises DataError when it is not a .beton file, or not a complete one.

    mapped: the tables are mapped into memory, for which the file stays open; else they are read, as of small files.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make it with `simclr-dist prepare SOURCE {path}`") from None
    try:
        return _checked(path, fd, mapped)
    except BaseException:
        os.close(fd)
        raise


def read_kept(path: str | Path) -> PixelFormat | None:
    """`Beton.kept` from the head of the file alone; None also where there is no such file, or none that opens.

    Raises DataError where the format is damaged.
    """
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
            num_fields = int(header["num_fields"]) if header["version"] == VERSION else 0
            descriptors = np.frombuffer(file.read(num_fields * DESCRIPTOR.itemsize), DESCRIPTOR, num_fields)
    except (OSError, ValueError, IndexError):
        return None
    type_ids, _ = _fields_of(descriptors)
    return None if IMAGE_FIELD in type_ids or BYTES_FIELD not in type_ids else _pixels(path, descriptors)[2]


def _fields_of(descriptors: NDArray[Any]) -> tuple[list[int], list[str]]:
    names = [name.decode("ascii", "replace") for name in descriptors["name"]]
    return [int(t) for t in descriptors["type_id"]], names


def _checked(path: Path, fd: int, mapped: bool) -> Beton:
    def refuse(what: str) -> DataError:
        return DataError(f"{path}: {what}; make the file again with `simclr-dist prepare`")

    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a .beton file")
    file_size = os.fstat(fd).st_size
    if file_size < HEADER.itemsize:
        raise refuse(f"not a .beton file ({file_size} bytes)")
    header = _read(fd, HEADER, 0, 1)[0]
    if header["version"] != VERSION:
        raise refuse(f"not a .beton file of version {VERSION} (it says {header['version']})")
    n, num_fields, table = int(header["num_samples"]), int(header["num_fields"]), int(header["alloc_table_ptr"])
    page_size = int(header["page_size"])
    if n == 0 or num_fields == 0 or page_size == 0:
        raise refuse("holds no samples")
    if table == 0:
        raise refuse("unfinished: its writer was interrupted")
    metadata_start = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
    if metadata_start > file_size:
        raise refuse(f"truncated: {file_size} bytes end within the field descriptors")
    descriptors = _read(fd, DESCRIPTOR, HEADER.itemsize, num_fields)
    type_ids, names = _fields_of(descriptors)
    for type_id, name in zip(type_ids, names, strict=True):
        if type_id not in _FIELDS:
            raise DataError(f"{path}: field `{name}` has type {type_id}, which is none of ffcv's own")
    pixels_at, written_digest, kept = _pixels(path, descriptors)
    row = metadata_type(type_ids)
    data_start = metadata_start + n * row.itemsize
    if data_start > file_size or table > file_size or table < data_start:
        raise refuse(f"truncated: {file_size} bytes, but {n} samples and the table at {table} need more")
    table_bytes = file_size - table
    num_records = n * sum(_FIELDS[t][1] for t in type_ids)
    if table_bytes != num_records * ALLOCATION.itemsize:
        raise refuse(
            f"truncated: its allocation table has {table_bytes} bytes, "
            f"{num_records} records need {num_records * ALLOCATION.itemsize}"
        )
    metadata, allocations = (
        np.memmap(path, kind, "r", offset=start, shape=(count,)) if mapped else _read(fd, kind, start, count)
        for kind, start, count in ((row, metadata_start, n), (ALLOCATION, table, num_records))
    )
    images = metadata[f"f{pixels_at}"] if kept is None else _images_of_bytes(metadata, pixels_at, names)
    offsets, sizes = (np.ascontiguousarray(allocations[name]) for name in ("ptr", "size"))
    if np.any(offsets[1:] < offsets[:-1]):  # as ffcv's own writer leaves it with several workers
        by_offset = np.argsort(offsets)
        offsets, sizes = offsets[by_offset], sizes[by_offset]
    ends = offsets + sizes
    if offsets[0] < data_start or np.any(ends < offsets) or ends.max() > table:
        raise refuse("damaged: its allocation table points outside of the data")
    if np.any(offsets[1:] < ends[:-1]):
        raise refuse("damaged: records overlap in its allocation table")
    position = np.searchsorted(offsets, images["data_ptr"])
    found = (position < num_records) & (offsets[np.minimum(position, num_records - 1)] == images["data_ptr"])
    if not found.all():
        raise refuse(f"damaged: sample {int(np.argmin(found))} is not in the allocation table")
    record_bytes = sizes[position].astype(np.int64)
    pixels = images["width"].astype(np.int64) * images["height"]
    valid = (pixels > 0) & (images["mode"] <= RAW)
    bytes_of_pixel = 3 if kept is None else kept.channels * kept.bits // 8
    valid &= (images["mode"] != RAW) | (record_bytes == bytes_of_pixel * pixels)
    if not valid.all():
        bad = int(np.argmin(valid))
        mode, width, height, _ = images[bad].tolist()
        raise refuse(f"damaged: sample {bad} is {width} x {height} pixels of mode {mode} in {record_bytes[bad]} bytes")
    largest = int(pixels.argmax())
    try:
        num_bands = 1 if kept is None else kept.channels
        check_num_pixels(int(images["width"][largest]), int(images["height"][largest]), num_bands=num_bands)
    except DataError as error:
        raise DataError(f"{path}: sample {largest}: {error}") from None
    digest = hashlib.blake2b(digest_size=16)
    for part in (header, descriptors, metadata, allocations):
        digest.update(part.tobytes())
    fingerprint = digest.hexdigest()
    sidecar = _read_sidecar(path, fingerprint)
    labels = _labels(metadata, type_ids, names, n)
    if labels.max() >= max(MOST_CLASSES, n):
        bad = int(labels.argmax())
        raise refuse(f"damaged: sample {bad} has label {labels[bad]}; labels count the classes from 0")
    return Beton(
        path=path,
        fd=fd,
        num_bytes=file_size,
        page_size=page_size,
        images=images,
        labels=labels,
        record_bytes=record_bytes,
        max_pixels=int(pixels[largest]),
        class_names=_class_names(sidecar, labels),
        fingerprint=fingerprint,
        written_digest=written_digest,
        sidecar=sidecar,
        kept=kept,
        other_fields=_other_fields(type_ids, names, pixels_at, kept),
    )


def _pixels(path: str | Path, descriptors: NDArray[Any]) -> tuple[int, str | None, PixelFormat | None]:
    """The number of the field of pixels, the digest that was written with it, and their format if it is of bytes."""
    type_ids, names = _fields_of(descriptors)
    wanted = IMAGE_FIELD if IMAGE_FIELD in type_ids else BYTES_FIELD
    if wanted in type_ids:
        number = type_ids.index(wanted)
        try:
            digest, kept = from_arguments(descriptors["arguments"][number])
        except ValueError as error:
            raise DataError(f"{path}: damaged: field `{names[number]}`: {error}") from None
        if wanted == IMAGE_FIELD:
            return number, digest, None
        if kept is not None and {("height", INT_FIELD), ("width", INT_FIELD)} <= set(zip(names, type_ids, strict=True)):
            return number, digest, kept
    raise DataError(f"{path}: has no image field; its fields are {', '.join(names)}")


def _images_of_bytes(metadata: NDArray[Any], pixels_at: int, names: list[str]) -> NDArray[Any]:
    """Rows of IMAGE [n]. A side that does not fit becomes 0, which is damage."""
    images = np.zeros(len(metadata), IMAGE)
    images["mode"] = RAW
    images["data_ptr"] = metadata[f"f{pixels_at}"]["ptr"]
    for side in ("height", "width"):
        values = metadata[f"f{names.index(side)}"].astype(np.int64)
        images[side] = np.where((values > 0) & (values <= LARGEST_RAW_SIDE), values, 0)
    return images


def _read(fd: int, kind: np.dtype, offset: int, count: int) -> NDArray[Any]:
    """A table, as far as the file goes. Raises DataError."""
    try:
        content = os.pread(fd, count * kind.itemsize, offset)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    return np.frombuffer(content, kind)


def _labels(metadata: NDArray[Any], type_ids: list[int], names: list[str], n: int) -> NDArray[np.int64]:
    chosen = _label_field(type_ids, names)
    return np.full(n, -1, np.int64) if chosen is None else np.array(metadata[f"f{chosen}"], np.int64)


def _label_field(type_ids: list[int], names: list[str]) -> int | None:
    integers = [i for i, t in enumerate(type_ids) if t == INT_FIELD]
    return next((i for i in integers if names[i] == "label"), integers[0] if integers else None)


def _other_fields(type_ids: list[int], names: list[str], pixels_at: int, kept: PixelFormat | None) -> tuple[str, ...]:
    used = {pixels_at, _label_field(type_ids, names)}
    used |= set() if kept is None else {names.index("height"), names.index("width")}
    return tuple(name for i, name in enumerate(names) if i not in used)


def _read_sidecar(path: Path, fingerprint: str) -> dict[str, Any]:
    """The content of the JSON file beside it; empty for files of ffcv's own writer.

    One that was written for another file is not used, with a warning: its class names would be wrong ones.
    """
    place = sidecar_path(path)
    content = _sidecar_at(place)
    belongs_to = content.get("fingerprint", fingerprint if content else None)
    if belongs_to != fingerprint:
        # `prepare` was killed after its file got its name, and before this one did.
        left = _sidecar_at(next_sidecar_path(path))
        if left.get("fingerprint") == fingerprint:
            return left
    if content and belongs_to != fingerprint:
        warnings.warn(
            f"{place}: belongs to another file (of fingerprint {belongs_to}; {path.name} has {fingerprint}), so its "
            f"class names are not used; put the right one there, or make {path.name} again",
            stacklevel=4,
        )
        return {}
    return content


def _sidecar_at(place: Path) -> dict[str, Any]:
    """Empty where there is none. Raises DataError for what is no sidecar."""
    advice = "delete it to go on without class names"
    try:
        content = read_json(place, most_bytes=LONGEST_SIDECAR)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read: {error}; {advice}") from None
    names = content.get("class_names", []) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{place}: is not what `prepare` writes: class_names must be a list of texts; {advice}")
    return content


def _class_names(sidecar: dict[str, Any], labels: NDArray[np.int64]) -> tuple[str, ...]:
    if "class_names" in sidecar:
        return tuple(sidecar["class_names"])
    return tuple(str(i) for i in range(int(labels.max()) + 1))
