"""Makes a .beton file from any source of images.

ffcv's own writer waits for ever when one of its workers fails, and its bytes depend on which worker is fastest. Here
this process encodes together with the others, and writes the records in the order of the source, so that the bytes are
the same for any number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import Account, LeftOut, SourceOptions
from simclr_dist.data.beton.classes_from import with_class_names
from simclr_dist.data.beton.content import content_fingerprint
from simclr_dist.data.beton.encode import Encoded, Encoder, Mode, Unusable, mean_and_std, recodes
from simclr_dist.data.beton.fit import choose_fit
from simclr_dist.data.beton.keep_channels import ChannelEncoder, KeptPixels
from simclr_dist.data.beton.out_file import choose_target, commit, unfinished
from simclr_dist.data.beton.reader import JPEG, open_beton
from simclr_dist.data.beton.workers import encode_in_order
from simclr_dist.data.beton.writer import PagedWriter
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.images import FileImages, ImageSource
from simclr_dist.data.sources.open import open_source
from simclr_dist.errors import DataError
from simclr_dist.parallel.threads import default_num_threads
from simclr_dist.pixel_format import PixelFormat
from simclr_dist.safe_text import mask

OnError = Literal["skip", "refuse"]

# Photographs have 0.2 to 0.3, handwritten digits 0.3. Below this, values were most likely read in a wrong range.
_NEARLY_CONSTANT_STD = 0.03


@dataclass(frozen=True)
class PreparedInfo:
    """What `prepare` has written.

    skipped, damaged: a message for each image left out, and for each damaged one that was taken.
    skipped_names: of the images left out.
    num_kept_jpeg: JPEG data stored as they came, see `kept_jpeg`. num_shrunk: images that were larger than max_side.
    fit: what was chosen for the size of views, in a sentence.
    fingerprint: of the content. warnings: sentences about the result as a whole. kept: of `--channels keep`.
    """

    path: Path
    num_samples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    account: Account
    skipped: tuple[str, ...]
    skipped_names: tuple[str, ...]
    damaged: tuple[str, ...]
    num_kept_jpeg: int
    num_shrunk: int
    fit: str | None
    warnings: tuple[str, ...]
    num_bytes: int
    fingerprint: str
    seconds: float
    kept: PixelFormat | None = None


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    options: SourceOptions | None = None,
    mode: Mode = "auto",
    quality: int | None = None,
    max_side: int | None = None,
    for_views: int | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    on_error: OnError = "refuse",
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedInfo:
    """Writes the images of `source` (see `open_source`) to a .beton file, with a JSON file beside it.

    options: how the source is read; `split` is short for options.split.
    mode: `jpg`; `raw`, three bytes per pixel; `smart`, raw for images up to 96 x 96 and JPEG for larger ones.
        `auto` is `smart`.
    quality: of JPEG; None is 90.
    max_side: images whose longer side exceeds so many pixels are shrunk to it.
    for_views: the side of the views that will be cut, in pixels, for which max_side and the quality of shrunk images
        are chosen, unless they are given (see `choose_fit`).
    limit: take only that many images, spread evenly over the source.
    on_error: for an image that cannot be decoded: `refuse` raises, `skip` leaves it out.
    strict: raise when anything found at the source is left out.
    overwrite: replace `out` if it is a .beton file. Nothing else is ever replaced.
    progress: called with (images done, images in all).
    Raises DataError; `out` is then as it was before.
    """
    begin = time.perf_counter()
    out, options = Path(out), options or SourceOptions()
    if split is not None:
        options = replace(options, split=split)
    options = with_class_names(options)
    at_least_1 = {"max_side": max_side, "for_views": for_views, "limit": limit, "num_workers": num_workers}
    _check_options(mode, on_error, quality, at_least_1)
    keeps = options.keeps_channels
    if keeps and (mode not in ("auto", "raw") or quality is not None):
        raise DataError("--channels: samples that are kept are stored as they are; leave out --mode and --quality")
    fit = choose_fit(for_views, max_side, quality)
    target = choose_target(out, [source], overwrite)
    images = open_source(source, options)
    account = images.account
    if strict and account.num_left_out:
        raise DataError("\n  ".join([f"--strict: {account.num_left_out} found but not taken", *account.lines()]))
    ids, account = _limited(images, account, limit)
    num_processes = default_num_threads(num_workers, setting="num_workers")
    encoder: Callable[[ImageSource], Encoded] = (
        ChannelEncoder(fit.max_side, options.on_damage)
        if keeps
        else Encoder(mode, fit.quality, fit.max_side, options.on_damage, fit.quality_of_shrunk)
    )
    pixels = KeptPixels()
    skipped: list[Unusable] = []
    done = Encoded()
    num_done = 0
    try:
        with unfinished(target) as file:
            writer = PagedWriter(file, len(ids), keeps=keeps)
            for encoded in encode_in_order(encoder, images, ids, num_processes):
                pixels.add(encoded.pixels)
                for result in encoded.results:
                    if isinstance(result, Unusable):
                        _refuse(result, options, on_error, strict)
                        skipped.append(result)
                    else:
                        writer.add(result)
                    num_done += 1
                    if progress is not None:
                        progress(num_done, len(ids))
                done.sums += encoded.sums
                done.num_kept += encoded.num_kept
                done.num_shrunk += encoded.num_shrunk
                done.damaged += encoded.damaged
                done.noted += encoded.noted
            if not writer.rows:
                raise DataError(
                    f"{account.source}: none of its {len(ids)} images can be used; the first: {skipped[0].reason}"
                )
            kept, remarks = pixels.format() if keeps else (None, [])
            writer.finish(kept)
            file.flush()
            with open_beton(file.name) as beton:
                table_fingerprint = beton.fingerprint
            for reason, wanted in (("unreadable", False), ("damaged", True)):
                account = account.with_left_out(reason, [image.name for image in skipped if image.damaged == wanted])
            account = account.with_note("damaged (--on-damage)", done.damaged).with_note("taken in part", done.noted)
            labels = writer.labels
            counts = np.bincount(labels[labels >= 0], minlength=len(images.class_names))
            statistics = mean_and_std(done.sums) if kept is None else kept.to_json()
            fingerprint = content_fingerprint(writer.records_digest, images.class_names)
            sidecar = {
                "num_samples": len(writer.rows),
                "class_names": list(images.class_names),
                "class_counts": counts.tolist(),
                "fingerprint": table_fingerprint,
                "content_fingerprint": fingerprint,
                "source": mask(str(source)),
                "split": options.split,
                "mode": "raw" if keeps else "smart" if mode == "auto" else mode,
                "quality": fit.quality,
                "max_side": fit.max_side,
                "for_views": for_views,
                "quality_of_shrunk": fit.quality_of_shrunk,
                "num_shrunk": done.num_shrunk,
                "num_jpeg": sum(row.mode == JPEG for row in writer.rows),
                "num_kept_jpeg": done.num_kept,
                "largest_side": max(max(row.height, row.width) for row in writer.rows),
                **statistics,
                "account": account.to_json(),
                "skipped": [image.reason for image in skipped],
                "damaged": done.damaged,
            }
            commit(file, target, sidecar)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    return PreparedInfo(
        path=out,
        num_samples=len(writer.rows),
        class_names=images.class_names,
        class_counts=tuple(counts.tolist()),
        account=account,
        skipped=tuple(image.reason for image in skipped),
        skipped_names=tuple(image.name for image in skipped),
        damaged=tuple(done.damaged),
        num_kept_jpeg=done.num_kept,
        num_shrunk=done.num_shrunk,
        fit=None if for_views is None else fit.sentence(for_views),
        warnings=tuple(_warnings(images, None if keeps else statistics, sidecar["num_jpeg"])) + tuple(remarks),
        kept=kept,
        num_bytes=target.stat().st_size,
        fingerprint=fingerprint,
        seconds=time.perf_counter() - begin,
    )


def _check_options(mode: str, on_error: str, quality: int | None, at_least_1: dict[str, int | None]) -> None:
    if mode not in get_args(Mode):
        raise DataError(f"mode `{mode}`: expected one of {', '.join(get_args(Mode))}")
    if on_error not in get_args(OnError):
        raise DataError(f"on_error `{on_error}`: expected one of {', '.join(get_args(OnError))}")
    if quality is not None and not 1 <= quality <= 100:
        raise DataError(f"JPEG quality {quality}: expected 1 to 100")
    for name, value in at_least_1.items():
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected at least 1")


def _limited(images: ImageSource, account: Account, limit: int | None) -> tuple[NDArray[np.int64], Account]:
    """At most `limit` images, spread evenly; the account says that the others were not asked for."""
    ids = np.arange(len(images.labels))
    if limit is None or limit >= len(ids):
        return ids, account
    chosen = np.linspace(0, len(ids) - 1, limit).round().astype(np.int64)
    others = np.setdiff1d(ids, chosen)
    note = LeftOut(f"beyond --limit {limit}", len(others), tuple(images.name(int(i)) for i in others[:5]))
    return chosen, replace(account, taken=limit, notes=(*account.notes, note))


def _refuse(image: Unusable, options: SourceOptions, on_error: OnError, strict: bool) -> None:
    """Raises DataError where the options do not allow to leave this image out."""
    if image.damaged and options.on_damage == "stop":
        raise DataError(f"{image.reason}; leave such images out with --on-damage skip, or take them with warn")
    if not image.damaged and on_error == "refuse":
        raise DataError(f"{image.reason}; leave such images out with --on-error skip")
    if strict:
        raise DataError(f"--strict: {image.reason}")


def _warnings(images: ImageSource, statistics: dict[str, list[float]] | None, num_jpeg: int) -> Iterator[str]:
    unnoticed = turbojpeg.unavailable() if isinstance(images, FileImages) else None
    if unnoticed is not None:
        yield f"damage within JPEG files is not noticed: {unnoticed}"
    elif isinstance(images, FileImages) and num_jpeg and not recodes():
        yield "JPEG files are decoded and encoded, which is slower: numba is not installed (pip install numba)"
    if statistics is not None and max(statistics["std"]) < _NEARLY_CONSTANT_STD:
        mean, std = (", ".join(f"{value:.3f}" for value in statistics[key]) for key in ("mean", "std"))
        yield (
            f"the images are nearly constant (red, green, blue from 0 to 1: mean {mean}, std {std}); "
            "were their values read in the right range? See --range and --bands"
        )
