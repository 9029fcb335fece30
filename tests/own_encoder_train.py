"""`simclr_dist.train` with encoders of its own: `with_spare` has a layer that nothing uses, `broken` cannot run,
`plain` has no BatchNorm."""

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


def plain(config: ModelConfig) -> tuple[nn.Module, int]:
    w = config.width
    first, second = nn.Conv2d(3, w, 3, stride=2, padding=1), nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2 * w


register("with_spare", with_spare)
register("broken", broken)
register("plain", plain)

if __name__ == "__main__":
    train.main()
