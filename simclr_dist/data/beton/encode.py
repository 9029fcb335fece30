"""Images to records of a .beton file, in this process or in several, in the order of the source."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

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
from simclr_dist.data.sources.jpeg_file import read_jpeg_file
from simclr_dist.errors import DataError

Mode = Literal["auto", "jpg", "raw", "smart"]

LARGEST_SIDE = {RAW: LARGEST_RAW_SIDE, JPEG: 65500}  # libjpeg's limit is a little lower
# Up to this size decoding a JPEG costs more than reading three bytes per pixel.
RAW_UP_TO_PIXELS = 96 * 96
_LARGEST_CHUNK = 64  # images that a process works on at a time
_QUEUED = 3  # chunks for each worker: one to work on, and enough for while this process is busy with its own
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
        count, of the others every 16th row.
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
                image = images.decoded(index)
            except DataError as error:
                done.results.append(Unusable(name, str(error)))
                continue
            if image.damage is not None and self.on_damage != "warn":
                done.results.append(Unusable(name, f"{name}: is damaged: {image.damage}", damaged=True))
                continue
            pixels = _shrunk(image.pixels, self.max_side)
            kept = self._kept(image, pixels)
            quality = self.quality if pixels is image.pixels else self.quality_of_shrunk or self.quality
            result = self._record(pixels, kept, quality, name, int(images.labels[index]))
            done.results.append(result)
            if isinstance(result, Record):
                sums.add(pixels if result.mode == RAW else pixels[::16])  # JPEG changes the pixels anyway
                done.num_kept += result.content is kept
                done.num_shrunk += pixels is not image.pixels
                done.damaged += [] if image.damage is None else [f"{name}: {image.damage}"]
                done.noted += [] if image.note is None else [f"{name}: {image.note}"]
        done.sums = sums.result()
        return done

    def _kept(self, image: Decoded, pixels: Pixels) -> bytes | None:
        """The image's own JPEG data, if they may be stored in place of `pixels`."""
        if image.jpeg is None or pixels is not image.pixels:
            return None
        content = keep(image.jpeg, _steps(self.quality))
        return content if content is None or len(content) <= PAGE_BYTES else None

    def _record(self, pixels: Pixels, kept: bytes | None, quality: int, name: str, label: int) -> Record | Unusable:
        height, width, _ = pixels.shape
        small = height * width <= RAW_UP_TO_PIXELS
        mode = RAW if self.mode == "raw" or (self.mode in ("smart", "auto") and small) else JPEG
        if max(height, width) > LARGEST_SIDE[mode]:
            return Unusable(name, f"{name}: {width} x {height} pixels are too many; set --max-side")
        content = pixels.tobytes() if mode == RAW else kept or _jpeg(pixels, quality)
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


@cache
def _steps(quality: int) -> Steps:
    file = read_jpeg_file(_jpeg(np.zeros((16, 16, 3), np.uint8), quality))
    steps = None if file is None else plain_steps(file)
    assert steps is not None
    return steps


def encode_in_order(
    encoder: Callable[[ImageSource], Encoded], images: ImageSource, ids: NDArray[np.int64], num_workers: int
) -> Iterator[Encoded]:
    """The images `ids`, some at a time, in this order; a bounded number of them is in memory.

    encoder: can be sent to another process. num_workers: processes, this one among them: it works too, so that nothing
    waits for the others to start.
    Raises DataError.
    """
    chunks = (images.take(chunk) for chunk in _chunks(ids, num_workers))
    if num_workers == 1 or len(ids) <= _LARGEST_CHUNK:
        yield from map(encoder, chunks)
        return
    pool, started = _start_workers(num_workers - 1)
    with pool:
        try:
            yield from _encode_together(encoder, chunks, pool, started)
        except BrokenProcessPool:
            raise DataError(_why_broken(any(map(_has_ended_well, started)))) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_workers(num_workers: int) -> tuple[ProcessPoolExecutor, list[Future[int]]]:
    """A pool, and as many results as it has workers, which are there when these have started."""
    pool = None
    try:
        # A fork starts at once, where a new interpreter imports for 0.4 s; but it would inherit the locks of threads.
        forks = _has_one_thread()
        context = multiprocessing.get_context("fork" if forks else "spawn")
        pool = ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(),))
        started = [pool.submit(os.getpid) for _ in range(num_workers)]
        wait(started, timeout=0.1 if forks else 0)  # so that they get the first chunks
        return pool, started
    except OSError as error:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        raise DataError(
            f"worker processes cannot be started: {error.strerror or error} (they need semaphores in /dev/shm and some "
            "20 open files in all; see `ulimit -n`); use --workers 1, which needs none"
        ) from None


def _has_one_thread() -> bool:
    """False where it cannot be known."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _chunks(ids: NDArray[np.int64], num_workers: int) -> Iterator[NDArray[np.int64]]:
    """Smaller ones towards the end, so that all processes end at about the same time."""
    while len(ids):
        size = min(max(len(ids) // (4 * num_workers), 4), _LARGEST_CHUNK)
        yield ids[:size]
        ids = ids[size:]


def _encode_together(
    encoder: Callable[[ImageSource], Encoded],
    chunks: Iterator[ImageSource],
    pool: ProcessPoolExecutor,
    started: list[Future[int]],
) -> Iterator[Encoded]:
    """A worker gets a chunk whenever too few are queued, otherwise this process encodes it."""
    ahead: deque[Future[Encoded]] = deque()
    for chunk in chunks:
        queued = sum(not result.done() for result in ahead)
        if queued < _QUEUED * len(started) and any(future.done() for future in started):
            ahead.append(pool.submit(encoder, chunk))
        else:
            ahead.append(Future())
            ahead[-1].set_result(encoder(chunk))
        while ahead and (ahead[0].done() or len(ahead) > 2 * _QUEUED * len(started)):
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
    for future in started:
        future.result()  # raises when workers could not start: also where this process was faster than that


def _has_ended_well(future: Future[int]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _why_broken(have_started: bool) -> str:
    script = getattr(sys.modules["__main__"], "__file__", None)
    if not have_started and script is not None and "__name__" not in Path(script).read_text("utf-8", "replace"):
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
