"""Images in, batches of two views out.

Importing the package does not import torch: `simclr-dist prepare` and its worker processes start at once.

with build_loader(config.data, config.augment, seed=0, global_batch_size=512, world=world(), device="cpu") as loader:
    for batch in loader.batches(step=0):
        ...
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.order import Order
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from simclr_dist.config import AugmentConfig, DataConfig
    from simclr_dist.data.loading.loader import CropRule, Images
    from simclr_dist.parallel.distributed import World

__all__ = [
    "Batch",
    "DataError",
    "DatasetInfo",
    "Loader",
    "Order",
    "build_loader",
    "describe",
    "load_images",
    "open_images",
]

LoaderName = Literal["auto", "ffcv", "folder", "synthetic"]


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds. labels: int64 [n], -1 where there is none."""

    num_samples: int
    class_names: tuple[str, ...]
    fingerprint: str
    labels: NDArray[np.int64]


def build_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    seed: int,
    global_batch_size: int,
    world: World,
    device: torch.device | str,
) -> Loader:
    """The loader of a pretraining run; close it, or use it with `with`. Raises DataError."""
    from simclr_dist.data.decode.presets import resolve_recipe
    from simclr_dist.data.loading.loader import ViewLoader

    images = open_images(data.train, data.loader)
    try:
        pages = images.pages() if data.order == "page_local" else None
        if data.order == "page_local" and pages is None:
            raise DataError(
                f"data.order=page_local: {data.train} has no pages; use a .beton file, or data.order=random"
            )
        return ViewLoader(
            images,
            resolve_recipe(augment),
            image_size=data.image_size,
            seed=seed,
            global_batch_size=global_batch_size,
            world=world,
            device=device,
            num_threads=data.num_threads,
            batches_ahead=data.batches_ahead,
            pages=pages,
        )
    except BaseException:
        images.close()
        raise


def load_images(
    source: str,
    image_size: int,
    *,
    batch_size: int,
    ids: NDArray[np.int64] | None = None,
    num_threads: int | None = None,
    loader: LoaderName = "auto",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images for evaluation, in the order of `ids` (all of them by default), none left out.

    Yields (uint8 [b, S, S, 3], labels int64 [b], sample ids int64 [b]); the last b may be smaller than batch_size.
    The central 0.875 of the shorter side is resized to S = image_size, as torchvision evaluates on ImageNet;
    pictures of S x S stay as they are.
    """
    import torch

    from simclr_dist.data.decode.crops import center_crops
    from simclr_dist.data.decode.memory import RecycledMemory
    from simclr_dist.data.loading.loader import DecodePool, cancel
    from simclr_dist.parallel.threads import default_num_threads

    images = open_images(source, loader)
    pool = DecodePool(images, default_num_threads(num_threads))
    memory = RecycledMemory()
    everything = np.arange(len(images.labels)) if ids is None else np.asarray(ids, np.int64)
    ahead: deque[tuple[NDArray[np.int64], Tensor, list[Future[None]]]] = deque()

    def crop(_: NDArray[np.int64]) -> CropRule:
        return lambda heights, widths: center_crops(heights, widths, image_size)[None]

    try:
        for start in [*range(0, len(everything), batch_size), None, None]:
            if start is not None:
                part = everything[start : start + batch_size]
                out = memory.empty((1, len(part), image_size, image_size, 3), torch.uint8)
                ahead.append((part, out, pool.start(part, crop, out)))
            if ahead and (start is None or len(ahead) > 2):
                part, out, futures = ahead.popleft()
                for future in futures:
                    future.result()
                yield out[0], torch.from_numpy(images.labels[part]), torch.from_numpy(part.copy())
    finally:
        for _, _, futures in ahead:
            cancel(futures)
        pool.close()


def describe(source: str) -> DatasetInfo:
    """Size, classes and labels of a dataset, without decoding a picture."""
    if str(source).endswith(".beton"):
        from simclr_dist.data.beton.reader import open_beton

        with open_beton(source) as beton:
            return DatasetInfo(beton.num_samples, beton.class_names, beton.fingerprint, beton.labels)
    images = open_images(source, "auto")
    return DatasetInfo(len(images.labels), images.class_names, images.fingerprint, images.labels)


def open_images(source: str, loader: LoaderName) -> Images:
    """The dataset at `source`, able to decode and crop; close it. Raises DataError."""
    if source.endswith(".beton") and loader in ("auto", "ffcv"):
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
    # Only now: torchvision takes its time to import.
    from simclr_dist.data.loading.pillow_images import BetonSource, SourceImages

    if loader == "synthetic" or source == "synthetic":
        from simclr_dist.data.sources.synthetic import synthetic_images

        return SourceImages(synthetic_images())
    if source.endswith(".beton"):
        return SourceImages(BetonSource(source))
    from simclr_dist.data.sources.find import open_source

    return SourceImages(open_source(source))
