"""Files that say which images to take, which labels they have, and which classes there are."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN
from simclr_dist.errors import DataError


def read_names(path: str) -> list[str]:
    """One name a line; empty lines are passed over. Raises DataError."""
    return [_normal(line.removesuffix("\r")) for line in _text(path).split("\n") if line.strip()]


def read_labels(path: str) -> dict[str, str]:
    """Labels by name, from a CSV file with the header `name,label`. Raises DataError."""
    rows = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        return _labels_of(rows, path)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: cannot be read: {error}") from None


def _labels_of(rows: Any, path: str) -> dict[str, str]:
    header = [column.strip().lower() for column in next(rows, [])]
    if header[:2] != ["name", "label"]:
        raise DataError(f"{path}: begins with `{','.join(header)}`; expected the header `name,label`")
    labels: dict[str, str] = {}
    for row in rows:
        if not row:
            continue
        if len(row) < 2:
            raise DataError(f"{path}, line {rows.line_num}: has no label: {row[0]}")
        name, label = _normal(row[0]), row[1].strip()
        if labels.setdefault(name, label) != label:
            raise DataError(f"{path}, line {rows.line_num}: {name} has the label `{label}`, and `{labels[name]}` above")
    return labels


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
    """(names, labels [n], -1 without a class). class_names: those to use, which `names_from` names; by default sorted.

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


def _normal(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _text(path: str) -> str:
    """Names may hold any bytes. A byte-order mark, as spreadsheets write it, is passed over."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
