"""Reads texts from .txt, .tsv, .csv, .jsonl and .parquet, the first four also packed by gzip.

A table has named columns; a text file has a text in each line, and no labels.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.bounded_json import parse_json
from simclr_dist.data.tokens.files import plain_suffix, text_lines
from simclr_dist.errors import DataError

SUFFIXES = ".txt", ".tsv", ".csv", ".jsonl", ".parquet"
USUAL_COLUMNS = "text", "sentence"


@dataclass(frozen=True)
class Text:
    text: str
    name: str
    """Where it stands, for people."""
    label: str = ""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are texts, and which one names the class. Without a header, numbers from 1."""

    texts: tuple[str, ...] = ()
    """Empty: `text` or `sentence`, or the only one. Several: each of them is a text of its own."""
    label: str | None = None
    header: bool = True

    def chosen(self, path: Path, names: Sequence[str]) -> tuple[str, ...]:
        """Raises DataError where they are not among `names`, or cannot be told."""
        wanted = self.texts or tuple(name for name in USUAL_COLUMNS if name in names)[:1]
        if not wanted and len(names) == 1:
            wanted = (names[0],)
        shown = ", ".join(map(repr, names[:20]))
        if not wanted:
            raise DataError(f"{path}: which column holds the texts? Name it with --column; it has {shown}")
        for option, name in (*(("--column", name) for name in wanted), ("--label-column", self.label)):
            if name is not None and name not in names:
                raise DataError(f"{path}: {option}: has no column {name!r}; it has {shown}")
        return wanted


def read_texts(path: Path, columns: Columns, encoding: str = "utf-8") -> tuple[str, Iterator[Text]]:
    """A sentence about how the file is read, and its texts, empty ones too. Raises DataError, also while reading."""
    suffix = plain_suffix(path)
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix == ".gz"):
        raise DataError(f"{path}: texts are read from {', '.join(SUFFIXES)}; name such a file")
    if suffix == ".txt":
        if columns != Columns():
            raise DataError(f"{path}: a .txt file has no columns; leave --column, --label-column and --no-header out")
        return "a text in each line", (Text(line, f"line {number}") for number, line in text_lines(path, encoding))
    if suffix == ".jsonl" and not columns.header:
        raise DataError(f"{path}: --no-header is for .tsv and .csv: the values of .jsonl have names")
    rows = {".jsonl": _objects, ".parquet": _parquet}.get(suffix, _table)(path, columns, encoding)
    try:
        names, _, _ = first = next(rows)
    except StopIteration:
        raise DataError(f"{path}: holds nothing") from None
    wanted = columns.chosen(path, names)
    label = f", classes from {columns.label!r}" if columns.label else ""
    return f"texts of column {' and '.join(map(repr, wanted))}{label}", _texts(
        itertools.chain([first], rows), wanted, columns, path
    )


_Row = tuple[Sequence[str], dict[str, Any], str]
"""Names of the columns, values by name, and where it stands."""


def _texts(rows: Iterator[_Row], wanted: tuple[str, ...], columns: Columns, path: Path) -> Iterator[Text]:
    for _, row, place in rows:
        label = row.get(columns.label) if columns.label else None
        for column in wanted:
            if column not in row:
                raise DataError(f"{path}, {place}: has no {column!r}")
            value = row[column]
            if not isinstance(value, str | None):
                raise DataError(f"{path}, {place}: {column!r} is no text but {str(value)[:40]}")
            name = place if len(wanted) == 1 else f"{place}, {column}"
            yield Text(value or "", name, "" if label is None else str(label))


def _table(path: Path, columns: Columns, encoding: str) -> Iterator[_Row]:
    """In .csv, quotes may hold commas and new lines; in .tsv they are letters like others."""
    tabs = plain_suffix(path) == ".tsv"
    lines = (f"{line}\n" for _, line in text_lines(path, encoding))
    reader = csv.reader(lines, strict=True, **({"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}))  # type: ignore[arg-type]
    try:
        names: list[str] = []
        for row in reader:
            if not row:
                continue
            if not names:
                names = row if columns.header else [str(i + 1) for i in range(len(row))]
                if len(set(names)) < len(names):
                    raise DataError(f"{path}: two of its columns have the same name; is its first line a header?")
                if columns.header:
                    continue
            if len(row) != len(names):
                raise DataError(f"{path}, line {reader.line_num}: has {len(row)} values for {len(names)} columns")
            yield names, dict(zip(names, row, strict=True)), f"line {reader.line_num}"
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def _objects(path: Path, columns: Columns, encoding: str) -> Iterator[_Row]:
    for number, line in text_lines(path, encoding):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: is no JSON object, such as {{"text": "…"}}')
        yield list(row), row, f"line {number}"


def _parquet(path: Path, columns: Columns, encoding: str) -> Iterator[_Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: .parquet needs pyarrow: pip install 'simclr-dist[text]'") from None
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [*columns.chosen(path, names), *([columns.label] if columns.label else [])]
            number = 0
            for batch in file.iter_batches(4096, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield names, row, f"row {number}"
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
