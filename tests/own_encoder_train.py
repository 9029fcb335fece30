"""`simclr_dist.train` with encoders of its own: `with_spare` has a layer that nothing uses, `broken` cannot run,
`flat` has an h of one dimension."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simclr_dist import train
from simclr_dist.config import ModelConfig
from simclr_dist.network.encoders import SmallResNet, register


class WithSpare(SmallResNet):
    def __init__(self) -> None:
        super().__init__(8, stride=2)
        self.spare = nn.Linear(3, 3)


class Broken(SmallResNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) @ torch.eye(7)


def with_spare(config: ModelConfig) -> tuple[nn.Module, int]:
    return WithSpare(), 32


def broken(config: ModelConfig) -> tuple[nn.Module, int]:
    return Broken(8, stride=2), 32


class Flat(SmallResNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(1, keepdim=True).expand(-1, self.feature_dim)


def flat(config: ModelConfig) -> tuple[nn.Module, int]:
    return Flat(8, stride=2), 32


register("with_spare", with_spare)
register("broken", broken)
register("flat", flat)

if __name__ == "__main__":
    train.main()
