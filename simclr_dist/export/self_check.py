"""An export is read back before it gets its name, and must give the same h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ReadBack = Callable[[Tensor], Tensor]
"""Normalised images [n, C, H, W] to h [n, D], by what was written."""


@torch.no_grad()
def check_same_outputs(
    encoder: nn.Module, read_back: ReadBack, size: int | tuple[int, int], *, tolerance: float = 1e-4, channels: int = 3
) -> None:
    """RuntimeError unless both give the same h [n, D] for fixed random images, relative to the largest value.

    size: the side of the images, or height and width.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    expected, found = encoder(images), read_back(images)
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"self-check failed: the exported encoder differs by {difference:g}; nothing was written")
