"""Images for the tests of the data path: deterministic, smooth like photographs, of awkward sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from simclr_dist.data.randomness import keys, uniform

SIZES = [(48, 64), (97, 31), (20, 20), (33, 120), (150, 110), (8, 9), (64, 64)]  # height, width


def make_image(i: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], a function of its arguments: waves of three frequencies, and a little noise."""
    wave = uniform(keys(1, 0, i, 0), np.arange(24)).reshape(3, 8)
    y, x = np.mgrid[:height, :width] / 32
    colour = np.zeros((height, width, 3))
    for fy, fx, phase, r, g, b, *_ in wave:
        # Triangles instead of sines: additions and products give the same bits on every CPU.
        colour += abs((fy * y + fx * x + phase) % 1 * 4 - 2)[..., None] * np.array([r, g, b]) - 0.5
    noise = uniform(keys(1, 1, i, 0), np.arange(height * width * 3)).reshape(height, width, 3)
    return np.clip(127 + 60 * colour + 12 * noise, 0, 255).astype(np.uint8)


def make_folder(root: Path, num_samples: int, suffix: str = ".png", num_classes: int = 3) -> list[np.ndarray]:
    """root/<class>/<number><suffix>; returns the images in the order in which they are found."""
    made = []
    for i in range(num_samples):
        path = root / f"class{i % num_classes}" / f"{i:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = make_image(i, *SIZES[i % len(SIZES)])
        Image.fromarray(pixels).save(path)
        made.append((path, pixels))
    return [pixels for _, pixels in sorted(made, key=lambda item: item[0])]
