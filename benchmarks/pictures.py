"""Computed JPEG pictures of the size of Imagenette's, for measuring where the data set cannot be had.

    python -m benchmarks.pictures FOLDER [--images 1024] [--width 500] [--height 375]

Coloured waves with noise, in a folder for each class, about as many bytes as a photograph: decoding and cropping cost
what they cost for Imagenette (500 x 375 pixels are usual there). Nothing can be learned from an accuracy on them.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10


def picture(number: int, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.zeros((height, width, 3), np.float32)
    for _ in range(4):
        wave = np.sin(generator.uniform(-0.1, 0.1) * x + generator.uniform(-0.1, 0.1) * y + generator.uniform(0, 6))
        pixels += wave[..., None] * generator.uniform(-40, 40, 3).astype(np.float32)
    pixels += 128 + generator.normal(0, 6, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, images: int, width: int, height: int) -> None:
    def write(number: int) -> None:
        picture(number, width, height).save(folder / f"class{number % NUM_CLASSES}" / f"{number:05}.jpg", quality=85)

    for c in range(NUM_CLASSES):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    args = parser.parse_args()
    write_pictures(args.folder, args.images, args.width, args.height)


if __name__ == "__main__":
    main()
