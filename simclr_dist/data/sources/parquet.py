"""Parquet files with images in a column, as the Hugging Face Hub has them: read row by row, by pyarrow."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simclr_dist.bounded_json import parse_json
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.sources.layout import Questions, some
from simclr_dist.data.sources.listing import Found, Labels, Listing, Parts
from simclr_dist.data.sources.lists import LABEL_COLUMNS, class_of
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_ROWS = 16  # that are decoded at a time
_MOST_KEPT = 256 << 20  # bytes of decoded rows that a process keeps


class ParquetCell(NamedTuple):
    """One row of a column of bytes. row: in its group of rows."""

    path: str
    column: str
    group: int
    row: int

    def read(self, most: int = -1) -> bytes:
        found = _rows.read(self)
        return found if most < 0 else found[:most]

    def num_bytes(self) -> int:
        """Of the whole file: those of the row are known only when it is read."""
        return os.stat(self.path).st_size


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class _Rows:
    """Reads rows one after the other fast, and any other by decoding its group up to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._open: dict[str, _Column] = {}
        self._kept: OrderedDict[tuple[str, str, int, int], list[bytes]] = OrderedDict()
        self._num_bytes = 0

    def read(self, cell: ParquetCell) -> bytes:
        """Raises DataError, OSError."""
        start = cell.row - cell.row % _ROWS
        key = (cell.path, cell.column, cell.group, start)
        with self._lock:
            if self._pid != os.getpid():  # forked: an open file is its parent's
                self._forget()
            rows = self._kept.get(key)
            if rows is None:
                rows = self._decode(cell, start)
                self._keep(key, rows)
            else:
                self._kept.move_to_end(key)
            return rows[cell.row - start]

    def _decode(self, cell: ParquetCell, start: int) -> list[bytes]:
        place = f"{cell.path}\0{cell.column}"
        column = self._open.get(place)
        if column is None:
            if len(self._open) >= 8:
                del self._open[next(iter(self._open))]
            column = self._open[place] = _Column(cell.path, cell.column)
        try:
            return column.rows(cell.group, start)
        except DataError:
            del self._open[place]
            raise

    def _keep(self, key: tuple[str, str, int, int], rows: list[bytes]) -> None:
        self._kept[key] = rows
        self._num_bytes += sum(map(len, rows))
        while self._num_bytes > _MOST_KEPT and len(self._kept) > 1:
            self._num_bytes -= sum(map(len, self._kept.popitem(last=False)[1]))

    def _forget(self) -> None:
        self._open.clear()
        self._kept.clear()
        self._num_bytes, self._pid = 0, os.getpid()


_rows = _Rows()


class _Column:
    """A column of a file, at some row of some group."""

    def __init__(self, path: str, column: str) -> None:
        self._file, self._column = open_parquet(path), column
        self._group, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())

    def rows(self, group: int, start: int) -> list[bytes]:
        """Those from `start`, at most _ROWS."""
        if group != self._group or start < self._next:
            self._group, self._next = group, 0
            with _damage():
                self._batches = self._file.iter_batches(
                    _ROWS, row_groups=[group], columns=[self._column], use_threads=False
                )
        while True:
            with _damage():
                batch = next(self._batches, None)
            if batch is None:
                raise DataError("the parquet file has fewer rows than its list says")
            at, self._next = self._next, self._next + batch.num_rows
            if at == start:
                with _damage():
                    return [_bytes(cell) for cell in batch.column(0)]


def _bytes(cell: pyarrow.Scalar) -> bytes:
    value = cell.as_py()
    value = next(iter(value.values()), None) if isinstance(value, dict) else value
    return b"" if value is None else value


class _damage:  # noqa: N801 - a context, written as one
    """What pyarrow raises on damaged files, as DataError without a name."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        import pyarrow

        if isinstance(error, OSError) and error.errno is not None:
            return
        if isinstance(error, pyarrow.ArrowException | OSError | ValueError | MemoryError):
            raise DataError(f"is no complete parquet file: {str(error).splitlines()[0][:200]}") from None


def open_parquet(path: str) -> ParquetFile:
    """Raises DataError, without the name where the file is damaged; OSError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs a package: pip install pyarrow") from None
    with _damage():
        # No thread is started, so that processes can be forked; and a group of rows is not in memory as a whole.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


# ---------------------------------------------------------------------------------------------------------------------
# What a file holds


