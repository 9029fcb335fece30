"""How good is the representation by now? Computed between two epochs, by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from simclr_dist.config import EvaluationConfig, Precision
from simclr_dist.evaluation.features import Features, extract_features_distributed
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.evaluation.score_record import score_record
from simclr_dist.kinds import Kind
from simclr_dist.kinds.evaluation_labels import EvaluationImages


@dataclass(frozen=True)
class OnlineScores:
    """figures: by TensorBoard tag. record: the line for evaluations.jsonl."""

    figures: dict[str, float]
    record: dict[str, Any]


class OnlineEvaluation:
    """Top-1 on data.test, by TensorBoard tag: of weighted kNN against the bank's h, and of the probe if there is one.

    All ranks call it together; if it fails on one, it fails on all. warn_once: hears of images that cannot be read, as
    often as they are met.
    """

    def __init__(
        self,
        images: EvaluationImages,
        *,
        kind: Kind,
        evaluation: EvaluationConfig,
        precision: Precision,
        device: torch.device,
        warn_once: Callable[[str], None],
    ) -> None:
        self._images = images
        self._evaluation = evaluation
        self._kind = kind
        self._precision = precision
        self._device = device
        self._warn_once = warn_once
        self._load_train, self._load_test = (
            ReadableImages(kind, source, evaluation.batch_size)
            for source in (images.labelled.train, images.labelled.test)
        )

    def __call__(self, encoder: nn.Module, step: int, probe: OnlineProbe | None = None) -> OnlineScores:
        """step: how many are done."""
        labelled = self._images.labelled
        bank = self._features(encoder, self._load_train, self._images.bank)
        test = self._features(encoder, self._load_test, np.arange(labelled.test_info.num_samples))
        knn = knn_top1(
            bank,
            relabelled(test, labelled.classes),
            k=self._evaluation.knn_k,
            temperature=self._evaluation.knn_temperature,
            num_classes=labelled.num_classes,
            device=self._device,
        )
        figures = {"eval/knn_top1": knn.top1}
        if probe is not None and self._images.probe_classes is not None:
            figures["eval/probe_top1"] = probe.top1(test.h, relabelled(test, self._images.probe_classes).labels)
        record = score_record(
            labelled,
            step=step,
            method="knn",
            train_images=len(bank),
            test_images=len(test),
            signature=self._kind.input_signature,
            precision=self._precision,
            k=self._evaluation.knn_k,
            temperature=self._evaluation.knn_temperature,
            top1=knn.top1,
            top5=knn.top5,
        )
        return OnlineScores(figures, record)

    def _features(self, encoder: nn.Module, load: ReadableImages, ids: NDArray[np.int64]) -> Features:
        features = extract_features_distributed(
            encoder, load, ids, device=self._device, precision=self._precision, normalize=self._kind.to_input
        )
        if sentence := load.left_out(ids, features, self._device):
            self._warn_once(sentence)
        return features
