"""A first convolution that whitens: its filters are the principal axes of the images' own patches.

Neighbouring pixels are nearly equal, so almost all variance of a patch lies along a few smooth patterns. Filters that
divide each pattern by its spread give the network all of them with equal strength from the first step on (Coates and
Ng, "Learning Feature Representations with K-means", 2012; Jordan, arXiv:2404.00498). No label is used.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.errors import ConfigError

NUM_IMAGES = 5000
"""Images whose patches are looked at."""
NOISE = 0.0022
"""Added to each variance, of patches in units of the channels' deviation: axes below it are noise of JPEG files."""
_ROWS, _NUMBERS = 1 << 21, 1 << 27  # of a part; the numbers take 1 GiB


def first_convolution(encoder: nn.Module, name: str) -> nn.Conv2d:
    """The layer that sees the pixels. Raises ConfigError where there is none that could be whitened."""
    layers = (m for m in encoder.modules() if not [*m.children()] and [*m.parameters()])
    first = next(layers, None)
    if isinstance(first, nn.Conv2d) and first.groups == 1:
        return first
    raise ConfigError(
        [
            f"model.first_layer: whitened needs an encoder that begins with a convolution; {name} begins with "
            f"{type(first).__name__}: use `first_layer: random`"
        ]
    )


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor, std: tuple[float, ...], largest: int = 255) -> int:
    """Sets the filters to whitening ones and their negatives, as many as fit; further filters stay as they are.

    images: uint8 or uint16 [n, H, W, C], as many as are needed for stable statistics (`NUM_IMAGES`).
    std: of each channel, in units of the largest value; by these the network's input has been divided.
    Returns how many filters were set. The number of threads makes no difference: all sums are of integers, and exact.
    """
    weight = convolution.weight
    filters = torch.from_numpy(_whitening_filters(images, (int(weight.shape[2]), int(weight.shape[3])), std, largest))
    num = min(len(filters), len(weight) // 2)
    weight[:num] = filters[:num].to(weight)
    weight[num : 2 * num] = -filters[:num].to(weight)
    return 2 * num


def _whitening_filters(
    images: Tensor, kernel: tuple[int, int], std: tuple[float, ...], largest: int
) -> NDArray[np.float64]:
    """[C*h*w, C, h, w], those of the largest variance first; a filter's answer to a patch has a variance near 1."""
    covariance = _covariance(images, kernel)
    C = images.shape[3]
    scale = largest * np.repeat(np.asarray(std, np.float64), kernel[0] * kernel[1])
    variances, axes = np.linalg.eigh(covariance / scale / scale[:, None])
    filters = (axes / np.sqrt(np.maximum(variances, 0) + NOISE)).T[::-1]
    # An axis has no sign: its largest entry is taken to be positive.
    signs = np.sign(np.take_along_axis(filters, np.abs(filters).argmax(1)[:, None], 1))
    return np.ascontiguousarray(filters * signs).reshape(-1, C, *kernel)


def _covariance(images: Tensor, kernel: tuple[int, int]) -> NDArray[np.float64]:
    """Of patches that do not overlap, [C*h*w, C*h*w], in the order of a filter's weights, for values as stored.

    Products of pixels are integers of at most 32 bits. float64 adds them without rounding up to 2^53, so 2^21 patches
    of a part; the parts are added as int64, up to 2^31 patches.
    """
    h, w = kernel
    length = images.shape[3] * h * w
    of_image = max(1, (images.shape[1] // h) * (images.shape[2] // w))
    total, products = np.zeros(length, np.int64), np.zeros((length, length), np.int64)
    count = 0
    for part in images.split(max(1, min(512, _ROWS // of_image, _NUMBERS // (of_image * length)))):
        patches = part.permute(0, 3, 1, 2).unfold(2, h, h).unfold(3, w, w)  # [n, C, rows, columns, h, w]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, length).numpy().astype(np.float64)
        total += rows.sum(0).astype(np.int64)
        products += (rows.T @ rows).astype(np.int64)
        count += len(rows)
    mean = total / count
    return products / count - mean[:, None] * mean
