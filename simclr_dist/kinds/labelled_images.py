"""Samples with labels: for every evaluation that needs them, and for a loss that does. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simclr_dist.config import DataConfig, LossConfig
from simclr_dist.data.classes import ClassMap, match_classes
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds.registry import kind_of


@dataclass(frozen=True)
class LabelledImages:
    """noun: of a sample. train, test: the sources. classes: from the test set's class numbers to the training set's."""

    noun: str
    train: str
    test: str
    train_info: DatasetInfo
    test_info: DatasetInfo
    classes: ClassMap

    @property
    def num_classes(self) -> int:
        return len(self.train_info.class_names)


def open_labelled(
    data: DataConfig, train: str | None = None, test: str | None = None, *, remedy: str = "name others with --train"
) -> LabelledImages:
    """The samples of the section `data`, or others in their place: evaluating on another dataset is a transfer.

    train: usually `evaluation.train`. Unlabelled samples may be among those of the training set.
    remedy: what to do where the training samples have no labels, for the message.
    Raises ConfigError without test data, DataError when labels are missing or the test set has samples of classes of
    which the training set has none.
    """
    train, test = train or data.train, test or data.test
    if test is None:
        raise ConfigError(["data.test is null, and there is no --test: give held-out data with --test PATH"])
    kind = kind_of(data)
    train_info, test_info = kind.describe(train), kind.describe(test)
    if not (train_info.labels >= 0).any():
        raise DataError(f"none of the {train_info.num_samples:,} {kind.noun}s of {train} has a label; {remedy}")
    classes = match_classes(
        train_info.class_names,
        test_info.class_names,
        test_info.labels,
        train=train,
        test=test,
        train_labels=train_info.labels,
    )
    return LabelledImages(kind.noun, train, test, train_info, test_info, classes)


def require_labels(noun: str, key: str, source: str, info: DatasetInfo, *, wanted_by: str = "", remedy: str) -> None:
    """Raises DataError unless every sample has a label. noun, key, wanted_by, remedy: for the message."""
    unlabelled = int((info.labels < 0).sum())
    if unlabelled:
        raise DataError(
            f"{wanted_by}{unlabelled:,} of {info.num_samples:,} {noun}s of {key} ({source}) have no label; {remedy}"
        )


def check_loss_labels(data: DataConfig, loss: LossConfig) -> str:
    """A sentence about samples without a label, where the loss needs labels; empty: nothing to say.

    Raises DataError where the labels leave nothing to compare.
    """
    if loss.kind != "supcon":
        return ""
    kind = kind_of(data)
    noun, labels = kind.noun, kind.describe(data.train).labels
    known, n = labels[labels >= 0], len(labels)
    num_classes, unlabelled = len(np.unique(known)), n - len(known)
    remedy = f"name labelled {noun}s with data.train, or set loss.kind to nt_xent or dcl"
    if not num_classes:
        raise DataError(
            f"loss.kind=supcon needs labels, and none of the {n:,} {noun}s of {data.train} has one; {remedy}"
        )
    if num_classes == 1 and not unlabelled:
        raise DataError(
            f"loss.kind=supcon: all {n:,} {noun}s of {data.train} are of one class, so no {noun} is told from another; "
            f"{remedy}"
        )
    if not unlabelled:
        return ""
    return (
        f"loss.kind=supcon: {unlabelled:,} of the {n:,} {noun}s of {data.train} have no label; each of them is a class "
        "of its own"
    )
