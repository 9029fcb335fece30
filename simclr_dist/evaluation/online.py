"""How good is the representation by now? Computed between two epochs, by all ranks together."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from simclr_dist.config import DataConfig, EvaluationConfig, Precision
from simclr_dist.data.classes import match_classes
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.evaluation.features import Features, extract_features_distributed
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.views.augment import normalize


def evaluate_while_training(
    encoder: nn.Module,
    *,
    data: DataConfig,
    evaluation: EvaluationConfig,
    precision: Precision,
    seed: int,
    device: torch.device,
    probe: OnlineProbe | None = None,
) -> dict[str, float]:
    """Top-1 on data.test, by TensorBoard tag: of weighted kNN against h of (at most evaluation.knn_max_train of)
    data.train, and of the probe if there is one. seed: chooses those images.
    """
    assert data.test is not None
    train, test = describe(data.train), describe(data.test)
    bank = np.random.Generator(np.random.Philox(seed)).permutation(train.num_samples)
    bank = np.sort(bank[: evaluation.knn_max_train])

    def features_of(source: str, ids: np.ndarray) -> Features:
        return extract_features_distributed(
            encoder,
            lambda part: load_images(
                source, data.image_size, batch_size=evaluation.batch_size, ids=part, loader=data.loader
            ),
            ids,
            device=device,
            precision=precision,
            normalize=normalize,
        )

    classes = match_classes(train.class_names, test.class_names, test.labels, train=data.train, test=data.test)
    looked_up = features_of(data.train, bank)
    asked = relabelled(features_of(data.test, np.arange(test.num_samples)), classes)
    knn = knn_top1(
        looked_up,
        asked,
        k=min(evaluation.knn_k, len(bank)),
        temperature=evaluation.knn_temperature,
        num_classes=len(train.class_names),
        device=device,
    )
    found = {"eval/knn_top1": knn.top1}
    if probe is not None:
        found["eval/probe_top1"] = probe.top1(asked.h, asked.labels)
    return found
