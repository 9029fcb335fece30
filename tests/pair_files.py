"""Small folders of pairs, as `prepare` writes them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_dist.data.pairs.prepare import prepare_image_text, prepare_text_pairs
from simclr_dist.data.tokens.texts import Columns

COLOURS = "red", "green", "blue", "grey"
VOCABULARY = 300


def write_rows(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_image(path: Path, seed: int) -> None:
    """Noise of the colour `seed % 4`."""
    noise = np.random.default_rng(seed).integers(0, 120, (16, 16, 3))
    noise[..., seed % 4 % 3] += 100 if seed % 4 < 3 else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.astype(np.uint8)).save(path)


def image_text(folder: Path, n: int = 96) -> Path:
    """n images in four classes. Image 2 is image 1 again, and image 3 shares a text with image 4."""
    rows = [("name", "text")]
    for i in range(n):
        name = f"{COLOURS[i % 4]}/{i}.png"
        write_image(folder / "images" / name, 1 if i == 2 else i)
        rows.append((name, f"picture {i} is all {COLOURS[i % 4]}"))
        if i % 2 == 0:
            rows.append((name, f"{COLOURS[i % 4]} noise, number {i}"))
    rows += [("grey/3.png", "the very same text"), ("red/4.png", "The very same text ")]
    table = write_rows(folder / "texts.csv", *rows)
    columns = Columns(("name", "text"))
    prepare_image_text(
        table, folder / "pairs", images=folder / "images", columns=columns, vocabulary_size=VOCABULARY, num_workers=1
    )
    return folder / "pairs"


def text_pairs(folder: Path, n: int = 96) -> Path:
    """n pairs. Pairs 0 and 1 have the same first text, 1 and 2 the same second one."""
    rows = [("a", "b")]
    for i in range(n):
        first = f"what is number {i} and its colour" if i != 1 else rows[1][0]
        second = f"number {i} is {COLOURS[i % 4]}" if i != 2 else rows[2][1]
        rows.append((first, second))
    folder.mkdir(parents=True, exist_ok=True)
    table = write_rows(folder / "texts.csv", *rows)
    prepare_text_pairs(table, folder / "pairs", columns=Columns(("a", "b")), vocabulary_size=VOCABULARY)
    return folder / "pairs"
