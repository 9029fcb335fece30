"""What a picture goes through before an exported encoder: resized, cropped, normalised, as in our evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from simclr_dist.data.decode.crops import EVALUATION_SHARE
from simclr_dist.pixel_format import RGB, PixelFormat


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side is resized to `resize_to` (bilinear, antialiased), then the central S x S is taken.

    crop_share: how much of the shorter side that is: 0.875, or 1 for data whose pictures are S x S, which an evaluation
        leaves whole.
    """

    image_size: int
    crop_share: float = EVALUATION_SHARE
    pixels: PixelFormat = RGB

    @property
    def mean(self) -> tuple[float, ...]:
        return self.pixels.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.pixels.std

    @property
    def resize_to(self) -> int:
        return round(self.image_size / self.crop_share)

    def sentence(self) -> str:
        S, largest = self.image_size, self.pixels.largest
        return f"the shorter side resized to {self.resize_to}, the central {S} x {S}, (x / {largest} - mean) / std"
