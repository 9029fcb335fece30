"""What the evaluations of a training look at: chosen and checked before the first step, and by the doctor.

All labels are known then. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import DataConfig, EvaluationConfig
from simclr_dist.data.classes import ClassMap, draw_by_class, match_classes
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds.labelled_images import LabelledImages, open_labelled, require_labels
from simclr_dist.kinds.registry import kind_of

KNN, PROBE = "evaluation.knn_every_epochs", "evaluation.online_probe"


@dataclass(frozen=True)
class EvaluationImages:
    """Of the evaluations at the end of epochs."""

    labelled: LabelledImages
    bank: NDArray[np.int64]
    """The images of `labelled.train` among which kNN looks, rising."""
    probe_classes: ClassMap | None
    """From the test set's class numbers to those of data.train, which the online probe learns; None: there is none."""

    @property
    def remarks(self) -> list[str]:
        """What a person should know of them; mostly nothing."""
        labelled, found = self.labelled, []
        if labelled.classes.sentence:
            found.append(labelled.classes.sentence)
        same = labelled.train_info.content_fingerprint == labelled.test_info.content_fingerprint
        if same and labelled.train != "synthetic":
            found.append(
                f"{labelled.test} holds the very {labelled.noun}s of kNN's bank, {labelled.train}: each finds itself, "
                f"so the accuracy says nothing about other {labelled.noun}s; data.test should be held-out ones"
            )
        return found


def evaluation_images(data: DataConfig, evaluation: EvaluationConfig, seed: int) -> EvaluationImages | None:
    """seed: draws the bank. None where no kNN is wanted.

    Raises DataError where the labels cannot be used, ConfigError where the settings do not fit the images.
    """
    if evaluation.knn_every_epochs is None or data.test is None:
        return None
    kind = kind_of(data)
    describe, noun = kind.describe, kind.noun
    key, source = ("evaluation.train", evaluation.train) if evaluation.train else ("data.train", data.train)
    remedy = f"name labelled {noun}s with evaluation.train, or set {KNN} to null"
    require_labels(noun, key, source, describe(source), wanted_by=f"{KNN}: ", remedy=remedy)
    other = f"use labelled {noun}s, or set {KNN} to null"
    require_labels(noun, "data.test", data.test, describe(data.test), wanted_by=f"{KNN}: ", remedy=other)
    labelled = open_labelled(data, source)
    labels = labelled.train_info.labels
    classes = np.unique(labels)
    if len(classes) < 2:
        raise DataError(f"{KNN}: {source} has {len(classes)} class, and kNN needs two; {remedy}")
    if evaluation.knn_max_train is not None and evaluation.knn_max_train < len(classes):
        raise ConfigError(
            [
                f"evaluation.knn_max_train: a bank of {evaluation.knn_max_train:,} cannot hold one {noun} of each of "
                f"the {len(classes):,} classes of {source}; set it to {len(classes):,} or more"
            ]
        )
    bank = draw_by_class(labels, evaluation.knn_max_train, seed)
    if evaluation.knn_k > len(bank):
        raise ConfigError(
            [
                f"evaluation.knn_k: {evaluation.knn_k} neighbours, but kNN's bank has {len(bank)} {noun}s ({source}); "
                f"set it to {len(bank)} or less, or {KNN} to null"
            ]
        )
    return EvaluationImages(labelled, bank, _probe_classes(data, evaluation, labelled))


def _probe_classes(data: DataConfig, evaluation: EvaluationConfig, labelled: LabelledImages) -> ClassMap | None:
    if not evaluation.online_probe:
        return None
    if labelled.train == data.train:
        return labelled.classes
    train, test = kind_of(data).describe(data.train), labelled.test_info
    try:
        return match_classes(
            train.class_names,
            test.class_names,
            test.labels,
            train=data.train,
            test=labelled.test,
            train_labels=train.labels,
        )
    except DataError as error:
        raise DataError(f"{PROBE}: {error}; or switch it off: it learns from the labels of data.train") from None


def num_probe_classes(data: DataConfig, evaluation: EvaluationConfig) -> int | None:
    """How many classes the online probe learns from the labels of data.train; None where it is switched off.

    Images without a label take no part. Raises ConfigError where there are fewer than two classes, DataError.
    """
    if not evaluation.online_probe:
        return None
    kind = kind_of(data)
    num_classes = int(kind.describe(data.train).labels.max()) + 1
    if num_classes < 2:
        raise ConfigError(
            [
                f"{PROBE}: the labels of {data.train} name {num_classes} classes, and a classifier needs two; switch "
                f"it off, or train on labelled {kind.noun}s"
            ]
        )
    return num_classes


def check_evaluation_labels(data: DataConfig, evaluation: EvaluationConfig) -> list[str]:
    """Checks all evaluations that are switched on, and returns remarks. Raises DataError or ConfigError."""
    num_probe_classes(data, evaluation)
    images = evaluation_images(data, evaluation, seed=0)
    return images.remarks if images else []
