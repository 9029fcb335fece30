"""The samples of a source that can be read. One that cannot is left out of an evaluation, which says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.evaluation.features import Features, ImageBatch
from simclr_dist.kinds import Kind
from simclr_dist.parallel import distributed


@dataclass
class ReadableImages:
    """Loads samples of `source` by their numbers. reasons: why samples of the last call are missing."""

    kind: Kind
    source: str
    batch_size: int
    reasons: dict[int, str] = field(default_factory=dict)

    def __call__(self, ids: NDArray[np.int64]) -> Iterator[ImageBatch]:
        self.reasons = {}
        return self.kind.evaluation_batches(self.source, ids, self.batch_size, self.reasons)

    def left_out(self, ids: NDArray[np.int64], features: Features, device: torch.device | str) -> str:
        """A sentence about the samples of `ids` that `features` lacks, empty if there are none. All ranks together."""
        missing = np.setdiff1d(ids, features.sample_ids.numpy())
        if not len(missing):
            return ""
        said = distributed.first_text(self.reasons.get(int(missing[0])), device)
        why = f"; the first, number {missing[0]}: {said[1]}" if said else f"; the first is number {missing[0]}"
        return (
            f"{len(missing):,} of {len(ids):,} {self.kind.noun}s of {self.source} cannot be read and are left out of "
            f"the evaluation{why}"
        )
