"""What the encoder finds alike: its embedding in TensorBoard's projector, and nearest neighbours as images.

The same images every time, so that one sees neighbourhoods form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import DataConfig, Precision
from simclr_dist.data.loading.open_images import DatasetInfo, describe
from simclr_dist.evaluation.features import extract_features_distributed
from simclr_dist.evaluation.knn import nearest
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.monitor.events import Embedding, Neighbours
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

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
    """Of IMAGES images of data.test (or data.train), evenly spread, as far as they can be read. All ranks together."""

    def choose() -> tuple[DatasetInfo, NDArray[np.int64]]:
        info = describe(data.test or data.train)
        n = min(IMAGES, info.num_samples)
        return info, np.arange(n, dtype=np.int64) * info.num_samples // n

    info, ids = run_on_all_ranks(choose, device, catch=Exception)
    load = ReadableImages.of(data.test or data.train, data, batch_size)
    features = extract_features_distributed(encoder, load, ids, device=device, precision=precision, normalize=normalize)
    if sentence := load.left_out(ids, features, device):
        monitor.warn_once(sentence)
    if distributed.rank() != 0:
        return
    shown = [(shrink(images), found) for images, _, found in load(features.sample_ids.numpy())]
    thumbnails = torch.cat([images for images, _ in shown])
    features = features[torch.isin(features.sample_ids, torch.cat([found for _, found in shown]))]
    labels = [_class_of(label, info.class_names) for label in features.labels.tolist()]
    monitor.show(Embedding(features.h, thumbnails, labels, samples_seen))
    queries = torch.arange(min(QUERIES, len(features))) * len(features) // min(QUERIES, len(features))
    monitor.show(Neighbours(thumbnails[neighbour_rows(features.h, queries)], samples_seen))


def _class_of(label: int, names: Sequence[str]) -> str:
    if label < 0:
        return "unlabelled"
    return names[label] if label < len(names) else f"class {label}"


def neighbour_rows(h: Tensor, queries: Tensor) -> Tensor:
    """Row numbers int64 [q, 1 + k]: each query, then the k other rows of h [n, D] that are most similar to it."""
    _, found = nearest(h[queries], h, min(NEIGHBOURS + 1, len(h)))
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
