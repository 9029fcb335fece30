"""Colour, grayscale, blur, solarisation and normalisation: batched on the device, with every view's own parameters.

Chen et al. 2020 (SimCLR), appendix A. The loader has already cropped and flipped. Parameters are drawn on the host
with the same keys as the crops, so that views are the same on any device and any number of processes.

Three implementations compute the same: torch_operations.py on any device; cpu_kernel.py, five times as fast on CPUs;
triton_kernel.py on GPUs, in four launches instead of 400.

Letters: B images, n views, S the side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.decode.recycled_memory import RecycledMemory
from simclr_dist.data.normalisation import MEAN, STD
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views import implementations
from simclr_dist.views.parameters import Parameters, draw_parameters
from simclr_dist.views.presets import blur_kernel_size, resolve_augmentation, without_colours
from simclr_dist.views.torch_operations import normalize

__all__ = ["MEAN", "STD", "Augment", "Parameters", "blur_kernel_size", "draw_parameters", "normalize", "warmup"]


class Augment(nn.Module):
    """Changes the colours of a batch's views. Has no weights and no state: `draw_parameters` decides everything.

    implementation: in place of the config's; a name that does not work on the images' device gives torch's operations
    and a warning. pixels: where they are not RGB, what is done to colours is left out (presets.without_colours).
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        image_size: int,
        implementation: str | None = None,
        pixels: PixelFormat = RGB,
    ) -> None:
        super().__init__()
        resolved = resolve_augmentation(config)
        self.augmentation = resolved if pixels.rgb else without_colours(resolved)[0]
        self.pixels = pixels
        self.seed = seed
        self.image_size = image_size
        self.implementation = implementation or config.implementation
        self._memory = RecycledMemory()

    def forward(self, batch: Batch) -> Tensor:
        """float32 [V, B, C, S, S] on the device of batch.views, channels_last, normalised."""
        V = len(batch.views)
        parameters = draw_parameters(self.augmentation, self.seed, batch.epoch, batch.host_ids, V, self.pixels)
        return self.apply_parameters(batch.views.flatten(0, 1), parameters).unflatten(0, (V, -1))

    @torch.no_grad()
    def apply_parameters(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Views [n, S, S, C] to float32 [n, C, S, S], with the given parameters."""
        device = images.device
        augment_views = implementations.choose(self.implementation, device, self.image_size, self.pixels)
        shape = tuple(images.shape)
        out = self._memory.empty(shape, torch.float32) if device.type == "cpu" else torch.empty(shape, device=device)
        # As far as possible not by what was drawn: every step does the same on a GPU.
        blurs = max(self.augmentation.blur_p) > 0 or parameters.blur.any()
        augment_views(images, out, parameters, blur_kernel_size(self.image_size) if blurs else 1, self.pixels)
        return out.permute(0, 3, 1, 2)


def warmup() -> None:
    """Compiles the kernels of views and loader for CPUs, unless their machine code is on disk already.

    Run it once per node before many processes start.
    """
    implementations.obstacle("numba", torch.device("cpu"), image_size=1)
    if unavailable() is None:
        from simclr_dist.data.decode import channel_kernel, compiled_crops, kernel  # noqa: F401 - importing is compiling
