"""Your own encoder, views and loss, in a script that uses simclr_dist. docs/guides/extending.md explains.

    python examples/own_parts.py train configs/smoke.yaml model.encoder=patches name=own
    python examples/own_parts.py evaluate knn runs/own
    accelerate launch examples/own_parts.py train configs/smoke.yaml model.encoder=patches name=own

Evaluating or exporting the run needs the encoder too, so this script also runs every other command of simclr-dist.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist import cli, train
from simclr_dist.config import Config, ModelConfig
from simclr_dist.data import Batch
from simclr_dist.data.randomness import keys, uniform
from simclr_dist.network import encoders
from simclr_dist.parallel import distributed
from simclr_dist.trainer import Trainer

# ---------------------------------------------------------------------------------------------------------------------
# An encoder: anything from images [n, 3, S, S] to h [n, D]


class Mixing(nn.Module):
    """Mixes neighbouring patches, then channels (after ConvMixer, Trockman & Kolter 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = nn.Sequential(nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GELU())
        self.within = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.within(x + self.across(x))


def patches(config: ModelConfig) -> tuple[nn.Module, int]:
    """The network, and D. `config` is the section `model`; BatchNorm becomes global automatically."""
    D = 4 * config.width
    network = nn.Sequential(
        nn.Conv2d(3, D, kernel_size=4, stride=4), Mixing(D), Mixing(D), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return network, D


encoders.register("patches", patches)  # from here on `model.encoder: patches` builds this network


# ---------------------------------------------------------------------------------------------------------------------
# Views: a Batch to float views [2, B, 3, S, S]

HIDE_TOP, HIDE_LEFT = 1000, 1001  # draw numbers from 1000 on are free for your use


class Occluded(nn.Module):
    """The configured views, each with a square of a quarter of its side hidden.

    Its position is a hash of seed, epoch, sample and view: the same for any number of processes, and after a resume.
    """

    def __init__(self, augment: nn.Module, seed: int) -> None:
        super().__init__()
        self.augment, self.seed = augment, seed

    def forward(self, batch: Batch) -> Tensor:
        views = self.augment(batch)
        side = views.shape[-1] // 4
        key = keys(self.seed, batch.epoch, batch.host_ids[None], np.arange(2)[:, None])  # [2, B]
        positions = [(uniform(key, draw) * (views.shape[-1] - side)).astype(int) for draw in (HIDE_TOP, HIDE_LEFT)]
        for (view, image), top in np.ndenumerate(positions[0]):
            left = positions[1][view, image]
            views[view, image, :, top : top + side, left : left + side] = 0
        return views


# ---------------------------------------------------------------------------------------------------------------------
# A loss: z [2B, K], all of view 0 first, and sample_ids [B], to the loss of the global batch


class AlignmentAndUniformity(nn.Module):
    """Wang & Isola 2020, with t = 2: positives near each other, all rows spread over the sphere.

    DDP averages the gradients of the ranks, so a rank must return W times its part of the global gradient.
    """

    def forward(self, z: Tensor, sample_ids: Tensor) -> Tensor:
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        view0, view1 = z.chunk(2)
        alignment = (view0 - view1).square().sum(1).mean()  # DDP's average of the ranks' means is the global mean

        W, first = distributed.world_size(), distributed.rank() * len(z)
        everyone = distributed.all_gather(z)  # carries no gradient
        itself = torch.arange(len(everyone), device=z.device) == first + torch.arange(len(z), device=z.device)[:, None]
        kernel = torch.exp(4 * (z @ everyone.T - 1)).masked_fill(itself, 0)  # exp(-2 |x - y|^2)
        total = distributed.all_reduce_sum_(kernel.detach().sum())
        uniformity = torch.log(total / (len(everyone) * (len(everyone) - 1)))
        # The gradient of log(total). Each pair is in the sums of both of its rows; a rank sums its own only: hence 2.
        share = 2 * W * kernel.sum() / total
        value = distributed.all_reduce_sum_(alignment.detach().clone()) / W + uniformity
        return value + (alignment + share - (alignment + share).detach())


class OwnTrainer(Trainer):
    """The trainer with other views and another loss."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.augment = Occluded(self.augment, config.seed)
        self.nt_xent = AlignmentAndUniformity()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "train":
        train.main(arguments, OwnTrainer)
    else:
        cli.main([command, *arguments])
