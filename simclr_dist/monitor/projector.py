"""The files of TensorBoard's embedding projector.

    <folder>/projector_config.pbtxt      which embeddings there are
    <folder>/projector/<name>/           vectors.tsv, labels.tsv, sprite.png

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


def write_projector(folder: Path, name: str, h: Tensor, images: Tensor | None, labels: Sequence[str]) -> None:
    """Adds the embedding `name`: h [n, D], images uint8 [n, S, S, 3] for thumbnails or none, n labels."""
    numbers = {"vectors": len(h), "labels": len(labels)} | ({} if images is None else {"images": len(images)})
    if len(set(numbers.values())) > 1:
        found = ", ".join(f"{number} {what}" for what, number in numbers.items())
        raise ValueError(f"{found} do not fit together")
    place = folder / "projector" / name
    place.mkdir(parents=True, exist_ok=True)
    np.savetxt(place / "vectors.tsv", h.float().cpu().numpy(), fmt="%.5g", delimiter="\t")
    # A single column has no header. TensorBoard skips empty lines, and the labels after one would move up.
    lines = [printable(" ".join(label.split())) or "(no name)" for label in labels]
    (place / "labels.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if images is not None:
        _sprite(images).save(place / "sprite.png")
    entries = [
        f'embeddings {{\n  tensor_name: "{path.name}"\n  tensor_path: "projector/{path.name}/vectors.tsv"\n'
        f'  metadata_path: "projector/{path.name}/labels.tsv"\n'
        f"{_sprite_entry(path)}}}\n"
        for path in sorted((folder / "projector").iterdir(), reverse=True)  # the newest opens first
        if re.fullmatch(r"[\w.-]+", path.name)
    ]
    (folder / "projector_config.pbtxt").write_text("".join(entries), encoding="utf-8")


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
