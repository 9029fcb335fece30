"""What the encoder finds alike: its embedding in TensorBoard's projector, and nearest neighbours as people see them.

The same samples every time, so that one sees neighbourhoods form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.config import Precision
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.evaluation.features import extract_features_distributed
from simclr_dist.evaluation.knn import nearest
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.kinds import Kind
from simclr_dist.monitor.events import Embedding, Neighbours
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

if TYPE_CHECKING:
    from simclr_dist.kinds.kind import Shown

SAMPLES = 1000
QUERIES, NEIGHBOURS = 8, 8


def show_gallery(
    encoder: nn.Module,
    monitor: Monitor,
    *,
    kind: Kind,
    batch_size: int,
    precision: Precision,
    samples_seen: int,
    device: torch.device,
) -> None:
    """Of SAMPLES samples of data.test (or data.train), evenly spread, that can be read. All ranks together."""
    source = kind.data.test or kind.data.train

    def choose() -> tuple[DatasetInfo, NDArray[np.int64]]:
        info = kind.describe(source)
        n = min(SAMPLES, info.num_samples)
        return info, np.arange(n, dtype=np.int64) * info.num_samples // n

    info, ids = run_on_all_ranks(choose, device, catch=Exception)
    load = ReadableImages(kind, source, batch_size)
    features = extract_features_distributed(
        encoder, load, ids, device=device, precision=precision, normalize=kind.to_input
    )
    if sentence := load.left_out(ids, features, device):
        monitor.warn_once(sentence)
    if distributed.rank() != 0:
        return
    shown = None
    if (to_look_at := kind.show(source, features.sample_ids.numpy())) is not None:
        shown, found = to_look_at
        features = features[torch.isin(features.sample_ids, torch.from_numpy(found))]
    labels = [_class_of(label, info.class_names) for label in features.labels.tolist()]
    monitor.show(Embedding(features.h, shown, labels, samples_seen))
    if shown is None:
        return
    queries = torch.arange(min(QUERIES, len(features))) * len(features) // min(QUERIES, len(features))
    monitor.show(Neighbours(in_rows(shown, neighbour_rows(features.h, queries)), samples_seen))


def in_rows(shown: Shown, rows: Tensor) -> Tensor | list[list[str]]:
    """Pictures or texts at row numbers int64 [q, 1 + k]."""
    return shown[rows] if isinstance(shown, Tensor) else [[shown[i] for i in row] for row in rows.tolist()]


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
