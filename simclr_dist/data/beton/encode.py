"""Images to records of a .beton file, in this process or in several, in the order of the source."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.data.account import OnDamage
from simclr_dist.data.beton.kept_jpeg import Steps, keep, plain_steps
from simclr_dist.data.beton.reader import JPEG, LARGEST_RAW_SIDE, RAW
from simclr_dist.data.beton.writer import PAGE_BYTES, Record
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.decoding import Decoded, Pixels
from simclr_dist.data.sources.images import ImageSource
from simclr_dist.data.sources.jpeg_file import JpegFile, read_jpeg_file
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    from simclr_dist.data.beton.recode import Recoder

Mode = Literal["auto", "jpg", "raw", "smart"]

LARGEST_SIDE = {RAW: LARGEST_RAW_SIDE, JPEG: 65500}  # libjpeg's limit is a little lower
# Up to this size decoding a JPEG costs more than reading three bytes per pixel.
RAW_UP_TO_PIXELS = 96 * 96
_MOST_RECODED = 1 << 25  # pixels: their coefficients take up to 12 bytes each, and of more a page is too small anyway
_ROWS = 256


@dataclass(frozen=True)
class Unusable:
    """An image that gives no record. reason: with the image's name. damaged: it can be decoded, but not rightly."""

    name: str
    reason: str
    damaged: bool = False


@dataclass(frozen=True)
class PixelsOf:
    """An image whose channels are kept. sums: of each channel the number of pixels, their sum, that of squares."""

    name: str
    channels: int
    bits: int
    rgb: bool
    sums: tuple[tuple[int, ...], ...]


@dataclass
class Encoded:
    """Of some images in their order.

    damaged, noted: for each record of a damaged image, and of one with something else to be known, a sentence with its
        name. num_kept: records that are the image's own JPEG data. num_shrunk: of images that were larger.
    sums: per channel the number of pixels, their sum, and that of their squares, [3, 3]; of raw records all pixels
        count, of the others one of each 16 x 16.
    pixels: of each record whose channels are kept, in place of `sums`.
    """

    results: list[Record | Unusable] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)
    num_kept: int = 0
    num_shrunk: int = 0
    sums: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 3), np.int64))
    pixels: list[PixelsOf] = field(default_factory=list)


@dataclass(frozen=True)
class _Stored:
    """What becomes of an image. counted: its pixels that count for the statistics, RGB."""

    content: bytes
    mode: int
    height: int
    width: int
    counted: Pixels
    kept: bool = False
    shrunk: bool = False
    damage: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Encoder:
    """quality_of_shrunk: of images that max_side makes smaller; None: as of the others."""

    mode: Mode
    quality: int
    max_side: int | None
    on_damage: OnDamage
    quality_of_shrunk: int | None = None

    def __call__(self, images: ImageSource) -> Encoded:
        done = Encoded()
        sums = _Sums()
        for index in range(len(images.labels)):
            name = images.name(index)
            try:
                image = images.recoded(index, self._by_coefficients)
                found = image if isinstance(image, _Stored) else self._by_pixels(image, name)
            except DataError as error:
                found = Unusable(name, str(error))
            if isinstance(found, Unusable):
                done.results.append(found)
                continue
            label = int(images.labels[index])
            done.results.append(Record(found.content, found.mode, found.height, found.width, label))
            sums.add(found.counted)
            done.num_kept += found.kept
            done.num_shrunk += found.shrunk
            done.damaged += [] if found.damage is None else [f"{name}: {found.damage}"]
            done.noted += [] if found.note is None else [f"{name}: {found.note}"]
        done.sums = sums.result()
        return done

    def _by_coefficients(self, file: JpegFile) -> _Stored | None:
        """Of an undamaged file of the usual kinds that is stored as JPEG at its own size; else None."""
        if self._mode(file.height, file.width) == RAW:
            return None
        largest = max(file.height, file.width)
        if largest > min(self.max_side or largest, LARGEST_SIDE[JPEG]) or file.height * file.width > _MOST_RECODED:
            return None
        recoder = _recoder(self.quality)
        recoded = None if recoder is None else recoder(file)
        if recoded is None or len(recoded.content) > PAGE_BYTES:
            return None
        return _Stored(recoded.content, JPEG, file.height, file.width, recoded.sample, recoded.kept)

    def _by_pixels(self, image: Decoded, name: str) -> _Stored | Unusable:
        if image.damage is not None and self.on_damage != "warn":
            return Unusable(name, f"{name}: is damaged: {image.damage}", damaged=True)
        pixels = _shrunk(image.pixels, self.max_side)
        shrunk = pixels is not image.pixels
        height, width, _ = pixels.shape
        mode = self._mode(height, width)
        if max(height, width) > LARGEST_SIDE[mode]:
            return Unusable(name, f"{name}: {width} x {height} pixels are too many; set --max-side")
        kept = None if shrunk or mode == RAW else self._kept(image)
        quality = self.quality_of_shrunk or self.quality if shrunk else self.quality
        content = pixels.tobytes() if mode == RAW else kept or _jpeg(pixels, quality)
        if len(content) > PAGE_BYTES:
            return Unusable(
                name,
                f"{name}: {width} x {height} pixels take {len(content)} bytes, "
                f"more than a page of {PAGE_BYTES}; set --max-side{' or --mode jpg' if mode == RAW else ''}",
            )
        counted = pixels if mode == RAW else np.ascontiguousarray(pixels[::16, ::16])
        return _Stored(content, mode, height, width, counted, kept is not None, shrunk, image.damage, image.note)

    def _mode(self, height: int, width: int) -> int:
        small = height * width <= RAW_UP_TO_PIXELS
        return RAW if self.mode == "raw" or (self.mode in ("smart", "auto") and small) else JPEG

    def _kept(self, image: Decoded) -> bytes | None:
        """The image's own JPEG data, if they may be stored in place of its pixels."""
        content = None if image.jpeg is None else keep(image.jpeg, _steps(self.quality))
        return content if content is None or len(content) <= PAGE_BYTES else None