@dataclass(frozen=True)
class _Columns:
    """image: the path of the column with the bytes. classes: names by number; None: the label is its own name."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None
    others: tuple[str, ...]

    @property
    def sentence(self) -> str:
        said = f"images from the column {self.image.removesuffix('.bytes')}"
        return said + (f"; columns that are not read: {some(self.others)}" if self.others else "")


def list_parquet(shards: Sequence[tuple[Parts, Path]], listing: Listing, options: SourceOptions) -> None:
    """Adds the rows of files, with the path of each before them. Raises DataError, OSError."""
    first: _Columns | None = None
    labels: dict[str, str | None] = {}
    for parts, path in shards:
        try:
            file = open_parquet(str(path))
            columns = _columns(file, listing.origin, options)
            if first is not None and columns != first:
                raise DataError(f"has other columns or classes than {shards[0][1]}: {columns} and not {first}")
            first = columns
            _check_size(path, file)
            _list_rows(file, path, parts, columns, listing, labels)
        except DataError as error:
            text = str(error)
            raise DataError(text if text.startswith((str(path), listing.origin)) else f"{path}: {text}") from None
    if first is None:
        return
    listing.are_images = True
    listing.sentence = first.sentence
    if first.label is not None:
        known = "" if first.classes is None else f", which lists {len(first.classes):,} classes"
        listing.labels = Labels(
            labels,
            f"labels from the column {first.label}{known}",
            f"no {first.label}, taken without one",
            first.classes,
        )


def _check_size(path: Path, file: ParquetFile) -> None:
    """A few bytes may declare any number of rows, and each is listed."""
    rows, size = file.metadata.num_rows, os.path.getsize(path)
    if rows > size:
        raise DataError(f"declares {rows:,} rows in {size:,} bytes")


def _list_rows(
    file: ParquetFile, path: Path, parts: Parts, columns: _Columns, listing: Listing, labels: dict[str, str | None]
) -> None:
    at = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        missing = _missing(file, group, columns.image)
        classes = _classes(file, group, columns) if columns.label is not None else [None] * num_rows
        if len(classes) != num_rows:
            raise DataError(f"group {group} of its rows has {len(classes)} labels and {num_rows} rows")
        for row, label in enumerate(classes):
            below = (*parts, str(at + row))
            if row in missing:
                listing.left_out.append(("no image in this row", below))
                continue
            found = Found(below, f"{path}/{at + row}", ParquetCell(str(path), columns.image, group, row))
            listing.files.append(found)
            labels[found.name] = label
        at += num_rows


def _missing(file: ParquetFile, group: int, column: str) -> set[int]:
    """Rows without an image. The file mostly says that there are none, else the column is read."""
    number = next(i for i in range(len(file.schema)) if file.schema.column(i).path == column)
    try:
        # Where what the file says is damaged, this raises, and the next line would end the process.
        with _damage():
            next(file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False), None)
    except DataError:
        return set()  # reading says so of each of these images
    chunk = file.metadata.row_group(group).column(number)
    # Of a part whose type is damaged, pyarrow ends the process when it is asked for statistics.
    is_known = chunk.physical_type == file.schema.column(number).physical_type
    if is_known and chunk.is_stats_set and chunk.statistics.has_null_count and chunk.statistics.null_count == 0:
        return set()
    found: set[int] = set()
    at = 0
    with suppress(DataError), _damage():
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
            values = batch.column(0)
            values = values.flatten()[0] if values.type.num_fields else values
            found |= {at + i for i, value in enumerate(values) if not value.is_valid}
            at += batch.num_rows
    return found


def _classes(file: ParquetFile, group: int, columns: _Columns) -> list[str | None]:
    with _damage():
        values = file.read_row_group(group, columns=[columns.label], use_threads=False).column(0).to_pylist()
    if columns.classes is None:
        return [class_of(value) for value in values]
    named = columns.classes
    for value in values:
        if value is not None and not (isinstance(value, int) and -1 <= value < len(named)):
            raise DataError(f"the column {columns.label} holds {value!r}, and its list has {len(named)} classes")
    return [None if value is None or value < 0 else named[value] for value in values]


def _columns(file: ParquetFile, origin: str, options: SourceOptions) -> _Columns:
    """Raises DataError: a question where several columns may be meant."""
    import pyarrow

    schema = file.schema_arrow
    features = _features(schema)
    ask = Questions(origin, options)

    def is_bytes(kind: pyarrow.DataType) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = {}
    for field in schema:
        if is_bytes(field.type):
            images[field.name] = field.name
        elif pyarrow.types.is_struct(field.type) and any(is_bytes(x.type) for x in field.type if x.name == "bytes"):
            images[field.name] = f"{field.name}.bytes"
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = _asked(options.image_key, images, "images (bytes)", schema)
    if image is None:
        declared = [name for name in images if kinds.get(name) == "Image"]
        found = declared if len(declared) == 1 else list(images)
        if not found:
            raise DataError(f"{origin}: no column holds images (bytes); there are {', '.join(schema.names)}")
        if len(found) > 1:
            raise ask.about(
                f"has the columns {', '.join(found)}, which may hold images; which is to be learned from?",
                [f"--image-key {name}" for name in found],
            )
        image = found[0]
    label = None
    if options.layout != "flat":
        usable = {
            field.name: field.name
            for field in schema
            if pyarrow.types.is_integer(field.type)
            or pyarrow.types.is_string(field.type)
            or pyarrow.types.is_large_string(field.type)
            or pyarrow.types.is_boolean(field.type)
            or pyarrow.types.is_dictionary(field.type)
        }
        label = _asked(options.label_key, usable, "labels (numbers or words)", schema)
        if label is None:
            declared = [name for name in usable if kinds.get(name) == "ClassLabel"]
            found = declared or [name for name in usable if name.lower() in LABEL_COLUMNS]
            if len(found) > 1:
                raise ask.about(
                    f"has the columns {', '.join(found)}, which may hold the class; which does?",
                    [*(f"--label-key {name}" for name in found), "--layout flat"],
                )
            label = found[0] if found else None
    others = tuple(name for name in schema.names if name not in (image, label))
    return _Columns(images[image], label, _class_names(features.get(label)), others)


def _asked(name: str | None, usable: dict[str, str], what: str, schema: pyarrow.Schema) -> str | None:
    if name is not None and name not in usable:
        there = f"; such columns are {', '.join(usable)}" if usable else ""
        state = "holds no" if name in schema.names else "is not there, and so holds no"
        raise DataError(f"the column {name} {state} {what}{there}")
    return name


def _features(schema: pyarrow.Schema) -> dict[Any, Any]:
    """What the Hugging Face library wrote about the columns. Raises DataError."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    try:
        found = parse_json(written)["info"]["features"]
        return dict(found)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"what it says about its columns (huggingface) cannot be read: {error}") from None


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names:
        return None
    found = tuple(map(str, names))
    if len(set(found)) < len(found):
        raise DataError("two of the classes that it lists have the same name")
    return found
