"""What the pixels of a data set are: how many channels, of how many bits, and what the encoder sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

MOST_CHANNELS = 16
DEPTHS = (8, 16)


@dataclass(frozen=True)
class PixelFormat:
    """By default RGB with 8 bits, normalised by torchvision's statistics of ImageNet whatever the data set: the
    encoder's first BatchNorm absorbs the difference.

    rgb: whether the three channels are red, green and blue. mean, std: of each channel, in units of the largest value
    that `bits` can hold; the encoder eats (x / largest - mean) / std.
    """

    channels: int = 3
    bits: int = 8
    rgb: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= MOST_CHANNELS or self.bits not in DEPTHS:
            raise ValueError(f"{self}: expected 1 to {MOST_CHANNELS} channels of 8 or 16 bits")
        if self.rgb and self.channels != 3:
            raise ValueError(f"{self}: red, green and blue are three")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self}: mean has {len(self.mean)} numbers, std {len(self.std)}")
        if not (all(map(isfinite, (*self.mean, *self.std))) and min(self.std) > 0):
            raise ValueError(f"{self}: mean {self.mean} and std {self.std} must be finite, std above 0")

    def __str__(self) -> str:
        if self.rgb:
            return f"RGB of {self.bits} bits"
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.bits} bits"

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    @property
    def is_usual(self) -> bool:
        """RGB of 8 bits, which every source, decoder and kernel knows."""
        return self.rgb and self.bits == 8

    def has_pixels_of(self, other: PixelFormat) -> bool:
        """Whether the same numbers mean the same, but for the statistics."""
        return (self.channels, self.bits) == (other.channels, other.bits)

    def to_json(self) -> dict[str, Any]:
        statistics = {"mean": list(self.mean), "std": list(self.std)}
        return {"channels": self.channels, "bits": self.bits, "rgb": self.rgb, **statistics}

    @classmethod
    def from_json(cls, found: Any) -> PixelFormat:
        """Raises ValueError for anything that `to_json` did not give."""
        try:
            channels, bits, rgb = found["channels"], found["bits"], found["rgb"]
            if type(channels) is not int or type(bits) is not int or type(rgb) is not bool:
                raise TypeError("channels, bits or rgb is of another type")
            return cls(channels, bits, rgb, *(tuple(map(float, found[name])) for name in ("mean", "std")))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"no format of pixels: {error}") from None


def together(parts: Sequence[tuple[str, PixelFormat, float]]) -> PixelFormat:
    """That of several files as one: name, format and number of pixels of each. Mean and std are those of all pixels.

    Raises ValueError where their pixels differ.
    """
    name, first, _ = parts[0]
    for other_name, other, _ in parts[1:]:
        if not first.has_pixels_of(other):
            raise ValueError(f"{name} has {first}, and {other_name} {other}: an encoder takes one kind only")
    if all(found == first for _, found, _ in parts):
        return first
    total = sum(count for *_, count in parts)
    mean, std = [], []
    for channel in range(first.channels):
        average = sum(count * found.mean[channel] for _, found, count in parts) / total
        squares = sum(count * (found.std[channel] ** 2 + found.mean[channel] ** 2) for _, found, count in parts) / total
        mean.append(float(f"{average:.9g}"))
        std.append(float(f"{max(squares - average**2, 0.0) ** 0.5:.9g}") or 1.0)
    return PixelFormat(first.channels, first.bits, all(f.rgb for _, f, _ in parts), tuple(mean), tuple(std))


RGB = PixelFormat()
