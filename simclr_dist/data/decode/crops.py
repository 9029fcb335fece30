"""Where to crop: tables of (top, left, height, width, flip), drawn by key, the same for every decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.randomness import CROP, FLIP, keys, uniform

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
_LOG_RATIOS = (math.log(_ASPECT_RATIOS[0]), math.log(_ASPECT_RATIOS[1]))
EVALUATION_SHARE = 0.875  # torchvision's ImageNet evaluation: shorter side to 256, then the central 224


def random_crops(
    keys: NDArray[np.uint64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    *,
    scale_min: float,
    flip_p: float,
) -> NDArray[np.int32]:
    """Inception-style crops [..., 5] for keys [...]: the rule of torchvision's RandomResizedCrop, then a flip.

    heights and widths broadcast against keys. Area share uniform in [scale_min, 1], ratio log-uniform in [3/4, 4/3],
    ten tries, then the largest central crop of an allowed ratio.
    """
    shape = keys.shape
    keys = keys.reshape(-1)
    H, W = (np.broadcast_to(side, shape).reshape(-1).astype(np.float64) for side in (heights, widths))
    table = np.empty((len(keys), 5), np.int32)
    compiled = _compiled()
    if compiled is None:
        draw_crops(keys, H, W, scale_min, flip_p, table)
    else:
        compiled(keys, H, W, scale_min, flip_p, _TRIES, _ASPECT_RATIOS, _LOG_RATIOS, table)
    return table.reshape(*shape, 5)


@cache
def _compiled() -> Callable[..., None] | None:
    """None without numba."""
    try:
        from simclr_dist.data.decode.compiled_crops import draw_crops
    except ImportError:
        return None
    return draw_crops


def draw_crops(
    keys: NDArray[np.uint64],
    H: NDArray[np.float64],
    W: NDArray[np.float64],
    scale_min: float,
    flip_p: float,
    table: NDArray[np.int32],
) -> None:
    """Fills table [n, 5] for keys, heights H and widths W [n]: `compiled_crops` in numpy."""
    waiting = np.arange(len(keys))
    for attempt in range(_TRIES):
        key, h_max, w_max = keys[waiting], H[waiting], W[waiting]
        share, ratio, top, left = (uniform(key, CROP + 4 * attempt + i) for i in range(4))
        area = h_max * w_max * (scale_min + (1.0 - scale_min) * share)
        aspect = _exp(_LOG_RATIOS[0] + (_LOG_RATIOS[1] - _LOG_RATIOS[0]) * ratio)
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= w_max) & (h > 0) & (h <= h_max)
        i, j = np.floor(top * (h_max - h + 1)), np.floor(left * (w_max - w + 1))
        table[waiting[fits], :4] = np.stack([i, j, h, w], axis=1)[fits]
        waiting = waiting[~fits]
        if not len(waiting):
            break
    if len(waiting):
        h_max, w_max = H[waiting], W[waiting]
        # For an image one or two pixels wide the rule may give 0; a crop has at least one pixel.
        h = np.maximum(np.minimum(h_max, np.rint(w_max / _ASPECT_RATIOS[0])), 1)
        w = np.maximum(np.minimum(w_max, np.rint(h_max * _ASPECT_RATIOS[1])), 1)
        table[waiting, :4] = np.stack([(h_max - h) // 2, (w_max - w) // 2, h, w], axis=1)
    table[:, 4] = uniform(keys, FLIP) < flip_p


def keyed_crops(
    seed: int, epoch: int, *, num_views: int, scale_min: float, flip_p: float
) -> Callable[[NDArray[np.int64]], Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32]]]:
    """The random crops [V, b, 5] of sample ids [b], once their heights and widths are known."""

    def of_images(ids: NDArray[np.int64]) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32]]:
        view_keys = keys(seed, epoch, ids[None], np.arange(num_views)[:, None])
        return lambda heights, widths: random_crops(view_keys, heights, widths, scale_min=scale_min, flip_p=flip_p)

    return of_images


def center_crops(heights: NDArray[np.int64], widths: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    """The crops [b, 5] of an evaluation: the central square of 0.875 of the shorter side.

    Images of `size` x `size` stay whole.
    """
    shorter = np.minimum(heights, widths)
    side = np.maximum(np.rint(EVALUATION_SHARE * shorter).astype(np.int64), 1)
    side = np.where((heights == size) & (widths == size), size, side)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side, np.zeros_like(side)], 1).astype(np.int32)


def center_crop_of_share(height: int, width: int, share: float) -> tuple[int, int, int]:
    """(top, left, side) of the central square of that share of the shorter side."""
    side = max(round(share * min(height, width)), 1)
    return (height - side) // 2, (width - side) // 2, side


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp for |x| < 0.3 by additions and multiplications only, so that the last bit is the same on every CPU."""
    result = np.ones_like(x)
    for n in range(14, 0, -1):
        result = 1.0 + x * result / n
    return result
