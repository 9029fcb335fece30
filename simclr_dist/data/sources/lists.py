"""Files that say which images to take, which labels they have, and which classes there are."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN
from simclr_dist.errors import DataError


def read_names(path: str) -> list[str]:
    """One name a line; empty lines are passed over. Raises DataError."""
    return [normal(line.removesuffix("\r")) for line in _text(path).split("\n") if line.strip()]


@dataclass(frozen=True)
class Table:
    """A CSV or TSV file. rows: (number of the line, its values)."""

    path: str
    columns: list[str]
    rows: list[tuple[int, list[str]]]

    def value(self, line: int, row: list[str], column: int) -> str:
        """Raises DataError where the row is shorter."""
        if column >= len(row):
            raise DataError(f"{self.path}, line {line}: has no {self.columns[column]}: {row[0]}")
        return row[column]

    def column(self, asked: str | None, usual: Collection[str], option: str) -> int | None:
        """Which column was asked for with `option`, or is the only one of the usual names. Raises DataError."""
        if asked is not None:
            if asked not in self.columns:
                raise DataError(f"{self.path}: has no column {asked}; there are {', '.join(self.columns)}")
            return self.columns.index(asked)
        found = [i for i, name in enumerate(self.columns) if name.strip().lower() in usual]
        if len(found) > 1:
            several = ", ".join(self.columns[i] for i in found)
            raise DataError(f"{self.path}: has the columns {several}; say which with {option} NAME")
        return found[0] if found else None


# What columns are called, in tables and in records such as JSON.
IMAGE_COLUMNS = frozenset(
    {"name", "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path"}
    | {"image_name", "image_file"}
)
LABEL_COLUMNS = frozenset(
    {"label", "labels", "class", "cls", "class_name", "classname", "class_label", "category", "target", "label_name"}
    | {"class_id", "label_id", "category_id", "class_index", "label_index"}
)
SPLIT_COLUMNS = frozenset({"split", "subset", "fold_name", "partition"})


def read_table(path: str) -> Table:
    """Separated by commas, semicolons or tabs, whichever the header has. Raises DataError."""
    text = _text(path)
    header = text.partition("\n")[0]
    separator = "\t" if path.lower().endswith(".tsv") else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [column.strip() for column in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: cannot be read: {error}") from None
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise DataError(f"{path}: two of its columns are called {twice[0]}")
    return Table(path, columns, rows)


def read_labels(path: str, label_key: str | None = None) -> dict[str, str | None]:
    """Classes by name, from a table with a column for each, as the header says. Raises DataError."""
    table = read_table(path)
    if label_key is None and [name.lower() for name in table.columns[:2]] == ["name", "label"]:
        return labels_in(table, 0, 1)
    name = table.column(None, IMAGE_COLUMNS, "a header that begins `name,label`, not with --image-key")
    label = table.column(label_key, LABEL_COLUMNS, "--label-key")
    if name is None or label is None:
        header = ",".join(table.columns)
        raise DataError(f"{path}: begins with `{header}`; expected the header `name,label`, or columns called so")
    return labels_in(table, name, label)


def labels_in(table: Table, name: int, label: int) -> dict[str, str | None]:
    """Classes by name; None where the table leaves one open. Raises DataError where it says two of one name."""
    labels: dict[str, str | None] = {}
    for line, row in table.rows:
        image, found = normal(table.value(line, row, name)), class_of(table.value(line, row, label))
        if labels.setdefault(image, found) != found:
            raise DataError(f"{table.path}, line {line}: {image} has the label `{found}`, and `{labels[image]}` above")
    return labels


def class_of(value: object) -> str | None:
    """The class that a value names; None: none, also for -1, with which many data sets say so. Raises ValueError."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value in ("", -1, "-1"):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise ValueError(f"{str(value)[:40]!r} names no class: expected a number or a word")


def in_order(classes: Collection[str]) -> tuple[str, ...]:
    """Classes that labels name, in the order in which they are numbered: by value where all are numbers."""
    if all(name.isascii() and name.isdigit() and len(name) < 10 for name in classes):
        return tuple(sorted(classes, key=lambda name: (int(name), name)))
    return tuple(sorted(classes))


def check_names(names: Collection[str], known: Collection[str], listed_in: str, origin: str) -> None:
    """Raises DataError for names that are not at the source."""
    missing = [name for name in names if name not in known]
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
        example = next(iter(known), None)
        hint = f"; a name that is there: {example}" if example is not None else ""
        raise DataError(f"{listed_in}: {len(missing):,} of {len(names):,} names are not in {origin}: {shown}{hint}")


def number_classes(
    classes: Sequence[str | None], class_names: tuple[str, ...] | None, origin: str, names_from: str | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """(names, labels [n], -1 without a class).

    class_names: those to use, in their order, which `names_from` names; by default those that are there, sorted.

    Raises DataError for a class that is not among the given names.
    """
    there = {name for name in classes if name is not None}
    if class_names is None:
        class_names = tuple(sorted(there))
    unknown = sorted(there - set(class_names))
    if unknown:
        shown = ", ".join(unknown[:NAMES_SHOWN]) + (", …" if len(unknown) > NAMES_SHOWN else "")
        raise DataError(f"{origin}: {len(unknown)} of its classes are not among those of {names_from}: {shown}")
    number: dict[str | None, int] = {name: i for i, name in enumerate(class_names)}
    return class_names, np.array([number.get(name, -1) for name in classes], np.int64)


def normal(name: str) -> str:
    """A name as paths have it: no `./` before it, and one `/` where there are more."""
    return PurePosixPath(name).as_posix()


def _text(path: str) -> str:
    """Names may hold any bytes. A byte-order mark, as spreadsheets write it, is passed over."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
