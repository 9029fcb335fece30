"""What the encoder finds alike: its embedding in TensorBoard's projector, and nearest neighbours as images.

The same images every time, so that one sees neighbourhoods form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import DataConfig, Precision
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.evaluation.features import extract_features_distributed
from simclr_dist.evaluation.knn import nearest
from simclr_dist.monitor.events import Embedding, Neighbours
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed

IMAGES = 1000
QUERIES, NEIGHBOURS = 8, 8
LARGEST_SIDE = 96  # of an image shown; ImageNet's at full size would fill 150 MB


def show_gallery(
    encoder: nn.Module,
    monitor: Monitor,
    *,
    data: DataConfig,
    batch_size: int,
    precision: Precision,
    samples_seen: int,
    device: torch.device,
    normalize: Callable[[Tensor], Tensor],
) -> None:
    """Of IMAGES images of data.test (or data.train), evenly spread. All ranks call it together."""
    source = data.test or data.train
    info = describe(source)
    n = min(IMAGES, info.num_samples)
    ids = np.arange(n, dtype=np.int64) * info.num_samples // n
    features = extract_features_distributed(
        encoder,
        lambda part: load_images(source, data.image_size, batch_size=batch_size, ids=part, loader=data.loader),
        ids,
        device=device,
        precision=precision,
        normalize=normalize,
    )
    if distributed.rank() != 0:
        return
    thumbnails = torch.cat(
        [
            shrink(images)
            for images, _, _ in load_images(source, data.image_size, batch_size=batch_size, ids=ids, loader=data.loader)
        ]
    )
    labels = [info.class_names[label] if label >= 0 else "unlabelled" for label in features.labels.tolist()]
    monitor.show(Embedding(features.h, thumbnails, labels, samples_seen))
    queries = torch.arange(min(QUERIES, n)) * n // min(QUERIES, n)
    monitor.show(Neighbours(thumbnails[neighbour_rows(features.h, queries)], samples_seen))


def neighbour_rows(h: Tensor, queries: Tensor) -> Tensor:
    """Row numbers int64 [q, 1 + k]: each query, then the k other rows of h [n, D] that are most similar to it."""
    unit = F.normalize(h, dim=1)
    _, found = nearest(unit[queries], unit, min(NEIGHBOURS + 1, len(h)))
    rows = []
    for query, row in zip(queries.tolist(), found.tolist(), strict=True):
        # A duplicate image may come before the query itself.
        others = [i for i in row if i != query]
        rows.append([query, *others[: found.shape[1] - 1]])
    return torch.tensor(rows)


def shrink(images: Tensor) -> Tensor:
    """uint8 [b, S, S, 3], at most LARGEST_SIDE wide."""
    if images.shape[1] <= LARGEST_SIDE:
        return images
    small = F.interpolate(images.permute(0, 3, 1, 2).float(), size=LARGEST_SIDE, mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1)