class _Sums:
    """Adds up pixels and their squares, exactly: 256 rows of squares stay below 2^24, up to which float32 is exact."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, 3), np.int64)
        self._waiting: list[Pixels] = []  # of the same width, fewer than 256 rows

    def add(self, pixels: Pixels) -> None:
        if self._waiting and self._waiting[0].shape[1] != pixels.shape[1]:
            self._add_waiting()
        self._waiting.append(pixels)
        if sum(map(len, self._waiting)) >= _ROWS:
            self._add_waiting()

    def result(self) -> NDArray[np.int64]:
        if self._waiting:
            self._add_waiting()
        return self._sums

    def _add_waiting(self) -> None:
        together = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting = []
        self._sums[0] += together.shape[0] * together.shape[1]
        for start in range(0, len(together), _ROWS):
            values = together[start : start + _ROWS].astype(np.float32)
            self._sums[1] += values.sum(0).sum(0, dtype=np.float64).astype(np.int64)
            np.multiply(values, values, out=values)
            self._sums[2] += values.sum(0).sum(0, dtype=np.float64).astype(np.int64)


def mean_and_std(sums: NDArray[np.int64]) -> dict[str, list[float]]:
    """Mean and standard deviation per channel, in [0, 1], of pixels with these sums (see `Encoded`)."""
    count, total, squares = (row / scale for row, scale in zip(sums, (1, 255, 255 * 255), strict=True))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return {"mean": mean.round(6).tolist(), "std": deviation.round(6).tolist()}


def _shrunk(pixels: Pixels, max_side: int | None) -> Pixels:
    height, width, _ = pixels.shape
    if max_side is None or max(height, width) <= max_side:
        return pixels
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, reducing_gap=None))


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    content = turbojpeg.encode_jpeg(pixels, quality)
    if content is not None:
        return content
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def recodes() -> bool:
    """Whether JPEG files are recoded by way of their coefficients here; otherwise they are decoded and encoded."""
    return importlib.util.find_spec("numba") is not None and turbojpeg.unavailable() is None


@cache
def _recoder(quality: int) -> Recoder | None:
    if not recodes():
        return None
    from simclr_dist.data.beton.recode import Recoder

    return Recoder(_grey_picture(quality))


@cache
def _steps(quality: int) -> Steps:
    steps = plain_steps(_grey_picture(quality))
    assert steps is not None
    return steps


def _grey_picture(quality: int) -> JpegFile:
    """Of 16 x 16 pixels, as images of this quality are encoded; its coefficients are all 0."""
    file = read_jpeg_file(_jpeg(np.full((16, 16, 3), 128, np.uint8), quality))
    assert file is not None
    return file
