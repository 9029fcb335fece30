"""Labels of two sets of features: checked and matched before every evaluation that needs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from simclr_dist.data.classes import ClassMap
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features


def check_labels(train: Features, test: Features, num_classes: int) -> None:
    """Raises DataError unless both sets can train and test a classifier of `num_classes` classes."""
    if num_classes < 2:
        raise DataError(f"a classifier needs at least 2 classes, the training data has {num_classes}")
    for name, features in (("training", train), ("test", test)):
        if len(features) == 0:
            raise DataError(f"there are no {name} images")
        check_label_range(features.labels, num_classes, name)
    if train.h.shape[1] != test.h.shape[1]:
        raise DataError(
            f"training features have width {train.h.shape[1]}, test features {test.h.shape[1]}: "
            "they come from different encoders or image sizes"
        )
    unseen = torch.bincount(test.labels, minlength=num_classes).gt(0) & train_counts(train, num_classes).eq(0)
    if unseen.any():
        classes = ", ".join(map(str, unseen.nonzero().flatten().tolist()[:10]))
        raise DataError(f"the test images have classes without any training image: {classes}")


def check_label_range(labels: Tensor, num_classes: int, name: str) -> None:
    """Raises DataError when a label is not one of 0..num_classes-1."""
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise DataError(f"{unlabelled} of {len(labels)} {name} images have no label; evaluate on labelled data")
    if int(labels.max()) >= num_classes:
        raise DataError(
            f"the {name} images have label {int(labels.max())}, but there are {num_classes} classes "
            f"(0..{num_classes - 1})"
        )


def relabelled(features: Features, classes: ClassMap) -> Features:
    """The features of a test set with the training set's class numbers."""
    return replace(features, labels=torch.from_numpy(classes(features.labels.numpy())))


def train_counts(train: Features, num_classes: int) -> Tensor:
    """Training images of each class, int64 [C]."""
    return torch.bincount(train.labels, minlength=num_classes)


def split_by_class(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows int64 split in two: the second part holds `share` of each class, at least 1 and never the last image.

    Both parts are sorted. The draw depends on seed and labels only.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    labels_drawn = labels.numpy()[order]
    drawn = []
    for label in np.unique(labels_drawn):
        members = order[labels_drawn == label]
        drawn.append(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    second = np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)
    first = np.setdiff1d(np.arange(len(labels)), second)
    return torch.from_numpy(first), torch.from_numpy(second)
