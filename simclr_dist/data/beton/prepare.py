"""Makes a .beton file from any source of images.

ffcv's own writer waits for ever when one of its workers fails, and its bytes depend on which worker is fastest. Here a
pool of processes decodes and encodes, and this process writes the records in the order of the source, so that the bytes
are the same for any number of workers. The file appears under its name only when it is complete and on disk.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import io
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.atomic import replaces
from simclr_dist.data.beton.reader import JPEG, RAW, open_beton, sidecar_path
from simclr_dist.data.beton.writer import PAGE_BYTES, PagedWriter, Record
from simclr_dist.data.sources.images import ImageSource, Pixels
from simclr_dist.data.sources.open import open_source
from simclr_dist.errors import DataError
from simclr_dist.parallel.threads import default_num_threads

Mode = Literal["auto", "jpg", "raw", "smart"]
OnError = Literal["skip", "refuse"]

LARGEST_SIDE = 65535  # metadata keeps 16 bits
# Up to this size decoding a JPEG costs more than reading three bytes per pixel.
RAW_UP_TO_PIXELS = 96 * 96
_CHUNK = 32  # images that a worker gets at a time


@dataclass(frozen=True)
class PreparedInfo:
    """What `prepare` has written."""

    path: Path
    num_samples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    skipped: tuple[str, ...]  # a message for each image left out
    num_bytes: int
    fingerprint: str
    seconds: float


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    mode: Mode = "auto",
    quality: int = 90,
    max_side: int | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    on_error: OnError = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> PreparedInfo:
    """Writes the images of `source` (see `open_source`) to a .beton file, with a JSON file beside it.

    mode: `jpg`; `raw`, three bytes per pixel; `smart`, raw for images up to 96 x 96 and JPEG for larger ones.
        `auto` is `smart`.
    max_side: images whose longer side exceeds so many pixels are shrunk to it.
    limit: take only that many images, spread evenly over the source.
    on_error: for an image that cannot be decoded: `refuse` raises, `skip` leaves it out.
    progress: called with (images done, images in all).
    Raises DataError; `out` is then as it was before.
    """
    begin = time.perf_counter()
    out = Path(out)
    if mode not in get_args(Mode):
        raise DataError(f"mode `{mode}`: expected one of {', '.join(get_args(Mode))}")
    if on_error not in get_args(OnError):
        raise DataError(f"on_error `{on_error}`: expected one of {', '.join(get_args(OnError))}")
    if not 1 <= quality <= 100:
        raise DataError(f"JPEG quality {quality}: expected 1 to 100")
    if out.parent.parent.is_dir():  # makes `data/` in a fresh checkout, but no longer path: that is a typing error
        out.parent.mkdir(exist_ok=True)
    if out.is_dir() or not out.parent.is_dir():
        raise DataError(f"{out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")
    images = open_source(source, split)
    ids = np.arange(len(images.labels))
    if limit is not None and limit < len(ids):
        ids = np.linspace(0, len(ids) - 1, limit).round().astype(np.int64)
    encoder = _Encoder(mode, quality, max_side)
    skipped: list[str] = []
    try:
        _remove_abandoned(out)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=_unfinished_prefix(out), delete=False) as file:
            temporary = Path(file.name)
            fcntl.flock(file, fcntl.LOCK_EX)  # released when this process ends: a free lock marks an abandoned file
            try:
                writer = PagedWriter(file, len(ids))
                workers = default_num_threads(num_workers)
                for done, result in enumerate(_in_order(encoder, images, ids, workers), 1):
                    if isinstance(result, DataError):
                        if on_error == "refuse":
                            raise DataError(f"{result}; leave such images out with --on-error skip")
                        skipped.append(str(result))
                    else:
                        writer.add(result)
                    if progress is not None:
                        progress(done, len(ids))
                if not writer.rows:
                    raise DataError(f"{source}: none of its {len(ids)} images can be used; the first: {skipped[0]}")
                writer.finish()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.flush()
                os.fsync(file.fileno())
                with open_beton(temporary) as beton:
                    fingerprint = beton.fingerprint
                labels = writer.labels
                counts = np.bincount(labels[labels >= 0], minlength=len(images.class_names))
                sidecar = {
                    "num_samples": len(writer.rows),
                    "class_names": list(images.class_names),
                    "class_counts": counts.tolist(),
                    "fingerprint": fingerprint,
                    "source": str(source),
                    "split": split,
                    "mode": "smart" if mode == "auto" else mode,
                    "quality": quality,
                    "max_side": max_side,
                    "num_jpeg": sum(row.mode == JPEG for row in writer.rows),
                    "largest_side": max(max(row.height, row.width) for row in writer.rows),
                    **writer.statistics(),
                    "skipped": skipped,
                }
                # The sidecar comes first, so that a file never lacks its class names.
                with replaces(sidecar_path(out)) as path:
                    path.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
                os.replace(temporary, out)
                _sync_folder(out.parent)
            except BaseException:
                with suppress(FileNotFoundError):
                    temporary.unlink()
                raise
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    return PreparedInfo(
        path=out,
        num_samples=len(writer.rows),
        class_names=images.class_names,
        class_counts=tuple(counts.tolist()),
        skipped=tuple(skipped),
        num_bytes=out.stat().st_size,
        fingerprint=fingerprint,
        seconds=time.perf_counter() - begin,
    )


@dataclass(frozen=True)
class _Encoder:
    mode: Mode
    quality: int
    max_side: int | None

    def __call__(self, images: ImageSource) -> list[Record | DataError]:
        return [self._encode(images, index) for index in range(len(images.labels))]

    def _encode(self, images: ImageSource, index: int) -> Record | DataError:
        """The record of an image, or the error of one that cannot be used."""
        try:
            image = images.read(index)
        except DataError as error:
            return error
        image = _shrunk(image, self.max_side)
        height, width, _ = image.shape
        if max(height, width) > LARGEST_SIDE:
            return DataError(f"{images.name(index)}: {width} x {height} pixels are too many; set --max-side")
        small = height * width <= RAW_UP_TO_PIXELS
        raw = self.mode == "raw" or (self.mode in ("smart", "auto") and small)
        content = image.tobytes() if raw else _jpeg(image, self.quality)
        if len(content) > PAGE_BYTES:
            return DataError(
                f"{images.name(index)}: {width} x {height} pixels take {len(content)} bytes, "
                f"more than a page of {PAGE_BYTES}; set --max-side{' or --mode jpg' if raw else ''}"
            )
        histogram = np.array(Image.fromarray(image).histogram()).reshape(3, 256)
        return Record(content, RAW if raw else JPEG, height, width, int(images.labels[index]), histogram)


def _shrunk(image: Pixels, max_side: int | None) -> Pixels:
    height, width, _ = image.shape
    if max_side is None or max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=None))


def _jpeg(image: Pixels, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _in_order(
    encoder: _Encoder, images: ImageSource, ids: NDArray[np.int64], num_workers: int
) -> Iterator[Record | DataError]:
    """Results in the order of ids; a bounded number of them is in memory."""
    chunks = (images.take(ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK))
    if num_workers == 1 or len(ids) <= _CHUNK:
        for chunk in chunks:
            yield from encoder(chunk)
        return
    # Spawned, not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    ahead: deque[Future[list[Record | DataError]]] = deque()
    with ProcessPoolExecutor(num_workers, context, _prepare_worker, (os.getpid(),)) as pool:
        try:
            for chunk in chunks:
                ahead.append(pool.submit(encoder, chunk))
                if len(ahead) > 2 * num_workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process died, perhaps because memory ran out; use fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare_worker(parent: int) -> None:
    """A worker ignores Ctrl-C, which its parent handles, and dies with its parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the line above
        os._exit(1)


def _unfinished_prefix(out: Path) -> str:
    return f".{out.name}.part-"


def _remove_abandoned(out: Path) -> None:
    """Deletes unfinished files for `out` whose writer was killed."""
    for path in out.parent.glob(f"{glob.escape(_unfinished_prefix(out))}*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
