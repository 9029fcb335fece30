"""Augmented views for a training loop that is not ours: `load_views`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.batch import Loader
from simclr_dist.data.loading.open_images import kept_pixel_format, use_cache_of
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.parallel.distributed import world
from simclr_dist.pixel_format import RGB
from simclr_dist.views.augment import Augment


def load_views(
    source: str,
    *,
    image_size: int,
    global_batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    data: dict[str, Any] | None = None,
    **augment: Any,
) -> Views:
    """Two augmented views of every image of `source` (a folder, an archive, a .beton file, `synthetic`).

    Of a file of `prepare --channels keep` with its channels, normalised by its own mean and deviation.

    Each process of a torch.distributed group, or of a launcher such as torchrun, reads its own part of every global
    batch; call it when the group exists. What an image becomes depends on the seed, the epoch and the image only, not
    on the number of processes. data, augment: further settings of these sections of a configuration, as
    preset="simclr_cifar".
    Close it, or use it with `with`. Raises DataError; pydantic's ValidationError (a ValueError) for a wrong setting.
    """
    section = DataConfig(train=str(source), image_size=image_size, **(data or {}))
    use_cache_of(section)
    pixels = section.pixel_format if section.channels else kept_pixel_format(str(source)) or RGB
    views_of = AugmentConfig(**augment)
    device = torch.device(device)
    loader = build_loader(
        section, views_of, seed=seed, global_batch_size=global_batch_size, world=world(), device=device
    )
    return Views(loader, Augment(views_of, seed, image_size, pixels=pixels))


class Views:
    """Iterating over it is one epoch, the next iteration the next epoch; len() is the steps of one.

    Yields (views float32 [2, B, C, S, S], normalised; sample ids int64 [B]), B images of this process. What is left of
    an epoch beyond whole global batches is left out.
    """

    def __init__(self, loader: Loader, augment: Augment) -> None:
        self.loader, self.augment = loader, augment
        self.epoch = 0
        """Of the next iteration. Set it to continue a training."""

    def __len__(self) -> int:
        return self.loader.order.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = self.epoch * len(self)
        self.epoch += 1
        return islice(self.from_step(first), len(self))

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches from that step on, epoch after epoch, without end."""
        return ((self.augment(batch), batch.sample_ids) for batch in self.loader.batches(step))

    def close(self) -> None:
        """Ends the threads that decode."""
        self.loader.close()

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
