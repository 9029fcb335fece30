"""What is in a .beton file, whether every image can be decoded, and whether its content is as it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_dist.data.account import Account
from simclr_dist.data.beton.content import read_records_digest
from simclr_dist.data.beton.reader import JPEG, Beton, open_beton
from simclr_dist.pixel_format import PixelFormat

_CHUNK = 64


@dataclass(frozen=True)
class Inspection:
    """sides: (smallest, median, largest) longer side in pixels. account: None where the file does not tell.

    damaged: reason by sample id; None: not checked. changed: whether pixels or labels differ from those that were
    written; None: not checked, or the file does not say what was written. kept: by `prepare --channels keep`.
    """

    path: Path
    num_bytes: int
    num_samples: int
    num_jpeg: int
    sides: tuple[int, int, int]
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    fingerprint: str
    sidecar: dict[str, Any]
    account: Account | None
    damaged: dict[int, str] | None
    changed: bool | None
    kept: PixelFormat | None = None


def inspect_beton(
    path: str | Path, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Checks the file as every opening does; with `verify`, reads and decodes every sample too, with ffcv.

    progress: called with (samples decoded, samples in all). Raises DataError when the file cannot be opened.
    """
    with open_beton(path) as beton:
        longer = np.sort(np.maximum(beton.images["width"], beton.images["height"]))
        counts = np.bincount(beton.labels[beton.labels >= 0], minlength=len(beton.class_names))
        return Inspection(
            path=beton.path,
            num_bytes=beton.path.stat().st_size,
            num_samples=beton.num_samples,
            num_jpeg=int((beton.images["mode"] == JPEG).sum()),
            sides=(int(longer[0]), int(longer[len(longer) // 2]), int(longer[-1])),
            class_names=beton.class_names,
            class_counts=tuple(counts.tolist()),
            fingerprint=beton.content_fingerprint,
            sidecar=beton.sidecar,
            account=beton.account,
            damaged=_damaged(beton, progress) if verify else None,
            changed=_changed(beton) if verify else None,
            kept=beton.kept,
        )


def _changed(beton: Beton) -> bool | None:
    return None if beton.written_digest is None else read_records_digest(beton) != beton.written_digest


def _damaged(beton: Beton, progress: Callable[[int, int], None] | None) -> dict[int, str]:
    if beton.kept is not None:
        from simclr_dist.data.loading.channel_images import ChannelImages as Opened
    else:
        from simclr_dist.data.loading.ffcv_images import BetonImages as Opened  # type: ignore[assignment]

    images, num_samples = Opened(beton.path), beton.num_samples
    try:
        found: dict[int, str] = {}
        for start in range(0, num_samples, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, num_samples))
            found |= images.damaged(ids)
            if progress is not None:
                progress(int(ids[-1]) + 1, num_samples)
        return found
    finally:
        images.close()
