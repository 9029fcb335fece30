"""Do the classes of two data sets fit together? Compared by name, never by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simclr_dist.errors import DataError


@dataclass(frozen=True)
class ClassMap:
    """Turns the class numbers of a test set into those of the training set with the same names."""

    numbers: NDArray[np.int64]
    """[classes of the test set]: the training set's number; -1 for a class of the list that has no image."""
    sentence: str
    """How the two sets of classes fit, for people; empty where they are the same."""

    def __call__(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """labels int64 [n], -1 where there is none: stays."""
        return np.where(labels < 0, -1, self.numbers[np.maximum(labels, 0)]) if len(self.numbers) else labels


def match_classes(
    train_names: Sequence[str],
    test_names: Sequence[str],
    test_labels: NDArray[np.int64],
    *,
    train: str,
    test: str,
) -> ClassMap:
    """A test set may lack classes and may number them differently; it may not have images of others.

    test_labels: int64 [n], -1 where there is none. train, test: the sources, for messages. Raises DataError.
    """
    for source, names in ((train, train_names), (test, test_names)):
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DataError(f"{source}: two of its classes have the same name: {_few(twice)}")
    if len(test_labels) and int(test_labels.max()) >= len(test_names):
        raise DataError(
            f"{test}: has label {int(test_labels.max())}, but names only {len(test_names)} classes; prepare it again"
        )
    number = {name: i for i, name in enumerate(train_names)}
    counts = np.bincount(test_labels[test_labels >= 0], minlength=len(test_names))
    unknown = [name for name, count in zip(test_names, counts, strict=True) if count and name not in number]
    absent = sorted(set(train_names) - {name for name, count in zip(test_names, counts, strict=True) if count})
    if unknown:
        missing = f"; {train} has {_few(absent)} and no image of them is in the test set" if absent else ""
        raise DataError(
            f"{test}: has images of classes that {train} does not have: {_few(unknown)}{missing}. Classes are compared "
            f"by name: rename them, or prepare the test set with --classes-from {train}"
        )
    sentence = ""
    if absent:
        present = len(train_names) - len(absent)
        sentence = f"{test} has images of {present} of the {len(train_names)} classes; none of {_few(absent)}"
    elif tuple(train_names) != tuple(test_names):
        sentence = f"{test} numbers its classes in another order than {train}; they are matched by name"
    return ClassMap(np.array([number.get(name, -1) for name in test_names], np.int64), sentence)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
