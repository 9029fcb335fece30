"""Images to records of a .beton file, in this process or in several, in the order of the source."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.data.account import OnDamage
from simclr_dist.data.beton.reader import JPEG, RAW
from simclr_dist.data.beton.writer import PAGE_BYTES, Record
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.images import ImageSource, Pixels
from simclr_dist.errors import DataError

Mode = Literal["auto", "jpg", "raw", "smart"]

LARGEST_SIDE = {RAW: 65535, JPEG: 65500}  # metadata has 16 bits; libjpeg's limit is a little lower
# Up to this size decoding a JPEG costs more than reading three bytes per pixel.
RAW_UP_TO_PIXELS = 96 * 96
_CHUNK = 64  # images that a worker gets at a time
_ROWS = 256


@dataclass(frozen=True)
class Unusable:
    """An image that gives no record. reason: with the image's name. damaged: it can be decoded, but not rightly."""

    name: str
    reason: str
    damaged: bool = False


@dataclass(frozen=True)
class Encoded:
    """results: one an image. damaged: for each record of a damaged image a sentence with its name.

    sums: per channel the number of pixels, their sum, and that of their squares, [3, 3]; of raw records all pixels
        count, of the others every fourth row.
    """

    results: list[Record | Unusable]
    damaged: list[str]
    sums: NDArray[np.int64]


@dataclass(frozen=True)
class Encoder:
    mode: Mode
    quality: int
    max_side: int | None
    on_damage: OnDamage

    def __call__(self, images: ImageSource) -> Encoded:
        results: list[Record | Unusable] = []
        damaged: list[str] = []
        sums = _Sums()
        for index in range(len(images.labels)):
            name = images.name(index)
            try:
                pixels, damage = images.read_checked(index)
            except DataError as error:
                results.append(Unusable(name, str(error)))
                continue
            if damage is not None and self.on_damage != "warn":
                results.append(Unusable(name, f"{name}: is damaged: {damage}", damaged=True))
                continue
            pixels = _shrunk(pixels, self.max_side)
            result = self._encode(pixels, name, int(images.labels[index]))
            results.append(result)
            if isinstance(result, Record):
                sums.add(pixels if result.mode == RAW else pixels[::4])  # JPEG changes the pixels anyway
                if damage is not None:
                    damaged.append(f"{name}: {damage}")
        return Encoded(results, damaged, sums.result())

    def _encode(self, pixels: Pixels, name: str, label: int) -> Record | Unusable:
        height, width, _ = pixels.shape
        small = height * width <= RAW_UP_TO_PIXELS
        mode = RAW if self.mode == "raw" or (self.mode in ("smart", "auto") and small) else JPEG
        if max(height, width) > LARGEST_SIDE[mode]:
            return Unusable(name, f"{name}: {width} x {height} pixels are too many; set --max-side")
        content = pixels.tobytes() if mode == RAW else _jpeg(pixels, self.quality)
        if len(content) > PAGE_BYTES:
            return Unusable(
                name,
                f"{name}: {width} x {height} pixels take {len(content)} bytes, "
                f"more than a page of {PAGE_BYTES}; set --max-side{' or --mode jpg' if mode == RAW else ''}",
            )
        return Record(content, mode, height, width, label)


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


def encode_in_order(
    encoder: Encoder, images: ImageSource, ids: NDArray[np.int64], num_workers: int
) -> Iterator[Encoded]:
    """The images `ids`, some at a time, in this order; a bounded number of them is in memory. Raises DataError."""
    chunks = (images.take(ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK))
    if num_workers == 1 or len(ids) <= _CHUNK:
        yield from map(encoder, chunks)
        return
    ahead: deque[Future[Encoded]] = deque()
    any_result = False
    try:
        # Spawned, not forked: this process may have threads.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(),))
    except OSError as error:
        raise _cannot_start(error) from None
    with pool:
        try:
            for chunk in chunks:
                try:
                    ahead.append(pool.submit(encoder, chunk))
                except OSError as error:
                    raise _cannot_start(error) from None
                if len(ahead) > 2 * num_workers:
                    yield ahead.popleft().result()
                    any_result = True
            while ahead:
                yield ahead.popleft().result()
                any_result = True
        except BrokenProcessPool:
            raise DataError(_why_broken(any_result)) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cannot_start(error: OSError) -> DataError:
    return DataError(
        f"worker processes cannot be started: {error.strerror or error} (they need semaphores in /dev/shm and some 20 "
        "open files in all; see `ulimit -n`); use --workers 1, which needs none"
    )


def _why_broken(any_result: bool) -> str:
    script = getattr(sys.modules["__main__"], "__file__", None)
    if not any_result and script is not None and "__name__" not in Path(script).read_text("utf-8", "replace"):
        return (
            f"worker processes cannot be started from {script}: each imports it, so put what it does below "
            '`if __name__ == "__main__":`; or use num_workers=1'
        )
    return "a worker process died, perhaps because memory ran out; use fewer --workers"


def _start_worker(parent: int) -> None:
    """A worker ignores Ctrl-C, which its parent handles, and dies with its parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the line above
        os._exit(1)
