"""Do the classes of two data sets fit together? Compared by name, never by number. And a part of every class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.randomness import keys
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
    train_labels: NDArray[np.int64] | None = None,
) -> ClassMap:
    """A test set may lack classes and may number them differently; it may not have images of others.

    Labels: int64 [n], -1 where there is none; with train_labels, a class counts only if it has a training image.
    train, test: the sources, for messages. Raises DataError.
    """
    for source, names in ((train, train_names), (test, test_names)):
        _refuse_same_names(source, names)
    for source, names, labels in ((train, train_names, train_labels), (test, test_names, test_labels)):
        if labels is not None:
            check_labels(source, names, labels)
    if train_labels is not None:
        has_images = np.bincount(train_labels[train_labels >= 0], minlength=len(train_names)) > 0
    else:
        has_images = np.ones(len(train_names), bool)
    number = {name: i for i, name in enumerate(train_names) if has_images[i]}
    counts = np.bincount(test_labels[test_labels >= 0], minlength=len(test_names))
    unknown = [name for name, count in zip(test_names, counts, strict=True) if count and name not in number]
    absent = sorted(set(number) - {name for name, count in zip(test_names, counts, strict=True) if count})
    if unknown:
        missing = f"; {train} has {_few(absent)} and no image of them is in the test set" if absent else ""
        empty = [name for name in unknown if name in train_names]
        named = f" (it names {_few(empty)}, without an image)" if empty else ""
        raise DataError(
            f"{test}: has images of classes that {train} does not have: {_few(unknown)}{named}{missing}. Classes are "
            f"compared by name: rename them, or prepare the test set with --classes-from {train}"
        )
    sentence = ""
    if absent:
        present = len(number) - len(absent)
        sentence = f"{test} has images of {present} of the {len(number)} classes; none of {_few(absent)}"
    elif tuple(train_names) != tuple(test_names):
        sentence = f"{test} numbers its classes in another order than {train}; they are matched by name"
    return ClassMap(np.array([number.get(name, -1) for name in test_names], np.int64), sentence)


@dataclass(frozen=True)
class ClassUnion:
    """The classes of several files that are one data set. maps: from each file's class numbers to those of all."""

    names: tuple[str, ...]
    maps: tuple[ClassMap, ...]
    sentence: str
    """How they fit, for people; empty where all files have the same."""


def union_of_classes(files: Sequence[tuple[str, Sequence[str], bool]]) -> ClassUnion:
    """files: of each its name, the names of its classes, and whether somebody has named them: else they are numbers.

    Classes are numbered as they come, from the first file on. Raises DataError where they cannot be told by name.
    """
    named = [source for source, names, is_named in files if is_named and names]
    unnamed = [source for source, _, is_named in files if not is_named]
    if named and unnamed:
        raise DataError(
            f"{unnamed[0]}: its classes have no names, and those of {named[0]} have: classes of several files are "
            "compared by name. Put the JSON file with its class names beside it, or prepare it again"
        )
    numbers: dict[str, int] = {}
    for source, names, _ in files:
        _refuse_same_names(source, names)
        for name in names:
            numbers.setdefault(name, len(numbers))
    union = tuple(numbers)
    maps: dict[tuple[str, ...], ClassMap] = {}
    for _, names, _ in files:
        if tuple(names) not in maps:
            maps[tuple(names)] = ClassMap(np.array([numbers[name] for name in names], np.int64), "")
    same = unnamed or all(tuple(names) in ((), union) for _, names, _ in files)
    sentence = "" if same else f"they name their classes differently and are matched by name: {len(union)} in all"
    return ClassUnion(union, tuple(maps[tuple(names)] for _, names, _ in files), sentence)


def check_labels(source: str, names: Sequence[str], labels: NDArray[np.int64]) -> None:
    """Raises DataError where a label has no name."""
    if len(labels) and int(labels.max()) >= len(names):
        raise DataError(
            f"{source}: has label {int(labels.max())}, but names only {len(names)} classes; prepare it again"
        )


def _refuse_same_names(source: str, names: Sequence[str]) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"{source}: two of its classes have the same name: {_few(twice)}")


def draw_by_class(labels: NDArray[np.int64], most: int | None, seed: int) -> NDArray[np.int64]:
    """At most `most` of the images 0..n-1, rising: each class has its share, and at least one where it has an image.

    labels: int64 [n]; those of -1 are one more class. None: all. Which images of a class are drawn is a function of
    seed and their numbers. Raises ValueError where `most` is less than the number of classes.
    """
    n = len(labels)
    if most is None or most >= n:
        return np.arange(n, dtype=np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    if most < len(classes):
        raise ValueError(f"{most} images cannot hold one of each of {len(classes)} classes")
    # One each; the rest by the share of what is left of a class, the largest remainders rounded up.
    shares = (most - len(classes)) * (counts - 1) / (n - len(classes))
    quotas = 1 + np.floor(shares).astype(np.int64)
    quotas[np.argsort(np.floor(shares) - shares, kind="stable")[: most - quotas.sum()]] += 1
    order = np.lexsort((keys(seed, 0, np.arange(n), _DRAW), labels))  # class after class, each shuffled
    place = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # of each in its class
    return np.sort(order[place < np.repeat(quotas, counts)])


_DRAW = (1 << 32) + 1  # used in place of a view's number, so that this draw shares no key with views and orders


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
