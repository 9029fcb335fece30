"""What an encoder eats, as far as trying, counting and planning need it: random ones of the right shape will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)
Draw = Callable[[int], Tensor]
"""n -> n inputs [n, ...] on the CPU, random by torch's generator."""


@dataclass(frozen=True)
class Inputs:
    """Those of one kind and size."""

    what: str
    """For messages: `images`, `vectors`."""
    size: str
    """And how large they are: `32 px`, `765 numbers`."""
    draw: Draw
    others: Mapping[str, Draw] = field(default_factory=dict)
    """By the setting that gives them: what to propose where an encoder cannot take these."""

    mean: Draw | None = None
    """Where their size varies: inputs of mean size, of which operations are counted. `draw` gives the largest."""

    def example(self, n: int, seed: int = 0) -> Tensor:
        """[n, ...] on the CPU, the same for the same seed. Torch's generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.draw(n)


def images(size: int, channels: int = 3) -> Inputs:
    """Normalised images [n, channels, size, size]."""

    def of_side(side: int) -> Draw:
        return lambda n: torch.randn(n, channels, side, side)

    others = {f"data.image_size={side}": of_side(side) for side in USUAL_SIZES if side != size}
    what = f"{size} px" if channels == 3 else f"{size} px and {channels} channel{'s' if channels > 1 else ''}"
    return Inputs("images", what, of_side(size), others)
