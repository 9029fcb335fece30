"""What a loader is, and what it yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import Account
from simclr_dist.data.order import Order

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """V cropped and flipped views of B images; colour comes later, on the device.

    views: uint8 [V, B, H, W, 3], of other channels and depths [V, B, H, W, C], uint8 or uint16; view 0 of
        all images, then view 1, and so on.
    sample_ids: int64 [B], the images' numbers in their dataset.
    labels: int64 [B], -1 where there is none; only SupCon uses them.
    group_ids: int64 [B], the same for samples of equal content, captions of one image, and the like: the loss makes
        them no negatives of one another. None: each sample is of its own kind. SupCon goes by labels.
    texts: int64 [B, T]: a text of each image, in tokens. None: the images have none.
    epoch: with the seed and the ids it determines every random draw.
    """

    views: Tensor
    sample_ids: Tensor
    labels: Tensor
    epoch: int
    # The ids again, on the host: random parameters are drawn there, and reading ids back would wait for the device.
    host_ids: NDArray[np.int64] = field(default=None, repr=False, compare=False)  # type: ignore[arg-type]
    group_ids: Tensor | None = None
    texts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.host_ids is None:
            object.__setattr__(self, "host_ids", self.sample_ids.cpu().numpy())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        views, ids, labels = (
            x.to(device, non_blocking=non_blocking) for x in (self.views, self.sample_ids, self.labels)
        )
        groups, texts = (
            None if x is None else x.to(device, non_blocking=non_blocking) for x in (self.group_ids, self.texts)
        )
        return Batch(views, ids, labels, self.epoch, self.host_ids, groups, texts)


class Loader(Protocol):
    """What the trainer uses of a dataset. wait_s: seconds spent waiting for batches so far.

    account: what was taken from the source, None for a .beton file that does not tell.
    fingerprint: by which checkpoints of release 0.1 name their data; newer ones use content_fingerprint.
    """

    num_samples: int
    class_names: tuple[str, ...]
    fingerprint: str
    content_fingerprint: str
    account: Account | None
    order: Order
    wait_s: float

    def batches(self, step: int) -> Iterator[Batch]:
        """All batches of this rank from global step `step` on, without end."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Loader: ...
    def __exit__(self, *exc: object) -> None: ...


def make_ready(loader: Loader, step: int) -> None:
    """Waits, without a limit of its own, for what the batch of `step` needs from elsewhere; most loaders need nothing,
    and need no method `make_ready`. Raises DataError.
    """
    getattr(loader, "make_ready", lambda _: None)(step)
