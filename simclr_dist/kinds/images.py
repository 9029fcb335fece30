"""Images: decoded once, cropped V times; colour, blur and solarisation on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import PIXELS, AugmentConfig, DataConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.data.beton.shard_set import open_data, size_of_data
from simclr_dist.data.loading.open_images import DatasetInfo, LoaderName, describe, kept_pixel_format, use_cache_of
from simclr_dist.data.sources.open import open_source, size_on_disk
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds.kind import Kind
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.source_text import missing
from simclr_dist.views.presets import resolve_augmentation, without_colours

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simclr_dist.kinds.kind import SampleBatch, ViewsOf
    from simclr_dist.network.inputs import Inputs
    from simclr_dist.parallel.distributed import World

LARGEST_SIDE = 96  # of an image shown; ImageNet's at full size would fill 150 MB


class Images(Kind):
    """Read as [b, S, S, C] of 8 or 16 bits; the encoder eats them normalised, float [b, C, S, S]."""

    noun: ClassVar[str] = "image"

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        use_cache_of(data)

    @property
    def pixels(self) -> PixelFormat:
        return self.data.pixel_format

    def settled(self) -> DataConfig:
        """What `prepare --channels keep` kept is in the file itself."""
        if self.data.channels is not None and missing(self.data.train) is not None:
            return self.data  # a plan for data that are elsewhere
        found = kept_pixel_format(self.data.train) or RGB
        given = {name: getattr(self.data, name) for name in PIXELS if getattr(self.data, name) is not None}
        if not given and found == RGB:
            return self.data
        for name, there in (("channels", found.channels), ("bits", found.bits)):
            if given.get(name, there) != there:
                raise ConfigError(
                    [f"data.{name}: {given[name]}, but the images of {self.data.train} are {found}; leave it out"]
                )
        if given.get("rgb") and found.channels != 3:
            raise ConfigError([f"data.rgb: red, green and blue are three, and {self.data.train} has {found}"])
        for name in ("mean", "std"):
            if len(given.get(name, found.mean)) != found.channels:
                raise ConfigError([f"data.{name}: {len(given[name])} numbers, but {self.data.train} has {found}"])
        return self.data.model_copy(update=found.to_json() | {"mean": found.mean, "std": found.std} | given)

    def start_rows(self, augment: AugmentConfig) -> Mapping[str, str]:
        if self.pixels == RGB:
            return {}
        mean, std = (" ".join(f"{x:.4g}" for x in values) for values in (self.pixels.mean, self.pixels.std))
        rows = {"pixels": f"{self.pixels}, normalised by mean {mean} and std {std} of {self.pixels.largest}"}
        if not self.pixels.rgb:
            left_out = without_colours(resolve_augmentation(augment))[1]
            rows["colours"] = "brightness and contrast of each channel by itself" + (
                f"; left out, because these are not RGB: {', '.join(left_out)}" if left_out else ""
            )
            rows["pictures"] = self.shown_as
        return rows

    @property
    def inputs(self) -> Inputs:
        from simclr_dist.network.inputs import images

        return images(self.data.image_size, self.pixels.channels)

    @property
    def input_signature(self) -> Mapping[str, Any]:
        size = {"image_size": self.data.image_size}
        return size if self.pixels == RGB else size | {"pixels": self.pixels.to_json()}

    def describe(self, source: str) -> DatasetInfo:
        """Refuses images with other pixels than those of the section: the encoder was built for these."""
        info = describe(source)
        if not info.pixel_format.has_pixels_of(self.pixels):
            raise DataError(
                f"{source}: its images are {info.pixel_format}, and the encoder takes {self.pixels}; prepare them "
                "alike (`simclr-dist prepare --channels`)"
            )
        return info

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

        size, pixels = self.data.image_size, self.pixels
        chosen = agree(
            "augment.implementation",
            augment.implementation,
            best=implementations.best(device),
            fallback=implementations.FALLBACK,
            obstacle=lambda name: implementations.obstacle(name, device, size, pixels),
            device=device,
            warn=warn,
        )
        return Augment(augment, seed, size, chosen, pixels), {"augment": chosen}

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

        return normalize(read, self.pixels)

    def example_batch(self, n: int) -> Batch:
        import torch

        shape = self.data.num_views, n, self.data.image_size, self.data.image_size, self.pixels.channels
        ids, dtype = torch.arange(n), torch.uint8 if self.pixels.bits == 8 else torch.uint16
        return Batch(torch.randint(0, self.pixels.largest + 1, shape, dtype=torch.int32).to(dtype), ids, ids, 0)

    def baselines(self, train: str) -> Mapping[str, nn.Module]:
        from simclr_dist.kinds.pixels import Pixels

        return {"raw pixels": Pixels()}

    def show_views(self, views: Tensor) -> Tensor:
        """RGB as it is; of other channels the first three, see `shown_as`."""
        from simclr_dist.kinds.pixels import first_three

        return views if self.pixels.rgb else first_three(views.clamp(-2, 2), dim=-3, black=-2.0)

    @property
    def shown_as(self) -> str:
        """How pictures of images come about that are not RGB; empty: as they are."""
        if self.pixels.rgb:
            return ""
        which = {1: "grey", 2: "channels 1 and 2 as red and green"}
        colours = which.get(self.pixels.channels, "channels 1, 2 and 3 as red, green and blue")
        return f"{colours}; black is 2 standard deviations below the mean, white 2 above"

    def show(self, source: str, ids: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        import torch

        from simclr_dist.kinds.pixels import as_picture, shrink

        batches = self.evaluation_batches(source, ids, 64, {})
        shown = [(shrink(as_picture(images, self.pixels), LARGEST_SIDE), found) for images, _, found in batches]
        return torch.cat([images for images, _ in shown]), torch.cat([found for _, found in shown]).numpy()

    def size_on_disk(self, source: str) -> int:
        return size_of_data(source) if names_beton(source) else size_on_disk(source)

    def obstacle(self) -> str | None:
        from simclr_dist.data.decode.ffcv_import import unavailable

        if (order := self.data.order) != "random" and not names_beton(self.data.train):
            return f"data.order={order}: {self.data.train} has no pages; use .beton files, or data.order=random"
        return unavailable() if self.data.loader == "ffcv" else None

    def names(self, source: str, n: int) -> tuple[str, ...]:
        """Those of files, where there are any."""
        if source == "synthetic":
            return super().names(source, n)
        if names_beton(source):
            with open_data(source) as beton:
                return tuple(f"{path}[{i}]" for path, count in beton.files() for i in range(count))[:n]
        images = open_source(source)
        return tuple(images.name(i) for i in range(n))
