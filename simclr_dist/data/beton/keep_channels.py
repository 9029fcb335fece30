"""Images to records that hold their samples as they are: `prepare --channels keep`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import OnDamage
from simclr_dist.data.beton.encode import Encoded, PixelsOf, Unusable
from simclr_dist.data.beton.reader import LARGEST_RAW_SIDE, RAW
from simclr_dist.data.beton.writer import KEPT_PAGE_BYTES, Record
from simclr_dist.data.decode.channel_crops import resize
from simclr_dist.data.sources.images import ImageSource
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import PixelFormat

_ROWS = 256


@dataclass(frozen=True)
class ChannelEncoder:
    """max_side: of the longer side; larger images are shrunk to it, averaged over areas. None: any."""

    max_side: int | None
    on_damage: OnDamage = "warn"

    def __call__(self, images: ImageSource) -> Encoded:
        done = Encoded()
        for index in range(len(images.labels)):
            name = images.name(index)
            try:
                kept = images.kept(index)
            except DataError as error:
                done.results.append(Unusable(name, str(error)))
                continue
            if kept.damage is not None and self.on_damage != "warn":
                done.results.append(Unusable(name, f"{name}: is damaged: {kept.damage}", damaged=True))
                continue
            samples = _shrunk(kept.samples, self.max_side)
            result = _record(samples, name, int(images.labels[index]))
            done.results.append(result)
            if isinstance(result, Record):
                done.num_shrunk += samples is not kept.samples
                done.damaged += [] if kept.damage is None else [f"{name}: {kept.damage}"]
                bits = 8 * samples.dtype.itemsize
                done.pixels.append(PixelsOf(name, samples.shape[2], bits, kept.rgb, _sums(samples)))
        return done


class KeptPixels:
    """What the pixels of all images are. An encoder takes one kind only, so all must be alike."""

    def __init__(self) -> None:
        self._first: PixelsOf | None = None
        self._sums = np.zeros((3, 0), object)  # numbers of Python, which have no largest
        self._all_rgb = True

    def add(self, pixels: Iterable[PixelsOf]) -> None:
        """Raises DataError where an image differs from the first."""
        for image in pixels:
            if self._first is None:
                self._first, self._sums = image, np.zeros((3, image.channels), object)
            first = self._first
            if (image.channels, image.bits) != (first.channels, first.bits):
                raise DataError(
                    f"images differ in channels or depth, and an encoder takes one kind only: {first.name} has "
                    f"{_of(first)}, {image.name} has {_of(image)}; prepare them apart, or choose the same channels of "
                    "all with --channels I,J,…"
                )
            self._sums += np.array(image.sums, object)
            self._all_rgb &= image.rgb

    def format(self) -> tuple[PixelFormat, list[str]]:
        """With mean and standard deviation of all pixels; and sentences about channels that hold nothing."""
        assert self._first is not None
        first, largest = self._first, (1 << self._first.bits) - 1
        counts, totals, squares = self._sums.tolist()
        mean, std, remarks = [], [], []
        for number, (n, total, square) in enumerate(zip(counts, totals, squares, strict=True), 1):
            variance = n * square - total * total  # times n^2, exactly
            mean.append(float(f"{total / n / largest:.9g}"))
            std.append(float(f"{variance**0.5 / n / largest:.9g}") if variance else 1.0)
            if not variance:
                remarks.append(f"channel {number} is {total // n} in every pixel of every image")
        return PixelFormat(first.channels, first.bits, self._all_rgb, tuple(mean), tuple(std)), remarks


def _of(image: PixelsOf) -> str:
    return f"{image.channels} channel{'s' if image.channels > 1 else ''} of {image.bits} bits"


def _record(samples: NDArray, name: str, label: int) -> Record | Unusable:
    height, width, _ = samples.shape
    if max(height, width) > LARGEST_RAW_SIDE or samples.nbytes > KEPT_PAGE_BYTES:
        reason = f"{width} x {height} pixels take {samples.nbytes} bytes, more than a page of {KEPT_PAGE_BYTES}"
        return Unusable(name, f"{name}: {reason}; set --max-side, or cut the images into tiles")
    content = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    return Record(content, RAW, height, width, label)


def _shrunk(samples: NDArray, max_side: int | None) -> NDArray:
    height, width, _ = samples.shape
    if max_side is None or max(height, width) <= max_side:
        return samples
    scale = max_side / max(height, width)
    return resize(samples, max(1, round(height * scale)), max(1, round(width * scale)))


def _sums(samples: NDArray) -> tuple[tuple[int, ...], ...]:
    """Of each channel the number of pixels, their sum, and that of their squares, exactly."""
    height, width, channels = samples.shape
    total, squares = np.zeros((2, channels), np.uint64)
    for start in range(0, height, _ROWS):
        values = samples[start : start + _ROWS].reshape(-1, channels).astype(np.uint64)
        total += values.sum(0)
        squares += (values * values).sum(0)
    return (height * width,) * channels, tuple(map(int, total)), tuple(map(int, squares))
