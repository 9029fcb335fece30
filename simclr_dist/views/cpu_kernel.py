"""The operations of torch_operations.py for CPUs, compiled: one view at a time, so that it stays in a core's cache.

torch_operations.py explains the operations; tests compare the two. Runs without the GIL in any number of threads; the
result for a view does not depend on the other views of its batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numba import types
from torch import Tensor

from simclr_dist.data.decode.compiled import compiled
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views.parameters import Column, Parameters
from simclr_dist.views.torch_operations import GRAY, SOLARIZE_FROM

f4 = np.float32
_ZERO, _ONE, _TWO, _THREE, _SIX, _TINY = f4(0), f4(1), f4(2), f4(3), f4(6), f4(1e-12)
_R, _G, _B = map(f4, GRAY)
_HALF, _TO_UNIT = f4(SOLARIZE_FROM), f4(1 / 255)
_BRIGHTNESS, _CONTRAST, _SATURATION = int(Column.BRIGHTNESS), int(Column.CONTRAST), int(Column.SATURATION)
_HUE_TURNS, _ORDER, _SIGMA = int(Column.HUE), int(Column.ORDER), int(Column.SIGMA)
_GRAYSCALE, _SOLARIZE = int(Column.GRAYSCALE), int(Column.SOLARIZE)
# Sums may be added up in any order: only then can the compiler use the CPU's wide registers.
_compiled = partial(compiled, fastmath={"reassoc", "contract", "nsz"})

_plane = types.float32[::1]
_planes = types.float32[:, ::1]
_index = types.uintp


@_compiled(types.void(_planes, types.float32))
def _brightness(x, factor):  # type: ignore[no-untyped-def]
    for c in range(len(x)):
        plane = x[c]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * factor, _ZERO), _ONE)


@_compiled(types.void(_planes, types.float32))
def _contrast(x, factor):  # type: ignore[no-untyped-def]
    r, g, b = x[0], x[1], x[2]
    total = _ZERO
    for i in range(r.size):
        total += _R * r[i] + _G * g[i] + _B * b[i]
    offset = (_ONE - factor) * (total / f4(r.size))
    for c in range(3):
        plane = x[c]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * factor + offset, _ZERO), _ONE)


@_compiled(types.void(_planes, types.float32))
def _saturation(x, factor):  # type: ignore[no-untyped-def]
    r, g, b = x[0], x[1], x[2]
    rest = _ONE - factor
    for i in range(r.size):
        gray = rest * (_R * r[i] + _G * g[i] + _B * b[i])
        r[i] = min(max(r[i] * factor + gray, _ZERO), _ONE)
        g[i] = min(max(g[i] * factor + gray, _ZERO), _ONE)
        b[i] = min(max(b[i] * factor + gray, _ZERO), _ONE)


@_compiled(types.void(_planes, types.float32))
def _hue(x, turns):  # type: ignore[no-untyped-def]
    """As rotate_hue_ in torch_operations.py."""
    r, g, b = x[0], x[1], x[2]
    shift = _SIX * turns
    for i in range(r.size):
        red, green, blue = r[i], g[i], b[i]
        value = max(max(red, green), blue)
        chroma = value - min(min(red, green), blue)
        way = _TWO * chroma - value - red + green + blue
        hue = (way if green >= blue else -way) / max(chroma, _TINY) + shift
        hue = hue - _SIX if hue > _THREE else hue
        hue = hue + _SIX if hue < -_THREE else hue
        r[i] = value - chroma * min(max(abs(hue) - _ONE, _ZERO), _ONE)
        g[i] = value - chroma * min(max(_TWO - abs(abs(hue - _TWO) - _THREE), _ZERO), _ONE)
        b[i] = value - chroma * min(max(_TWO - abs(abs(hue + _TWO) - _THREE), _ZERO), _ONE)


@_compiled(types.void(_planes))
def _grayscale(x):  # type: ignore[no-untyped-def]
    r, g, b = x[0], x[1], x[2]
    for i in range(r.size):
        gray = _R * r[i] + _G * g[i] + _B * b[i]
        r[i] = gray
        g[i] = gray
        b[i] = gray


@_compiled(types.void(_planes))
def _solarize(x):  # type: ignore[no-untyped-def]
    for c in range(len(x)):
        plane = x[c]
        for i in range(plane.size):
            plane[i] = _ONE - plane[i] if plane[i] >= _HALF else plane[i]


@_compiled(types.void(_plane, _index, _plane, _index, _index, _index, _index, _index, types.float32, types.float32))
def _add_pairs(out, o, x, a, b, c, d, n, near, far):  # type: ignore[no-untyped-def]
    """out[o:o+n] += near * (x[a:] + x[b:]) + far * (x[c:] + x[d:]): two pairs at once, since writing takes longest.

    Indices are unsigned, so that the compiled code need not handle negative ones.
    """
    for i in range(n):
        out[o + i] += near * (x[a + i] + x[b + i]) + far * (x[c + i] + x[d + i])


@_compiled(types.void(_planes, types.int64, types.float64, types.int64, _plane, _plane))
def _blur(x, side, sigma, kernel_size, scratch, row):  # type: ignore[no-untyped-def]
    """scratch [side * side], row [side + kernel_size + 1]. Borders are reflected without repeating the edge."""
    reach = kernel_size // 2
    margin = reach + 1
    # The taps of each side are used in pairs: the last one may be one too many, with weight zero.
    weight = np.zeros(reach + 2, np.float64)
    for t in range(reach + 1):
        weight[t] = np.exp(-0.5 * (t / sigma) ** 2)
    weight /= 2 * weight.sum() - weight[0]
    k = weight.astype(np.float32)
    start = np.empty(side + 2 * margin, np.uintp)  # index of row y in a plane, for y from -margin on
    for y in range(-margin, side + margin):
        inside = abs(y)
        inside = 2 * (side - 1) - inside if inside >= side else inside
        start[y + margin] = side * min(max(inside, 0), side - 1)
    row[:] = _ZERO
    n = np.uintp(side)
    for c in range(len(x)):
        plane = x[c]
        for y in range(side):
            at = y + margin
            o = start[at]
            for i in range(n):
                scratch[o + i] = k[0] * plane[o + i]
            for t in range(1, reach + 1, 2):
                _add_pairs(
                    scratch,
                    o,
                    plane,
                    start[at - t],
                    start[at + t],
                    start[at - t - 1],
                    start[at + t + 1],
                    n,
                    k[t],
                    k[t + 1],
                )
        for y in range(side):
            o = start[y + margin]
            for i in range(n):
                row[np.uintp(margin) + i] = scratch[o + i]
            for t in range(1, reach + 1):
                row[margin - t] = row[margin + t]
                row[margin + side - 1 + t] = row[margin + side - 1 - t]
            for i in range(n):
                plane[o + i] = k[0] * scratch[o + i]
            for t in range(1, reach + 1, 2):
                left, right = np.uintp(margin - t), np.uintp(margin + t)
                one = np.uintp(1)
                _add_pairs(plane, o, row, left, right, left - one, right + one, n, k[t], k[t + 1])


@_compiled(
    types.void(
        types.uint8[:, :, :, ::1], types.float32[:, :, :, ::1], types.float64[:, ::1], types.int64, _plane, _plane
    )
)
def augment_some(images, out, table, kernel_size, mean, std):  # type: ignore[no-untyped-def]
    """Augments n views, uint8 images [n, S, S, 3] to normalised float32 out [n, S, S, 3]; mean, std [3]."""
    n, S = images.shape[0], images.shape[1]
    P = S * S
    x = np.empty((3, P), np.float32)
    r, g, b = x[0], x[1], x[2]
    scale = _ONE / std
    scratch = np.empty(P, np.float32)
    row = np.empty(S + kernel_size + 1, np.float32)
    for k in range(n):
        # Flat, so that the compiler sees three values per pixel.
        pixels = images[k].reshape(3 * P)
        for i in range(P):
            r[i] = f4(pixels[3 * i]) * _TO_UNIT
            g[i] = f4(pixels[3 * i + 1]) * _TO_UNIT
            b[i] = f4(pixels[3 * i + 2]) * _TO_UNIT
        for step in range(4):
            operation = int(table[k, _ORDER + step])
            if operation == _BRIGHTNESS:
                _brightness(x, f4(table[k, _BRIGHTNESS]))
            elif operation == _CONTRAST:
                _contrast(x, f4(table[k, _CONTRAST]))
            elif operation == _SATURATION:
                _saturation(x, f4(table[k, _SATURATION]))
            elif operation == _HUE_TURNS:
                _hue(x, f4(table[k, _HUE_TURNS]))
        if table[k, _GRAYSCALE]:
            _grayscale(x)
        if table[k, _SIGMA]:
            _blur(x, S, table[k, _SIGMA], kernel_size, scratch, row)
        if table[k, _SOLARIZE]:
            _solarize(x)
        target = out[k].reshape(3 * P)
        for i in range(P):
            target[3 * i] = (r[i] - mean[0]) * scale[0]
            target[3 * i + 1] = (g[i] - mean[1]) * scale[1]
            target[3 * i + 2] = (b[i] - mean[2]) * scale[2]


@_compiled(types.void(_plane, types.float32))
def _contrast_of_channel(plane, factor):  # type: ignore[no-untyped-def]
    total = _ZERO
    for i in range(plane.size):
        total += plane[i]
    offset = (_ONE - factor) * (total / f4(plane.size))
    for i in range(plane.size):
        plane[i] = min(max(plane[i] * factor + offset, _ZERO), _ONE)


def _signature(number):  # type: ignore[no-untyped-def]
    of_channels = types.float64[:, :, ::1]
    table, views = types.float64[:, ::1], types.float32[:, :, :, ::1]
    number_of, unit = types.int64, types.float32
    return types.void(number[:, :, :, ::1], views, table, of_channels, number_of, unit, _plane, _plane)


@_compiled([_signature(types.uint8), _signature(types.uint16)])
def augment_some_channels(images, out, table, of_channels, kernel_size, unit, mean, std):  # type: ignore[no-untyped-def]
    """As `augment_some`, for views [n, S, S, C] of other pixels; unit: 1 / the largest value.

    of_channels: float64 [n, 2, C], see Parameters; of size 0 for RGB.
    """
    n, S, C = images.shape[0], images.shape[1], images.shape[3]
    P = S * S
    x = np.empty((C, P), np.float32)
    scale = _ONE / std
    scratch = np.empty(P, np.float32)
    row = np.empty(S + kernel_size + 1, np.float32)
    is_rgb = of_channels.size == 0
    for k in range(n):
        pixels = images[k].reshape(C * P)
        for c in range(C):
            plane = x[c]
            for i in range(P):
                plane[i] = f4(pixels[C * i + c]) * unit
        for step in range(4):
            operation = int(table[k, _ORDER + step])
            if is_rgb:
                if operation == _BRIGHTNESS:
                    _brightness(x, f4(table[k, _BRIGHTNESS]))
                elif operation == _CONTRAST:
                    _contrast(x, f4(table[k, _CONTRAST]))
                elif operation == _SATURATION:
                    _saturation(x, f4(table[k, _SATURATION]))
                elif operation == _HUE_TURNS:
                    _hue(x, f4(table[k, _HUE_TURNS]))
            elif operation == _BRIGHTNESS:
                for c in range(C):
                    _brightness(x[c : c + 1], f4(of_channels[k, 0, c]))
            elif operation == _CONTRAST:
                for c in range(C):
                    _contrast_of_channel(x[c], f4(of_channels[k, 1, c]))
        if table[k, _GRAYSCALE]:
            _grayscale(x)
        if table[k, _SIGMA]:
            _blur(x, S, table[k, _SIGMA], kernel_size, scratch, row)
        if table[k, _SOLARIZE]:
            _solarize(x)
        target = out[k].reshape(C * P)
        for c in range(C):
            plane = x[c]
            for i in range(P):
                target[C * i + c] = (plane[i] - mean[c]) * scale[c]


def augment_views(
    images: Tensor, out: Tensor, parameters: Parameters, kernel_size: int, pixels: PixelFormat = RGB
) -> None:
    """Images [n, S, S, C] of that format to normalised out [n, S, S, C], by torch's number of threads.

    kernel_size: odd.
    """
    samples, result, table = images.contiguous().numpy(), out.numpy(), parameters.table()
    statistics = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
    each = parameters.of_channels
    num_threads = torch.get_num_threads()
    size = -(-len(samples) // num_threads)

    def work(first: int) -> None:
        part = slice(first, first + size)
        if pixels.is_usual:
            augment_some(samples[part], result[part], table[part], kernel_size, *statistics)
        else:
            unit = f4(1 / pixels.largest)
            some = samples[part], result[part], table[part], np.ascontiguousarray(each[part])
            augment_some_channels(*some, kernel_size, unit, *statistics)

    starts = range(0, len(samples), size)
    if len(starts) == 1:
        work(0)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, starts))
