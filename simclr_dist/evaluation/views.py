"""h and z of random views of chosen images, by which encoders are compared without labels.

The views follow from a fixed seed and each image's number alone: every encoder is shown the same crops in the same
colours, at the side that it was trained with.

Letters: M images, V views of each, S their side, D width of h, K of z.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from simclr_dist.config import AugmentConfig, DataConfig, Precision
from simclr_dist.data.loading.load_images import fixed_views
from simclr_dist.data.loading.open_images import DatasetInfo, describe
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import frozen, refuse_non_finite
from simclr_dist.network.precision import autocast
from simclr_dist.views.augment import Augment

SEED = 0
# Chen et al. 2020, appendix B.9, with milder crops; whatever a run itself was trained on.
AUGMENT = AugmentConfig(preset="simclr_cifar", crop_scale_min=0.2)


@dataclass(frozen=True)
class ChosenImages:
    """`count` images of `source`, evenly spread."""

    source: str
    info: DatasetInfo
    count: int
    unreadable: dict[int, str] = field(default_factory=dict)
    """Why some were left out, by their number, once views of them have been asked for."""

    @classmethod
    def of(cls, source: str, at_most: int) -> ChosenImages:
        """Raises DataError."""
        info = describe(source)
        return cls(source, info, min(at_most, info.num_samples))


@torch.no_grad()
def encode_views(
    encoder: nn.Module,
    head: nn.Module | None,
    images: ChosenImages,
    data: DataConfig,
    *,
    num_views: int,
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """h [V, M, D] and, with a head, z [V, M, K] in float32 on the device. data: the side, and how to decode.

    batch_size: views at once. Raises DataError where no image can be read, or h is not finite.
    """
    if not images.info.pixel_format.has_pixels_of(data.pixel_format):
        raise DataError(
            f"{images.source}: its images are {images.info.pixel_format}, and the encoder takes {data.pixel_format}"
        )
    augment = Augment(AUGMENT, SEED, data.image_size, pixels=data.pixel_format)
    batches = fixed_views(
        images.source,
        data.image_size,
        AUGMENT,
        num_views=num_views,
        seed=SEED,
        batch_size=max(1, batch_size // num_views),
        ids=np.arange(images.count, dtype=np.int64) * images.info.num_samples // images.count,
        num_threads=data.num_threads,
        loader="folder" if data.loader == "folder" else "auto",  # data.loader is for data.train
        unreadable=images.unreadable,
    )
    all_h, all_z = list[Tensor](), list[Tensor]()
    with frozen(encoder), autocast(device, precision):
        for batch in batches:
            h = encoder(augment(batch.to(device)).flatten(0, 1))
            all_h.append(h.float().unflatten(0, (num_views, -1)))
            if head is not None:
                all_z.append(head(h).float().unflatten(0, (num_views, -1)))
    if not all_h:
        raise DataError(f"none of {images.count:,} images of {images.source} can be read")
    h = torch.cat(all_h, dim=1)
    if bad := int((~h.isfinite()).any(dim=2).any(dim=0).sum()):
        refuse_non_finite(bad, h.shape[1], int((~h.isfinite()).any(dim=2).any(dim=0).nonzero()[0]), precision)
    return h, torch.cat(all_z, dim=1) if all_z else None
