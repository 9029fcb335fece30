"""The operations by torch, on any device: what the kernels are compared with, and what runs where there is none.

Each gives the same result as torchvision's for the same parameters (tests/test_augment.py).

Letters: n views, S the side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views.parameters import Column, Parameters

GRAY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
SOLARIZE_FROM = 0.5

_NUM_BLENDS = 3
_TINY = 1e-12  # avoids division by zero without changing a pixel

# On a CPU, images are processed in pieces of so many bytes of float32, which fit into a core's cache.
_PIECE_BYTES = 1 << 19


def augment_views(
    images: Tensor, out: Tensor, parameters: Parameters, kernel_size: int, pixels: PixelFormat = RGB
) -> None:
    """Images [n, S, S, C] of that format to normalised out [n, S, S, C]; kernel_size: of the blur, odd."""
    S, C = images.shape[1], images.shape[3]
    if parameters.of_channels.size:
        step = len(images) if images.is_cuda else max(1, _PIECE_BYTES // (4 * C * S * S))
        with torch.autocast(images.device.type, enabled=False):
            for start in range(0, len(images), step):
                chosen = np.arange(start, min(start + step, len(images)))
                x = _each_channel_changed(_unit_range(images[start : start + step], pixels), parameters, chosen)
                _finish(x, out, parameters, kernel_size, chosen, pixels)
        return
    # Views with hue at the same place in their order are processed together: the three other operations are all
    # blends, which differ in their factors only.
    hue_place = np.where(parameters.jitter, (parameters.order == Column.HUE).argmax(1), -1)
    with torch.autocast(images.device.type, enabled=False):
        for place in range(-1, 4):
            chosen = np.flatnonzero(hue_place == place)
            step = len(chosen) if images.is_cuda else _PIECE_BYTES // (12 * S * S)
            step = max(step, 1)
            for i in range(0, len(chosen), step):
                _augment_some(images, out, parameters, kernel_size, chosen[i : i + step], place, pixels)


def _augment_some(
    images: Tensor,
    out: Tensor,
    parameters: Parameters,
    kernel_size: int,
    chosen: NDArray[np.int64],
    hue_place: int,
    pixels: PixelFormat,
) -> None:
    """Processes the views `chosen`, whose hue comes after `hue_place` blends (-1: no jitter)."""
    device = images.device
    index = _to(chosen, device)
    x = _unit_range(_rows(images, index), pixels)
    if hue_place >= 0:
        scale, gray, mean = (_to(table, device) for table in _blends(parameters, chosen))
        for k in range(_NUM_BLENDS + 1):
            if k == hue_place:
                rotate_hue_(x, _to(parameters.hue[chosen].astype(np.float32), device))
            if k < _NUM_BLENDS:
                blend_(x, scale[k], gray[k], mean[k])
    _finish(x, out, parameters, kernel_size, chosen, pixels)


def _each_channel_changed(x: Tensor, parameters: Parameters, chosen: NDArray[np.int64]) -> Tensor:
    """Brightness and contrast with a factor for each channel, in the order of each view; x [n, C, S, S]."""
    factors, order = parameters.of_channels[chosen], parameters.order[chosen]  # [n, 2, C], [n, 4]
    brightness_first = (order == Column.BRIGHTNESS).argmax(1) < (order == Column.CONTRAST).argmax(1)
    jittered = parameters.jitter[chosen]
    for is_brightness in (brightness_first, ~brightness_first):
        factor = np.where(is_brightness[:, None], factors[:, 0], factors[:, 1])
        scale = np.where(jittered[:, None], factor, 1.0)
        rest = np.where(is_brightness[:, None], 0.0, 1.0 - scale)
        by, towards_mean = (_to(values.astype(np.float32), x.device)[:, :, None, None] for values in (scale, rest))
        x = (x * by).add_(x.mean((2, 3), keepdim=True) * towards_mean).clamp_(0, 1)
    return x


def _finish(
    x: Tensor,
    out: Tensor,
    parameters: Parameters,
    kernel_size: int,
    chosen: NDArray[np.int64],
    pixels: PixelFormat,
) -> None:
    """What comes after the jitter, of x [n, C, S, S] to the rows `chosen` of out."""
    device = x.device

    def blurred(x: Tensor, views: NDArray[np.int64]) -> Tensor:
        return gaussian_blur(x, _to(parameters.sigma[views].astype(np.float32), device), kernel_size)

    for mask, operation in (
        (parameters.grayscale, lambda x, _: _luminance(x).expand_as(x).contiguous()),
        (parameters.blur, blurred),
        (parameters.solarize, lambda x, _: torch.where(x >= SOLARIZE_FROM, 1 - x, x)),
    ):
        here = np.flatnonzero(mask[chosen])
        if len(here) == len(chosen):
            x = operation(x, chosen)
        elif len(here):
            part = _to(here, device)
            x[part] = operation(x[part], chosen[here])
    out.index_copy_(0, _to(chosen, device), torch.stack(_normalize_(x, pixels).unbind(1), dim=-1))


def normalize(images: Tensor, pixels: PixelFormat = RGB) -> Tensor:
    """Images [b, S, S, C] of that format to float32 [b, C, S, S], channels_last, normalised as in `augment_views`."""
    x = images.float().mul_(1 / pixels.largest)
    return x.sub_(_constant(pixels.mean, x)).mul_(1 / _constant(pixels.std, x)).permute(0, 3, 1, 2)


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


def _luminance(x: Tensor) -> Tensor:
    """[n, 1, S, S]"""
    r, g, b = x.split(1, dim=1)
    return (r * GRAY[0]).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


def _blends(parameters: Parameters, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float32], ...]:
    """The factors (scale, gray, mean) of the three blends of each view in its own order, [3, n] each."""
    order = parameters.order[chosen]
    blends = order[order != Column.HUE].reshape(-1, _NUM_BLENDS).T  # [3, n]
    factors = np.stack([parameters.brightness[chosen], parameters.contrast[chosen], parameters.saturation[chosen]])
    scale = np.take_along_axis(factors, blends, axis=0)
    gray = np.where(blends == Column.SATURATION, 1 - scale, 0.0)
    mean = np.where(blends == Column.CONTRAST, 1 - scale, 0.0)
    return scale.astype(np.float32), gray.astype(np.float32), mean.astype(np.float32)


def _rows(images: Tensor, index: Tensor) -> Tensor:
    """Of torch's operations few know uint16: it is looked at as another type of 16 bits."""
    if images.dtype == torch.uint8:
        return images.index_select(0, index)
    return images.view(torch.int16).index_select(0, index).view(images.dtype)


def _unit_range(images: Tensor, pixels: PixelFormat) -> Tensor:
    """[n, S, S, C] to float32 [n, C, S, S] in [0, 1], channel by channel in memory."""
    n, height, width, C = images.shape
    x = torch.empty((n, C, height, width), device=images.device)
    return x.copy_(images.permute(0, 3, 1, 2)).mul_(1 / pixels.largest)


def _normalize_(x: Tensor, pixels: PixelFormat) -> Tensor:
    mean, std = (_constant(values, x).view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    return x.sub_(mean).mul_(1 / std)


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _to(np.array(values, np.float32), like.device)


def _per_view(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _to(values: NDArray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    # From page-locked memory the copy does not make the host wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
