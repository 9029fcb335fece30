"""`simclr_dist.train` with lightly's views and loss instead of ours: the control of five_minutes.py. Needs lightly.

Their transform takes decoded images, so what our loader has cropped is not used; its cost is small beside theirs.
"""

from __future__ import annotations

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor

from benchmarks.accuracy_vs_lightly import LIGHTLY
from simclr_dist import train
from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.trainer import Trainer


class LightlyTrainer(Trainer):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._transform = SimCLRTransform(input_size=config.data.image_size, **LIGHTLY)
        self._source = BetonSource(config.data.train)
        loss = NTXentLoss(config.loss.temperature, gather_distributed=self.parts.world.size > 1)
        self.augment = self._views
        self.nt_xent = lambda z, ids: loss(*z.chunk(2))

    def _views(self, batch: Batch) -> Tensor:
        """[2, B, 3, S, S]. Theirs draw from torch's and Python's generators, not by key."""
        pairs = [self._transform(Image.fromarray(np.array(self._source.read(i)))) for i in batch.host_ids.tolist()]
        return torch.stack([torch.stack(views) for views in zip(*pairs, strict=True)])


if __name__ == "__main__":
    train.main(trainer_class=LightlyTrainer)
