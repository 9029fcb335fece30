"""What .beton files hold, whether every image can be decoded, and whether the content is as it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_dist.data.account import Account
from simclr_dist.data.beton.content import read_records_digest
from simclr_dist.data.beton.reader import JPEG, Beton, open_beton
from simclr_dist.data.beton.shard_set import ShardSet, open_data
from simclr_dist.pixel_format import PixelFormat
from simclr_dist.source_text import shown

_CHUNK = 64


@dataclass(frozen=True)
class Inspection:
    """path: as it was given. sides: (smallest, median, largest) longer side in pixels.
    account: None where a file does not tell.

    damaged: reason by sample id; None: not checked. changed: whether pixels or labels differ from those that were
    written; None: not checked, or the file does not say what was written. kept: by `prepare --channels keep`.
    """

    path: str
    num_files: int
    num_bytes: int
    num_samples: int
    num_jpeg: int
    sides: tuple[int, int, int]
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    fingerprint: str
    sidecars: tuple[dict[str, Any], ...]
    account: Account | None
    damaged: dict[int, str] | None
    changed: bool | None
    changed_file: str | None = None
    kept: PixelFormat | None = None


def inspect_beton(
    path: str | Path, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Checks the file as every opening does; with `verify`, reads and decodes every sample too, with ffcv.

    progress: called with (samples decoded, samples in all). Raises DataError when the file cannot be opened.
    """
    with open_data(path) as beton:
        changed, changed_file = _changed(beton) if verify else (None, None)
        longer = np.sort(np.maximum(beton.images["width"], beton.images["height"]))
        counts = np.bincount(beton.labels[beton.labels >= 0], minlength=len(beton.class_names))
        return Inspection(
            path=shown(str(path)),
            num_files=sum(1 for _ in beton.files()),
            num_bytes=beton.num_bytes,
            num_samples=beton.num_samples,
            num_jpeg=int((beton.images["mode"] == JPEG).sum()),
            sides=(int(longer[0]), int(longer[len(longer) // 2]), int(longer[-1])),
            class_names=beton.class_names,
            class_counts=tuple(counts.tolist()),
            fingerprint=beton.content_fingerprint,
            sidecars=beton.sidecars,
            account=beton.account,
            damaged=_damaged(str(path), beton, progress) if verify else None,
            changed=changed,
            changed_file=changed_file,
            kept=beton.kept,
        )


def _changed(data: Beton | ShardSet) -> tuple[bool | None, str | None]:
    """Whether any of its files has, and which; None: none has, but not all tell what was written.

    Of a store's shards, none has: they are compared when they come.
    """
    unknown = False
    remote = {shard.shown for shard in data.shards if shard.cached} if isinstance(data, ShardSet) else set()
    for (path, _), digest in zip(data.files(), data.written_digests, strict=True):
        if digest is None:
            unknown = True
        elif path not in remote:
            with open_beton(path) as beton:
                if read_records_digest(beton) != digest:
                    return True, path
    return (None if unknown else False), None


def _damaged(source: str, beton: Beton | ShardSet, progress: Callable[[int, int], None] | None) -> dict[int, str]:
    if beton.kept is not None:
        from simclr_dist.data.loading.channel_images import ChannelImages as Opened
    else:
        from simclr_dist.data.loading.ffcv_images import BetonImages as Opened  # type: ignore[assignment]

    images, num_samples = Opened(source), beton.num_samples
    try:
        found: dict[int, str] = {}
        for start in range(0, num_samples, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, num_samples))
            for sample, why in images.damaged(ids).items():
                file, number = images.beton.place(sample)
                found[sample] = why if number == sample else f"{file}, sample {number} there: {why}"
            if progress is not None:
                progress(int(ids[-1]) + 1, num_samples)
        return found
    finally:
        images.close()
