"""Images without an encoder: as features to compare with, and as small pictures to look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.pixel_format import PixelFormat


class Pixels(nn.Module):
    """The pixels as features: the baseline that an encoder has to beat.

    Normalised per channel as the encoder sees them (so that cosine similarity does not only measure brightness),
    averaged down to `max_side` when larger, flattened to [n, 3 * side * side]. On CIFAR-10 (JPEG q75) the
    linear probe is as good at 8 px as at 12 (docs/results.md), in a third of the time.
    """

    def __init__(self, max_side: int = 8) -> None:
        super().__init__()
        self.max_side = max_side

    def forward(self, images: Tensor) -> Tensor:
        side = min(self.max_side, *images.shape[-2:])
        return F.adaptive_avg_pool2d(images, side).flatten(1)


def first_three(values: Tensor, dim: int, black: float = 0.0) -> Tensor:
    """Channels along `dim`, any number of them, as three: one is grey, two are red and green."""
    if values.shape[dim] == 1:
        return torch.cat([values] * 3, dim)
    if values.shape[dim] == 2:
        return torch.cat([values, torch.full_like(values.narrow(dim, 0, 1), black)], dim)
    return values.narrow(dim, 0, 3)


def as_picture(images: Tensor, pixels: PixelFormat) -> Tensor:
    """Images [b, S, S, C] as uint8 [b, S, S, 3]: others than 8-bit RGB from mean - 2 std to mean + 2 std."""
    if pixels.is_usual:
        return images
    values = images.float() / pixels.largest
    if not pixels.rgb:
        mean, std = torch.tensor(pixels.mean), torch.tensor(pixels.std)
        values = first_three((values - mean) / (4 * std) + 0.5, dim=-1)
    return values.clamp(0, 1).mul(255).round().to(torch.uint8)


def shrink(images: Tensor, largest_side: int) -> Tensor:
    """uint8 [b, S, S, 3], at most `largest_side` wide."""
    if images.shape[1] <= largest_side:
        return images
    small = F.interpolate(images.permute(0, 3, 1, 2).float(), size=largest_side, mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1)
