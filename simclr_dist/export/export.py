"""Writes a trained encoder to a file that others can load, and a model card beside it.

Before the file gets its name it is read back, and the outputs of that network must be those of the encoder in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from simclr_dist.atomic import replace_text, replaces
from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.errors import ExportError
from simclr_dist.export.card import instructions, render_card
from simclr_dist.export.formats import write_onnx, write_safetensors, write_torchvision

Format = Literal["torchvision", "safetensors", "onnx"]
SUFFIXES: dict[Format, str] = {"torchvision": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """The file, its card, the Python lines that load it, and what a user has to know."""

    path: Path
    card: Path
    load_with: str
    notes: tuple[str, ...]


def export(
    source: Source,
    out: str | Path,
    *,
    format: Format = "torchvision",
    license: str = "unspecified",
    accuracy: Mapping[str, float] | None = None,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the encoder of a run or checkpoint to `out`, and its card to `out` + ".md".

    accuracy: measured figures for the card, e.g. {"kNN top-1": 0.83}; shares between 0 and 1.
    Raises CheckpointError: no valid checkpoint. ExportError: `out` or its card exists, or the format does not know the
    encoder. RuntimeError: the self-check failed; nothing was written.
    """
    out = Path(out)
    card = out.with_name(out.name + ".md")
    if not overwrite:
        for path in (out, card):
            if path.exists():
                raise ExportError(f"{path} exists; choose another name with --out, or --overwrite it")
    model, checkpoint = load_pretrained(source, warn)
    writers: dict[Format, Callable[..., Callable[[Tensor], Tensor]]]
    writers = {"torchvision": write_torchvision, "safetensors": write_safetensors, "onnx": write_onnx}
    with replaces(out) as temporary:
        read_back = writers[format](model.encoder, model.feature_dim, checkpoint, license, temporary)
        check_same_outputs(model.encoder, read_back, checkpoint.config.data.image_size)
    load_with, notes = instructions(
        checkpoint.config.model, checkpoint.config.data.image_size, model.feature_dim, format, out.name
    )
    replace_text(card, render_card(checkpoint, model.feature_dim, load_with, notes, license, accuracy or {}))
    return Exported(out, card, load_with, notes)


@torch.no_grad()
def check_same_outputs(encoder: nn.Module, read_back: Callable[[Tensor], Tensor], image_size: int) -> None:
    """RuntimeError unless both give the same h [n, D] for fixed random images, at float32 accuracy."""
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    expected, found = encoder(images), read_back(images)
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"self-check failed: the exported encoder differs by {difference:g}; nothing was written")
