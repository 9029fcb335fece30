"""Images: decoded once, cropped V times; colour, blur and solarisation on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.loading.open_images import DatasetInfo, LoaderName, describe
from simclr_dist.data.sources.open import open_source, size_on_disk
from simclr_dist.kinds.kind import Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simclr_dist.kinds.kind import SampleBatch, ViewsOf
    from simclr_dist.network.inputs import Inputs
    from simclr_dist.parallel.distributed import World

LARGEST_SIDE = 96  # of an image shown; ImageNet's at full size would fill 150 MB


class Images(Kind):
    """Read as uint8 [b, S, S, 3]; the encoder eats them normalised, float [b, 3, S, S]."""

    noun: ClassVar[str] = "image"
    shows_views: ClassVar[bool] = True

    @property
    def inputs(self) -> Inputs:
        from simclr_dist.network.inputs import images

        return images(self.data.image_size)

    @property
    def input_signature(self) -> Mapping[str, Any]:
        return {"image_size": self.data.image_size}

    def describe(self, source: str) -> DatasetInfo:
        return describe(source)

    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        from simclr_dist.data.loading.view_loader import build_loader

        return build_loader(
            self.data, augment, seed=seed, global_batch_size=global_batch_size, world=world, device=device
        )

    def views(
        self, augment: AugmentConfig, seed: int, device: torch.device, warn: Callable[[str], None]
    ) -> tuple[ViewsOf, dict[str, str]]:
        from simclr_dist.parallel.agree import agree
        from simclr_dist.views import implementations
        from simclr_dist.views.augment import Augment

        size = self.data.image_size
        chosen = agree(
            "augment.implementation",
            augment.implementation,
            best=implementations.best(device),
            fallback=implementations.FALLBACK,
            obstacle=lambda name: implementations.obstacle(name, device, size),
            device=device,
            warn=warn,
        )
        return Augment(augment, seed, size, chosen), {"augment": chosen}

    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        from simclr_dist.data.loading.load_images import load_images

        # data.loader is the training images'; others may be of another kind.
        loader: LoaderName = "folder" if self.data.loader == "folder" else "auto"
        return load_images(
            source,
            self.data.image_size,
            batch_size=batch_size,
            ids=ids,
            num_threads=self.data.num_threads,
            loader=loader,
            unreadable=unreadable,
        )

    def to_input(self, read: Tensor) -> Tensor:
        from simclr_dist.views.augment import normalize

        return normalize(read)

    def example_batch(self, n: int) -> Batch:
        import torch

        shape = self.data.num_views, n, self.data.image_size, self.data.image_size, 3
        ids = torch.arange(n)
        return Batch(torch.randint(0, 256, shape, dtype=torch.uint8), ids, ids, 0)

    def baselines(self, train: str) -> Mapping[str, nn.Module]:
        from simclr_dist.kinds.pixels import Pixels

        return {"raw pixels": Pixels()}

    def show(self, source: str, ids: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        import torch

        from simclr_dist.kinds.pixels import shrink

        batches = self.evaluation_batches(source, ids, 64, {})
        shown = [(shrink(images, LARGEST_SIDE), found) for images, _, found in batches]
        return torch.cat([images for images, _ in shown]), torch.cat([found for _, found in shown]).numpy()

    def size_on_disk(self, source: str) -> int:
        return size_on_disk(source)

    def obstacle(self) -> str | None:
        from simclr_dist.data.decode.ffcv_import import unavailable

        if self.data.order == "page_local" and not self.data.train.endswith(".beton"):
            return f"data.order=page_local: {self.data.train} has no pages; use a .beton file, or data.order=random"
        return unavailable() if self.data.loader == "ffcv" else None

    def names(self, source: str, n: int) -> tuple[str, ...]:
        """Those of files, where there are any."""
        if source.endswith(".beton") or source == "synthetic":
            return super().names(source, n)
        images = open_source(source)
        return tuple(images.name(i) for i in range(n))
