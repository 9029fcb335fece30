"""The files of TensorBoard's embedding projector.

    <folder>/projector_config.pbtxt      which embeddings there are
    <folder>/projector/<name>/           vectors.tsv, labels.tsv, sprite.png; texts stand beside the labels

torch's `add_embedding` forgets the embeddings of earlier processes when a run is resumed; here the list is what lies
on the disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_dist.safe_text import printable

THUMBNAIL_PX = 32


def write_projector(
    folder: Path, name: str, h: Tensor, shown: Tensor | Sequence[str] | None, labels: Sequence[str]
) -> None:
    """Adds the embedding `name`: h [n, D], n labels, and n thumbnails uint8 [n, S, S, 3], n texts or nothing."""
    what = "images" if isinstance(shown, Tensor) else "texts"
    numbers = {"vectors": len(h), "labels": len(labels)} | ({} if shown is None else {what: len(shown)})
    if len(set(numbers.values())) > 1:
        found = ", ".join(f"{number} {what}" for what, number in numbers.items())
        raise ValueError(f"{found} do not fit together")
    place = folder / "projector" / name
    place.mkdir(parents=True, exist_ok=True)
    np.savetxt(place / "vectors.tsv", h.float().cpu().numpy(), fmt="%.5g", delimiter="\t")
    lines = [_cell(label) for label in labels]
    if isinstance(shown, Tensor):
        _sprite(shown).save(place / "sprite.png")
    elif shown is not None:
        lines = ["label\ttext", *(f"{line}\t{_cell(text)}" for line, text in zip(lines, shown, strict=True))]
    (place / "labels.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    entries = [
        f'embeddings {{\n  tensor_name: "{path.name}"\n  tensor_path: "projector/{path.name}/vectors.tsv"\n'
        f'  metadata_path: "projector/{path.name}/labels.tsv"\n'
        f"{_sprite_entry(path)}}}\n"
        for path in sorted((folder / "projector").iterdir(), reverse=True)  # the newest opens first
        if re.fullmatch(r"[\w.-]+", path.name)
    ]
    (folder / "projector_config.pbtxt").write_text("".join(entries), encoding="utf-8")


def _cell(text: str) -> str:
    """A single column has no header. TensorBoard skips empty lines, and the labels after one would move up."""
    return printable(" ".join(text.split())) or "(no name)"


def _sprite_entry(path: Path) -> str:
    if not (path / "sprite.png").exists():
        return ""
    return (
        f'  sprite {{\n    image_path: "projector/{path.name}/sprite.png"\n'
        f"    single_image_dim: {THUMBNAIL_PX}\n    single_image_dim: {THUMBNAIL_PX}\n  }}\n"
    )


def _sprite(images: Tensor) -> Image.Image:
    """Thumbnails in a square, row by row."""
    side = math.ceil(math.sqrt(len(images)))
    sprite = Image.new("RGB", (side * THUMBNAIL_PX, side * THUMBNAIL_PX), "white")
    for i, image in enumerate(images.cpu().numpy()):
        thumbnail = Image.fromarray(image).resize((THUMBNAIL_PX, THUMBNAIL_PX))
        sprite.paste(thumbnail, (i % side * THUMBNAIL_PX, i // side * THUMBNAIL_PX))
    return sprite
