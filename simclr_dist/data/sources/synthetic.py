"""Computed images for smoke tests: deterministic, and with classes that can be learned."""

from __future__ import annotations

import numpy as np

from simclr_dist.data.randomness import keys, uniform
from simclr_dist.data.sources.images import ArrayImages

NUM_CLASSES = 10
_COMPONENTS = 3


def synthetic_images(num_samples: int = 512, side: int = 40) -> ArrayImages:
    """Coloured waves: a class is a set of wave directions and colours, a sample shifts them and adds noise."""
    ids = np.arange(num_samples)
    labels = ids % NUM_CLASSES
    of_class = uniform(keys(0, 0, np.arange(NUM_CLASSES)[:, None], 0), np.arange(6 * _COMPONENTS)[None])
    of_class = of_class.reshape(NUM_CLASSES, _COMPONENTS, 6)[labels]  # frequency x, y, colour r, g, b, and rest
    of_sample = uniform(keys(0, 1, ids[:, None], 0), np.arange(_COMPONENTS)[None])
    y, x = np.mgrid[:side, :side] / side
    fx, fy = (of_class[..., i, None, None] * 6 - 3 for i in range(2))
    phase = of_sample[..., None, None]
    waves = np.sin(2 * np.pi * (fx * x + fy * y + phase))  # [n, components, side, side]
    images = np.einsum("nkyx,nkc->nyxc", waves, of_class[..., 2:5] - 0.5)
    noise = uniform(keys(0, 2, ids[:, None], 0), np.arange(side * side * 3)[None]).reshape(images.shape)
    images = 127.5 + 90 * images + 24 * (noise - 0.5)
    names = tuple(f"wave {i}" for i in range(NUM_CLASSES))
    return ArrayImages("synthetic", names, labels.astype(np.int64), np.clip(images, 0, 255).astype(np.uint8))
