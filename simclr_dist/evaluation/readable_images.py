"""The images of a source that can be read. One that cannot is left out of an evaluation, which says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.config import DataConfig
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import LoaderName
from simclr_dist.evaluation.features import Features, ImageBatch
from simclr_dist.parallel import distributed


@dataclass
class ReadableImages:
    """Loads images of `source` by their numbers. reasons: why images of the last call are missing."""

    source: str
    image_size: int
    batch_size: int
    num_threads: int | None = None
    loader: LoaderName = "auto"
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: str, data: DataConfig, batch_size: int) -> ReadableImages:
        """As the section `data` says. Its loader is the training images'; others may be of another kind."""
        loader: LoaderName = "folder" if data.loader == "folder" else "auto"
        return cls(source, data.image_size, batch_size, data.num_threads, loader)

    def __call__(self, ids: NDArray[np.int64]) -> Iterator[ImageBatch]:
        self.reasons = {}
        return load_images(
            self.source,
            self.image_size,
            batch_size=self.batch_size,
            ids=ids,
            num_threads=self.num_threads,
            loader=self.loader,
            unreadable=self.reasons,
        )

    def left_out(self, ids: NDArray[np.int64], features: Features, device: torch.device | str) -> str:
        """A sentence about the images of `ids` that `features` lacks, empty if there are none. All ranks together."""
        missing = np.setdiff1d(ids, features.sample_ids.numpy())
        if not len(missing):
            return ""
        said = distributed.first_text(self.reasons.get(int(missing[0])), device)
        why = f"; the first, number {missing[0]}: {said[1]}" if said else f"; the first is number {missing[0]}"
        return (
            f"{len(missing):,} of {len(ids):,} images of {self.source} cannot be read and are left out of the "
            f"evaluation{why}"
        )
