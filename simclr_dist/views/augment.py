"""Colour, grayscale, blur, solarisation and normalisation: batched on the device, with every view's own parameters.

Chen et al. 2020 (SimCLR), appendix A. The loader has already cropped and flipped. Parameters are drawn on the host
with the same keys as the crops, so that views are the same on any device and any number of processes. Each operation
gives the same result as torchvision's for the same parameters (tests/test_augment.py).

On a CPU the compiled cpu_kernel.py does the same five times faster; the operations here serve GPUs, and CPUs without
numba.

Letters: B images, n views, S the side.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.decode.recycled_memory import RecycledMemory
from simclr_dist.data.randomness import (
    BLUR,
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    GRAYSCALE,
    HUE,
    JITTER,
    JITTER_ORDER,
    SATURATION,
    SOLARIZE,
    keys,
    uniform,
)
from simclr_dist.views.presets import Augmentation, resolve_augmentation

# torchvision's ImageNet statistics, used for every dataset: the encoder's first BatchNorm absorbs the difference.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_SOLARIZE_FROM = 0.5

# The 24 orders in which brightness, contrast, saturation (0, 1, 2) and hue (3) can be applied.
_ORDERS = np.array([p for p in np.ndindex(4, 4, 4, 4) if len(set(p)) == 4])
_NUM_BLENDS = 3
_HUE = 3

_TINY = 1e-12  # avoids division by zero without changing a pixel

# On a CPU, images are processed in pieces of so many bytes of float32, which fit into a core's cache.
_PIECE_BYTES = 1 << 19


@dataclass(frozen=True)
class Parameters:
    """The parameters of each of 2B views, view 0 of all images first; drawn by `draw_parameters`.

    brightness, contrast, saturation: factors, as torchvision's adjust_*. hue: turns, in [-0.5, 0.5].
    order: [2B, 4], the order of brightness 0, contrast 1, saturation 2, hue 3. sigma: of the blur, in pixels.
    The others say which views are changed.
    """

    jitter: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    order: NDArray[np.int64]
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarize: NDArray[np.bool_]


def draw_parameters(augmentation: Augmentation, seed: int, epoch: int, sample_ids: NDArray[np.int64]) -> Parameters:
    """The parameters of both views of `sample_ids` [B]; they depend on the arguments only."""
    B = len(sample_ids)
    key = keys(seed, epoch, sample_ids[None], np.arange(2)[:, None]).reshape(2 * B)
    view = np.arange(2).repeat(B)

    def chance(draw: int, p: tuple[float, float]) -> NDArray[np.bool_]:
        return uniform(key, draw) < np.array(p)[view]

    def between(draw: int, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(key, draw)

    b, c, s, h = augmentation.jitter
    return Parameters(
        jitter=chance(JITTER, (augmentation.jitter_p,) * 2) & (max(augmentation.jitter) > 0),
        brightness=between(BRIGHTNESS, max(0.0, 1 - b), 1 + b),
        contrast=between(CONTRAST, max(0.0, 1 - c), 1 + c),
        saturation=between(SATURATION, max(0.0, 1 - s), 1 + s),
        hue=between(HUE, -h, h),
        order=_ORDERS[(uniform(key, JITTER_ORDER) * len(_ORDERS)).astype(np.int64)],
        grayscale=chance(GRAYSCALE, (augmentation.grayscale_p,) * 2),
        blur=chance(BLUR, augmentation.blur_p),
        sigma=between(BLUR_SIGMA, *augmentation.blur_sigma),
        solarize=chance(SOLARIZE, augmentation.solarize_p),
    )


@cache
def _kernel() -> ModuleType | None:
    """The compiled operations for CPUs; None without numba."""
    try:
        from simclr_dist.views import cpu_kernel
    except ImportError:
        return None
    return cpu_kernel


def warmup() -> None:
    """Compiles the kernels of views and loader, unless their machine code is on disk already.

    Run it once per node before many processes start.
    """
    _kernel()
    if unavailable() is None:
        from simclr_dist.data.decode import kernel  # noqa: F401 - importing is compiling


class Augment(nn.Module):
    """Changes the colours of a batch's views. Has no weights and no state: `draw_parameters` decides everything."""

    def __init__(self, config: AugmentConfig, seed: int, image_size: int) -> None:
        super().__init__()
        self.augmentation = resolve_augmentation(config)
        self.seed = seed
        self.image_size = image_size
        self._memory = RecycledMemory()

    def forward(self, batch: Batch) -> Tensor:
        """float32 [2, B, 3, S, S] on the device of batch.views, channels_last, normalised."""
        parameters = draw_parameters(self.augmentation, self.seed, batch.epoch, batch.host_ids)
        return self.apply_parameters(batch.views.flatten(0, 1), parameters).unflatten(0, (2, -1))

    @torch.no_grad()
    def apply_parameters(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Views uint8 [n, S, S, 3] to float32 [n, 3, S, S], with the given parameters."""
        if images.device.type == "cpu":
            out = self._memory.empty(tuple(images.shape), torch.float32)
            kernel = _kernel()
        else:
            out = torch.empty(images.shape, device=images.device)
            kernel = None
        if kernel is None:
            self._with_torch(images, out, parameters)
        else:
            self._with_kernel(kernel, images, out, parameters)
        return out.permute(0, 3, 1, 2)

    def _with_kernel(self, kernel: ModuleType, images: Tensor, out: Tensor, parameters: Parameters) -> None:
        p, n = parameters, len(images)
        pixels, result = images.contiguous().numpy(), out.numpy()
        factors = np.stack([p.brightness, p.contrast, p.saturation, p.hue, p.sigma], axis=1)
        switches = np.stack([p.grayscale, p.blur, p.solarize], axis=1)
        constants = blur_kernel_size(self.image_size), np.array(MEAN, np.float32), np.array(STD, np.float32)

        def work(part: slice) -> None:
            arguments = (p.jitter[part], factors[part], p.order[part], switches[part])
            kernel.augment_views(pixels[part], result[part], *arguments, *constants)

        num_threads = torch.get_num_threads()
        size = -(-n // num_threads)
        parts = [slice(i, i + size) for i in range(0, n, size)]
        if len(parts) == 1:
            work(parts[0])
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(work, parts))

    def _with_torch(self, images: Tensor, out: Tensor, parameters: Parameters) -> None:
        S = images.shape[1]
        # Views with hue at the same place in their order are processed together: the three other operations are all
        # blends, which differ in their factors only.
        hue_place = np.where(parameters.jitter, (parameters.order == _HUE).argmax(1), -1)
        with torch.autocast(images.device.type, enabled=False):
            for place in range(-1, 4):
                chosen = np.flatnonzero(hue_place == place)
                step = len(chosen) if images.is_cuda else _PIECE_BYTES // (12 * S * S)
                step = max(step, 1)
                for i in range(0, len(chosen), step):
                    self._augment_some(images, out, parameters, chosen[i : i + step], place)

    def _augment_some(
        self, images: Tensor, out: Tensor, parameters: Parameters, chosen: NDArray[np.int64], hue_place: int
    ) -> None:
        """Processes the views `chosen`, whose hue comes after `hue_place` blends (-1: no jitter)."""
        device = images.device
        index = _to(chosen, device)
        x = _unit_range(images.index_select(0, index))
        if hue_place >= 0:
            scale, gray, mean = (_to(table, device) for table in _blends(parameters, chosen))
            for k in range(_NUM_BLENDS + 1):
                if k == hue_place:
                    rotate_hue_(x, _to(parameters.hue[chosen].astype(np.float32), device))
                if k < _NUM_BLENDS:
                    blend_(x, scale[k], gray[k], mean[k])
        for mask, operation in (
            (parameters.grayscale, _grayscale),
            (parameters.blur, self._blur),
            (parameters.solarize, _solarize),
        ):
            here = np.flatnonzero(mask[chosen])
            if len(here) == len(chosen):
                x = operation(x, parameters, chosen)
            elif len(here):
                part = _to(here, device)
                x[part] = operation(x[part], parameters, chosen[here])
        out.index_copy_(0, index, torch.stack(_normalize_(x).unbind(1), dim=-1))

    def _blur(self, x: Tensor, parameters: Parameters, chosen: NDArray[np.int64]) -> Tensor:
        sigma = _to(parameters.sigma[chosen].astype(np.float32), x.device)
        return gaussian_blur(x, sigma, blur_kernel_size(self.image_size))


def normalize(images: Tensor) -> Tensor:
    """uint8 [b, S, S, 3] to float32 [b, 3, S, S], channels_last, normalised as in `Augment`: for evaluation."""
    x = images.float().mul_(1 / 255)
    return x.sub_(_constant(MEAN, x)).mul_(1 / _constant(STD, x)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Operations on x float32 [n, 3, S, S] in [0, 1], each view with its own parameter [n]


def blend_(x: Tensor, scale: Tensor, gray: Tensor, mean: Tensor) -> Tensor:
    """scale * x + gray * (the grey image) + mean * (its mean), clamped to [0, 1], in place.

    With factor f: adjust_brightness is (f, 0, 0), adjust_saturation (f, 1 - f, 0), adjust_contrast (f, 0, 1 - f).
    """
    luminance = _luminance(x)
    offset = luminance.mean((2, 3), keepdim=True).mul_(_per_view(mean))
    x.mul_(_per_view(scale)).add_(luminance.mul_(_per_view(gray)).add_(offset))
    return x.clamp_(0, 1)


def rotate_hue_(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue, in place: torchvision's adjust_hue without converting to HSV.

    With maximum V, minimum m and C = V - m, and hues in sixths of a turn, a channel is V - C clip(d - 1, 0, 1) where
    d is the distance of the pixel's hue from the channel's own hue: 0 for red, 2 for green, -2 for blue.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # From red over yellow and green to cyan, where g >= b, the hue is 2C - V - r + g + b in units of C: it grows by 1
    # whenever one channel goes from one end of its range to the other. The other half, over magenta, is symmetric.
    hue = (2 * chroma).sub_(value).sub_(r).add_(g).add_(b).mul_((g - b).add_(_TINY).sign_())
    hue.div_(chroma.clamp_min(_TINY)).add_(6 * turns.view(-1, 1, 1))
    hue.sub_((hue / 6).round_().mul_(6))  # to -3 .. 3
    for channel, centre in zip((r, g, b), (0, 2, -2), strict=True):
        away = (hue - centre).abs_()
        if centre:  # the shorter of the two distances around the circle
            away.sub_(3).abs_().neg_().add_(3)
        channel.copy_(value).addcmul_(chroma, away.sub_(1).clamp_(0, 1), value=-1)
    return x


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """torchvision's gaussian_blur with a sigma for each view: two convolutions with a kernel for each channel."""
    n, C, height, width = x.shape
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, device=x.device)
    weight = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).repeat_interleave(C, 0)  # [n*C, taps]
    x = F.pad(x, (reach,) * 4, mode="reflect").view(1, n * C, height + 2 * reach, width + 2 * reach)
    x = F.conv2d(x, weight[:, None, None, :], groups=n * C)
    return F.conv2d(x, weight[:, None, :, None], groups=n * C).view(n, C, height, width)


