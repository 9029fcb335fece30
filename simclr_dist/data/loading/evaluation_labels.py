"""Can data.train and data.test be evaluated together? Checked before the first step, and by the doctor."""

from __future__ import annotations

from simclr_dist.config import DataConfig, EvaluationConfig
from simclr_dist.data.classes import match_classes
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError


def check_evaluation_labels(data: DataConfig, evaluation: EvaluationConfig) -> str:
    """Checks the labels for the kNN of the epochs' ends. Imports no torch.

    Returns a sentence about how the two sets of classes fit, empty where they are the same or no kNN is wanted. Raises
    DataError where the labels cannot be used.
    """
    if evaluation.knn_every_epochs is None or data.test is None:
        return ""
    train, test = describe(data.train), describe(data.test)
    switch_off = "use labelled images, or set evaluation.knn_every_epochs to null"
    for key, source, info in (("data.train", data.train, train), ("data.test", data.test, test)):
        unlabelled = int((info.labels < 0).sum())
        if unlabelled:
            raise DataError(
                f"evaluation.knn_every_epochs: {unlabelled:,} of {info.num_samples:,} images of {key} ({source}) have "
                f"no label; {switch_off}"
            )
    if len(train.class_names) < 2:
        raise DataError(
            f"evaluation.knn_every_epochs: {data.train} has {len(train.class_names)} class, and kNN needs two; "
            f"{switch_off}"
        )
    return match_classes(train.class_names, test.class_names, test.labels, train=data.train, test=data.test).sentence
