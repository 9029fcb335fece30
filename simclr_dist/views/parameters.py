"""What is done to the colours of each view: drawn on the host by key, so the same on any device and for any world size.

Letters: B images, V views of each, n views in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data import randomness
from simclr_dist.data.randomness import keys, uniform
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views.presets import Augmentation


class Column(IntEnum):
    """Of `Parameters.table`. The first four are the operations of the jitter, and number them in its order."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    ORDER = 4
    """And the three columns after it: the operations, first to last; -1: no jitter."""
    SIGMA = 8
    """0: no blur."""
    GRAYSCALE = 9
    SOLARIZE = 10


NUM_COLUMNS = 11

# The 24 orders in which the operations of the jitter can be applied.
_ORDERS = np.array([p for p in np.ndindex(4, 4, 4, 4) if len(set(p)) == 4])


@dataclass(frozen=True)
class Parameters:
    """The parameters of each of V*B views, view 0 of all images first; drawn by `draw_parameters`.

    brightness, contrast, saturation: factors, as torchvision's adjust_*. hue: turns, in [-0.5, 0.5].
    of_channels: [V*B, 2, C], brightness and contrast of each channel in place of the common ones, of images other
    than RGB, which have no saturation and no hue; C is 0 for RGB.
    order: [V*B, 4], the order of brightness 0, contrast 1, saturation 2, hue 3. sigma: of the blur, in pixels.
    The others say which views are changed.
    """

    jitter: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    order: NDArray[np.int64]
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarize: NDArray[np.bool_]
    of_channels: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2, 0)))

    def table(self) -> NDArray[np.float64]:
        """All of them as the kernels read them, [V*B, NUM_COLUMNS]: see `Column`."""
        factors = self.brightness, self.contrast, self.saturation, self.hue
        order = np.where(self.jitter[:, None], self.order, -1).T
        sigma = np.where(self.blur, self.sigma, 0)
        return np.stack([*factors, *order, sigma, self.grayscale, self.solarize], axis=1)


def draw_parameters(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    sample_ids: NDArray[np.int64],
    num_views: int = 2,
    pixels: PixelFormat = RGB,
) -> Parameters:
    """The parameters of all views of `sample_ids` [B]; those of a view depend on seed, epoch, id and its number."""
    V, B = num_views, len(sample_ids)
    key = keys(seed, epoch, sample_ids[None], np.arange(V)[:, None]).reshape(V * B)
    kind = (np.arange(V) % 2).repeat(B)

    def chance(draw: int, p: tuple[float, float]) -> NDArray[np.bool_]:
        return uniform(key, draw) < np.array(p)[kind]

    def between(draw: int, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(key, draw)

    def of_channels(first_draw: int, change: float) -> NDArray[np.float64]:
        draws = range(first_draw, first_draw + pixels.channels)
        return np.stack([between(draw, max(0.0, 1 - change), 1 + change) for draw in draws], axis=1)

    b, c, s, h = augmentation.jitter
    each = [(randomness.BRIGHTNESS_OF_CHANNEL, b), (randomness.CONTRAST_OF_CHANNEL, c)]
    return Parameters(
        jitter=chance(randomness.JITTER, (augmentation.jitter_p,) * 2) & (max(augmentation.jitter) > 0),
        brightness=between(randomness.BRIGHTNESS, max(0.0, 1 - b), 1 + b),
        contrast=between(randomness.CONTRAST, max(0.0, 1 - c), 1 + c),
        saturation=between(randomness.SATURATION, max(0.0, 1 - s), 1 + s),
        hue=between(randomness.HUE, -h, h),
        order=_ORDERS[(uniform(key, randomness.JITTER_ORDER) * len(_ORDERS)).astype(np.int64)],
        grayscale=chance(randomness.GRAYSCALE, (augmentation.grayscale_p,) * 2),
        blur=chance(randomness.BLUR, augmentation.blur_p),
        sigma=between(randomness.BLUR_SIGMA, *augmentation.blur_sigma),
        solarize=chance(randomness.SOLARIZE, augmentation.solarize_p),
        of_channels=np.empty((V * B, 2, 0)) if pixels.rgb else np.stack([of_channels(*one) for one in each], axis=1),
    )