def blur_kernel_size(image_size: int) -> int:
    """A tenth of the side, made odd (SimCLR, appendix A)."""
    return image_size // 10 // 2 * 2 + 1


def _grayscale(x: Tensor, parameters: Parameters, chosen: NDArray[np.int64]) -> Tensor:
    return _luminance(x).expand_as(x).contiguous()


def _solarize(x: Tensor, parameters: Parameters, chosen: NDArray[np.int64]) -> Tensor:
    return torch.where(x >= _SOLARIZE_FROM, 1 - x, x)


def _luminance(x: Tensor) -> Tensor:
    """[n, 1, S, S]"""
    r, g, b = x.split(1, dim=1)
    return (r * _GRAY[0]).add_(g, alpha=_GRAY[1]).add_(b, alpha=_GRAY[2])


def _blends(parameters: Parameters, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float32], ...]:
    """The factors (scale, gray, mean) of the three blends of each view in its own order, [3, n] each."""
    order = parameters.order[chosen]
    blends = order[order != _HUE].reshape(-1, _NUM_BLENDS).T  # [3, n] of brightness 0, contrast 1, saturation 2
    factors = np.stack([parameters.brightness[chosen], parameters.contrast[chosen], parameters.saturation[chosen]])
    scale = np.take_along_axis(factors, blends, axis=0)
    gray = np.where(blends == 2, 1 - scale, 0.0)
    mean = np.where(blends == 1, 1 - scale, 0.0)
    return scale.astype(np.float32), gray.astype(np.float32), mean.astype(np.float32)


def _unit_range(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] to float32 [n, 3, S, S] in [0, 1], channel by channel in memory."""
    n, height, width, C = images.shape
    x = torch.empty((n, C, height, width), device=images.device)
    return x.copy_(images.permute(0, 3, 1, 2)).mul_(1 / 255)


def _normalize_(x: Tensor) -> Tensor:
    mean, std = (_constant(values, x).view(3, 1, 1) for values in (MEAN, STD))
    return x.sub_(mean).mul_(1 / std)


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _to(np.array(values, np.float32), like.device)


def _per_view(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _to(values: NDArray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    # From page-locked memory the copy does not make the host wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
