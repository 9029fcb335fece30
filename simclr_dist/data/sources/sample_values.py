"""What the numbers in an image mean: which of its bands are red, green and blue, and which values are black and white.

What is not 8-bit grey or RGB says neither for itself. A guess that is wrong makes images nearly constant, so the values
are shown and asked for instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.data.account import Axes, Channels, OnDamage, Pages
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import MOST_CHANNELS

DARK_16_BIT = 1 << 14  # 16 bits of which the upper two are unused rather hold 8 to 14 bits than a dark image


@dataclass(frozen=True)
class Decoding:
    """How images are read whose files leave it open.

    value_range: the values that become 0 and 255, where they do not have 8 bits; 0 and 65535 where channels are kept.
    bands: which bands, counted from 1, are red, green and blue.
    channels, pages, axes: see SourceOptions.
    max_pixels: larger images are refused; None: the usual limit of `image_size`.
    on_damage: what `read` does with an image whose data are damaged and can be decoded all the same.
    """

    value_range: tuple[float, float] | None = None
    bands: tuple[int, int, int] | None = None
    max_pixels: int | None = None
    on_damage: OnDamage = "warn"
    channels: Channels = "rgb"
    pages: Pages | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        if self.channels == "rgb":
            for name in ("pages", "axes"):
                if getattr(self, name) is not None:
                    raise DataError(f"--{name} {getattr(self, name)}: is for --channels keep")
        elif self.bands is not None:
            listed = ",".join(map(str, self.bands))
            raise DataError(f"--bands makes RGB of other channels; --channels {listed} keeps those as they are")
        if self.value_range is not None and self.value_range[0] == self.value_range[1]:
            raise DataError(f"--range {self.value_range[0]} {self.value_range[1]}: expected two different values")


ASK = Decoding()


def to_rgb(
    samples: NDArray, decoding: Decoding, *, num_colours: int = 0, alpha: int | None = None
) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of samples [H, W, S].

    num_colours: 1 or 3, how many of the samples the file declares to be colours. alpha: which one is transparency,
    unsigned.
    Raises DataError that says what to type.
    """
    num_bands = samples.shape[2]
    if decoding.bands is not None:
        if not 1 <= min(decoding.bands) <= max(decoding.bands) <= num_bands:
            asked = " ".join(map(str, decoding.bands))
            raise DataError(f"{describe(samples)}: there are no --bands {asked}, only 1 to {num_bands}")
        samples, alpha = samples[..., [band - 1 for band in decoding.bands]], None
    elif num_bands != num_colours + (alpha is not None):
        raise DataError(
            f"{describe(samples)}: which bands are red, green and blue? Say --bands I J K, each from 1 to {num_bands}"
            " (or take all, --channels keep)"
            + (f"; and {ask_for_range(samples)}" if decoding.value_range is None and samples.dtype != np.uint8 else "")
        )
    colours = samples if alpha is None else np.delete(samples, alpha, axis=2)
    rgb = _to_8_bits(colours, decoding.value_range)
    rgb = rgb if rgb.shape[2] == 3 else np.repeat(rgb, 3, axis=2)
    if alpha is None:
        return rgb
    opacity = samples[..., alpha, None] >> 8 * (samples.dtype.itemsize - 1)
    return on_white(Image.fromarray(np.concatenate([rgb, opacity.astype(np.uint8)], axis=2)))


def on_white(image: Image.Image) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of an image with transparency, put on white.

    Raises DataError when the transparency looks like one more band, such as near infrared, which many programs store
    there: more than 16 values, and most pixels neither clear nor solid.
    """
    image = image.convert("RGBA")
    histogram = np.array(image.getchannel("A").histogram())
    if 2 * histogram[1:255].sum() > histogram.sum() and np.count_nonzero(histogram) > 16:
        raise DataError(
            f"uint8, {image.height} x {image.width} x 4, values of the fourth band from "
            f"{histogram.nonzero()[0][0]} to {histogram.nonzero()[0][-1]}: it varies like a band of its own, not like "
            "transparency; say which bands are red, green and blue, such as --bands 1 2 3"
        )
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def kept_samples(samples: NDArray, decoding: Decoding) -> NDArray:
    """The samples [H, W, S] that are kept, uint8 or uint16. Raises DataError that says what to type."""
    num_bands = samples.shape[2]
    if isinstance(decoding.channels, tuple):
        if not 1 <= min(decoding.channels) <= max(decoding.channels) <= num_bands:
            asked = ",".join(map(str, decoding.channels))
            raise DataError(f"{describe(samples)}: there are no --channels {asked}, only 1 to {num_bands}")
        samples = samples[..., [number - 1 for number in decoding.channels]]
    if samples.shape[2] > MOST_CHANNELS:
        raise DataError(
            f"{describe(samples)}: at most {MOST_CHANNELS} channels are kept; say which, such as --channels 1,2,3"
        )
    if samples.dtype == np.uint8:
        return samples
    if decoding.value_range is not None:
        return _scaled(samples, decoding.value_range, 65535).astype(np.uint16)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        return samples.astype(np.uint16)
    raise DataError(f"{describe(samples)}: which values become 0 and 65535? Say {ask_for_range(samples)}")


def _scaled(samples: NDArray, value_range: tuple[float, float], largest: int) -> NDArray[np.float64]:
    low, high = value_range
    scaled = (samples.astype(np.float64) - low) * (largest / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, largest))


def _to_8_bits(samples: NDArray, value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    if samples.dtype == np.uint8:
        return samples
    if value_range is not None:
        return _scaled(samples, value_range, 255).astype(np.uint8)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2 and not 0 < samples.max() < DARK_16_BIT:
        return (samples >> 8).astype(np.uint8)
    raise DataError(f"{describe(samples)}: which values are black and white? Say {ask_for_range(samples)}")


def describe(samples: NDArray) -> str:
    """Such as `int16, 512 x 512 x 1, values from -1024 to 3071`."""
    low, high = _extremes(samples)
    return f"{_kind(samples)}, values from {_text(low)} to {_text(high)}"


def ask_for_range(samples: NDArray) -> str:
    low, high = _extremes(samples)
    if isinstance(high, int) and low >= 0:  # 0 to all ones, as sensors count
        low, high = 0, max(255, (1 << high.bit_length()) - 1)
    elif low >= 0 and high <= 1:
        low, high = 0, 1
    return f"--range LOW HIGH, such as --range {_text(low)} {_text(high)}, the same for all images"


def _extremes(samples: NDArray) -> tuple[float, float]:
    if samples.dtype.kind == "f":
        finite = samples[np.isfinite(samples)]
        if not finite.size:
            raise DataError(f"{_kind(samples)}: holds no finite number")
        samples = finite
    return samples.min().item(), samples.max().item()


def _kind(samples: NDArray) -> str:
    return f"{samples.dtype.name}, {' x '.join(map(str, samples.shape))}"


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.6g}"
