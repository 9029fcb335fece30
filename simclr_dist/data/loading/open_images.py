"""Opens a dataset for decoding, with ffcv's codec where it can and Pillow elsewhere.

Importing this module does not import torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.reader import read_kept
from simclr_dist.data.beton.shard_cache import CachePlace, keep_shards_in
from simclr_dist.data.beton.shard_files import beton_files, names_beton
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import RGB, PixelFormat

if TYPE_CHECKING:
    from simclr_dist.config import DataConfig
    from simclr_dist.data.account import Account
    from simclr_dist.data.loading.decode_pool import Images
    from simclr_dist.data.sources.images import ImageSource

LoaderName = Literal["auto", "ffcv", "folder", "synthetic"]


def use_cache_of(data: DataConfig) -> None:
    """From here on this process keeps shards of stores where the section says. Opens nothing."""
    folder = None if data.cache_dir is None else Path(data.cache_dir)
    keep_shards_in(None if folder is None else CachePlace(folder, data.cache_bytes, data.fetch_timeout_s))


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds. labels: int64 [n], -1 where there is none.

    fingerprint: as release 0.1 computed it. digest: gives `content_fingerprint`, for which all may have to be read.
    account: what was taken from the source; None for a .beton file that does not tell.
    """

    num_samples: int
    class_names: tuple[str, ...]
    fingerprint: str
    digest: Callable[[], str] = field(repr=False, compare=False)
    labels: NDArray[np.int64]
    account: Account | None
    pixel_format: PixelFormat = RGB

    @cached_property
    def content_fingerprint(self) -> str:
        """Of pixels, labels and class names. Raises DataError."""
        return self.digest()

    def is_called(self, fingerprint: str) -> bool:
        """Whether these are the data that somebody has recorded under `fingerprint`, now or with release 0.1."""
        return fingerprint in (self.content_fingerprint, self.fingerprint)


def describe(source: str) -> DatasetInfo:
    """Size, classes and labels of a dataset, without decoding an image. Raises DataError."""
    if names_beton(source):
        with open_data(source) as beton:
            return DatasetInfo(
                beton.num_samples,
                beton.class_names,
                beton.fingerprint,
                lambda: _fingerprint_of_beton(source),
                beton.labels,
                beton.account,
                beton.pixel_format,
            )
    images = _open_source(source)
    return DatasetInfo(
        len(images.labels),
        images.class_names,
        images.fingerprint,
        lambda: images.content_fingerprint,
        images.labels,
        images.account,
    )


def _fingerprint_of_beton(source: str) -> str:
    with open_data(source) as beton:
        return beton.content_fingerprint


def kept_pixel_format(source: str) -> PixelFormat | None:
    """What `prepare --channels keep` has kept in .beton files; None: images are RGB of 8 bits. Raises DataError."""
    files = beton_files(source)
    if files is None or (first := read_kept(files.paths[0])) is None:
        return None
    if len(files.paths) == 1:
        return first
    with open_data(source) as data:
        return data.kept


def open_images(source: str, loader: LoaderName) -> Images:
    """The dataset at `source`, able to decode and crop; close it. Raises DataError."""
    is_beton = names_beton(source)
    if is_beton and loader != "synthetic" and kept_pixel_format(source) is not None:
        from simclr_dist.data.loading.channel_images import ChannelImages

        return ChannelImages(source)
    if is_beton and loader in ("auto", "ffcv"):
        from simclr_dist.data.decode.ffcv_import import unavailable

        reason = unavailable()
        if reason is None:
            from simclr_dist.data.loading.ffcv_images import BetonImages

            return BetonImages(source)
        if loader == "ffcv":
            raise DataError(reason)
        warnings.warn(
            f"{reason}. Reading {source} with Pillow and torchvision instead: the same crops, at a fifth of the speed "
            "or less",
            stacklevel=3,
        )
    if loader == "ffcv":
        raise DataError(
            f"{source}: data.loader is ffcv, which reads .beton files; run `simclr-dist prepare {source} OUT.beton`"
        )
    # Imported only here: torchvision takes long to import.
    from simclr_dist.data.loading.pillow_images import BetonSource, SourceImages

    if is_beton and loader != "synthetic":
        return SourceImages(BetonSource(source))
    return SourceImages(_open_source("synthetic" if loader == "synthetic" else source))


def _open_source(source: str) -> ImageSource:
    if source == "synthetic":
        from simclr_dist.data.sources.synthetic import synthetic_images

        return synthetic_images()
    from simclr_dist.data.sources.open import open_source
    from simclr_dist.data.sources.remote import refuse_secrets

    refuse_secrets(source)
    return open_source(source)
