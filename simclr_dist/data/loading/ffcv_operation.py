"""Our crops as an operation of ffcv's own Loader, for pipelines of ffcv transforms.

    crops = TwoCrops("train.beton", size=224, seed=0)
    loader = import_ffcv().Loader("train.beton", ..., pipelines={"image": [SampleIds(), crops]})
    for crops.epoch in range(100):
        for views, in loader: ...        # uint8 [B, 2, S, S, 3]

The views are those of `build_loader` for the same seed, epoch and sample. Everything else is ffcv's: its buffers are
overwritten by later batches, and an error in its thread is lost, which is why training does not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.decode.ffcv_import import import_ffcv
from simclr_dist.data.loading.ffcv_images import BetonImages
from simclr_dist.data.randomness import keys

import_ffcv()

from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402 - after the patched import
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402


class SampleIds(SimpleRGBImageDecoder):
    """Passes the sample ids on: ffcv requires a compiled decoder, and `TwoCrops` does the decoding."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        state = replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("<i8"))
        return state, AllocationQuery((), np.dtype("<i8"))

    def generate_code(self) -> Callable:
        def decode(batch_indices, ids, metadata, storage_state):  # type: ignore[no-untyped-def]
            for k in range(len(batch_indices)):
                ids[k] = batch_indices[k]
            return ids[: len(batch_indices)]

        return decode


class TwoCrops(Operation):
    """Sample ids [B] to random crops, uint8 [B, V, S, S, 3]; `epoch` may be changed between epochs.

    num_views: V; two unless asked for more.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int,
        seed: int,
        scale_min: float = 0.08,
        flip_p: float = 0.5,
        epoch: int = 0,
        num_views: int = 2,
    ) -> None:
        super().__init__()
        self.epoch = epoch
        self._images = BetonImages(path)
        self._size = size
        self._seed = seed
        self._scale_min = scale_min
        self._flip_p = flip_p
        self._num_views = num_views

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        shape = (self._num_views, self._size, self._size, 3)
        state = replace(previous_state, jit_mode=False, shape=shape, dtype=torch.uint8)
        return state, AllocationQuery(shape, torch.uint8)

    def generate_code(self) -> Callable:
        def crop(ids: np.ndarray, views: torch.Tensor) -> torch.Tensor:
            ids = np.asarray(ids)
            view_keys = keys(self._seed, self.epoch, ids[None], np.arange(self._num_views)[:, None])
            views = views[: len(ids)]
            self._images.fill(
                ids,
                lambda h, w: random_crops(view_keys, h, w, scale_min=self._scale_min, flip_p=self._flip_p),
                views.numpy().swapaxes(0, 1),
            )
            return views

        return crop
