"""The operations of torch_operations.py for GPUs, fused: an image is read twice and written once, or thrice with blur.

    gray_sums    the grey levels that contrast will meet, summed over blocks of pixels
    colours      every pixel's own operations: jitter in the view's order, grayscale; without blur, the finish too
    blur         along one axis; launched for the columns, then with the finish for the rows

The finish is solarisation and normalisation. What is done to a view stands in the table of parameters on the device, so
shapes and launches are the same at every step, whatever was drawn. The sums of blocks are added in a fixed order.

Importing this module needs triton; `implementations.py` does so and compares the result with torch's operations before
the first step. Tests run the kernels by triton's interpreter on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_dist.data.normalisation import MEAN, STD
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views.parameters import NUM_COLUMNS, Column, Parameters
from simclr_dist.views.torch_operations import GRAY, SOLARIZE_FROM

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_BLOCK = 1024  # pixels
_COLUMN_TILE = (32, 32)  # rows and numbers of a row, 3 a pixel: long in the direction of the blur, whole cache lines
_ROW_TILE = (8, 128)

_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)
_CONTRAST, _SATURATION, _HUE = (tl.constexpr(int(c)) for c in (Column.CONTRAST, Column.SATURATION, Column.HUE))
_ORDER, _SIGMA = tl.constexpr(int(Column.ORDER)), tl.constexpr(int(Column.SIGMA))
_GRAYSCALE, _SOLARIZE = tl.constexpr(int(Column.GRAYSCALE)), tl.constexpr(int(Column.SOLARIZE))
_GRAY_R, _GRAY_G, _GRAY_B = (tl.constexpr(x) for x in GRAY)
_MEAN_R, _MEAN_G, _MEAN_B = (tl.constexpr(x) for x in MEAN)
_SCALE_R, _SCALE_G, _SCALE_B = (tl.constexpr(1 / x) for x in STD)
_SOLARIZE_FROM = tl.constexpr(SOLARIZE_FROM)
_TO_UNIT = tl.constexpr(1 / 255)


def augment_views(
    images: Tensor, out: Tensor, parameters: Parameters, kernel_size: int, pixels: PixelFormat = RGB
) -> None:
    """uint8 images [n, S, S, 3] to normalised out [n, S, S, 3], both on one GPU; kernel_size: of the blur, odd.

    Raises ValueError for other pixels.
    """
    if pixels != RGB:
        raise ValueError(f"Triton's kernels are for 8-bit RGB, not {pixels}")
    table = torch.from_numpy(parameters.table().astype("float32"))
    if not images.is_cuda:  # in triton's interpreter
        launch(images, out, table, kernel_size)
        return
    with torch.cuda.device(images.device):  # triton launches on the current one
        # From page-locked memory the copy does not make the host wait.
        launch(images, out, table.pin_memory().to(images.device, non_blocking=True), kernel_size)


def launch(images: Tensor, out: Tensor, table: Tensor, kernel_size: int) -> None:
    """`augment_views` with the table of parameters, float32 [n, NUM_COLUMNS], on the device already."""
    n, S = images.shape[:2]
    images, blocks, reach = images.contiguous(), triton.cdiv(S * S, _BLOCK), kernel_size // 2
    sums = torch.empty(n, blocks, device=images.device)
    shape: dict[str, Any] = {"SIDE": S, "BLOCK": _BLOCK, **OPTIONS}
    _gray_sums_kernel[(n * blocks,)](images, table, sums, **shape)
    padded = triton.next_power_of_2(blocks)
    _colours_kernel[(n * blocks,)](images, table, sums, out, **shape, BLOCKS_PADDED=padded, BLURS=reach > 0)
    if reach:
        between = torch.empty_like(out)
        for source, target, tile, down in ((out, between, _COLUMN_TILE, True), (between, out, _ROW_TILE, False)):
            grid = (n * triton.cdiv(S, tile[0]) * triton.cdiv(3 * S, tile[1]),)
            shape = {"SIDE": S, "REACH": reach, "ROWS": tile[0], "NUMBERS": tile[1], "DOWN": down, **OPTIONS}
            _blur_kernel[grid](source, table, target, **shape)


@triton.jit
def _gray(r, g, b):  # type: ignore[no-untyped-def]
    return r * _GRAY_R + g * _GRAY_G + b * _GRAY_B


@triton.jit
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _blended(x, factor, other):  # type: ignore[no-untyped-def]
    return _clamp(x * factor + (1 - factor) * other, 0.0, 1.0)


@triton.jit
def _turned(r, g, b, turns):  # type: ignore[no-untyped-def]
    """As rotate_hue_ in torch_operations.py."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    way = 2 * chroma - value - r + g + b
    hue = tl.where(g >= b, way, -way) / tl.maximum(chroma, 1e-12) + 6 * turns
    hue = tl.where(hue > 3, hue - 6, tl.where(hue < -3, hue + 6, hue))
    r = value - chroma * _clamp(tl.abs(hue) - 1, 0.0, 1.0)
    g = value - chroma * _clamp(2 - tl.abs(tl.abs(hue - 2) - 3), 0.0, 1.0)
    b = value - chroma * _clamp(2 - tl.abs(tl.abs(hue + 2) - 3), 0.0, 1.0)
    return r, g, b


@triton.jit
def _jittered(r, g, b, operation, parameters, mean):  # type: ignore[no-untyped-def]
    """One operation of the jitter, none for -1; mean: of the grey levels before contrast."""
    if operation == _HUE:
        r, g, b = _turned(r, g, b, tl.load(parameters + _HUE))
    elif operation >= 0:
        factor = tl.load(parameters + operation)
        other = tl.where(operation == _SATURATION, _gray(r, g, b), tl.where(operation == _CONTRAST, mean, 0.0))
        r, g, b = _blended(r, factor, other), _blended(g, factor, other), _blended(b, factor, other)
    return r, g, b


@triton.jit
def _pixels(images, table, SIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The colours of this program's pixels, where they lie, which of them exist, and the view's parameters."""
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    view = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = i < SIDE * SIDE
    place = view * (SIDE * SIDE * 3) + i * 3
    r = tl.load(images + place, mask=real, other=0).to(tl.float32) * _TO_UNIT
    g = tl.load(images + place + 1, mask=real, other=0).to(tl.float32) * _TO_UNIT
    b = tl.load(images + place + 2, mask=real, other=0).to(tl.float32) * _TO_UNIT
    return r, g, b, place, real, table + view * _NUM_COLUMNS


@triton.jit
def _gray_sums_kernel(images, table, sums, SIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    r, g, b, _, real, parameters = _pixels(images, table, SIDE, BLOCK)
    before_contrast = True
    for step in tl.static_range(4):
        operation = tl.load(parameters + _ORDER + step).to(tl.int32)
        before_contrast = before_contrast & (operation != _CONTRAST)
        if before_contrast:
            r, g, b = _jittered(r, g, b, operation, parameters, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(real, _gray(r, g, b), 0.0), 0))


@triton.jit
def _finished(x, parameters, mean, scale):  # type: ignore[no-untyped-def]
    solarize_from = tl.where(tl.load(parameters + _SOLARIZE) > 0, _SOLARIZE_FROM, 2.0)  # no x is 2
    return (tl.where(x >= solarize_from, 1 - x, x) - mean) * scale


@triton.jit
def _colours_kernel(  # type: ignore[no-untyped-def]
    images,
    table,
    sums,  # [n, blocks]
    out,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    BLURS: tl.constexpr,
):
    r, g, b, place, real, parameters = _pixels(images, table, SIDE, BLOCK)
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    k = tl.arange(0, BLOCKS_PADDED)
    mean = tl.sum(tl.load(sums + tl.program_id(0) // blocks * blocks + k, mask=k < blocks, other=0.0), 0) / (
        SIDE * SIDE
    )
    for step in tl.static_range(4):
        operation = tl.load(parameters + _ORDER + step).to(tl.int32)
        r, g, b = _jittered(r, g, b, operation, parameters, mean)
    if tl.load(parameters + _GRAYSCALE) > 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    finish = True
    if BLURS:
        finish = tl.load(parameters + _SIGMA) == 0
    if finish:
        r = _finished(r, parameters, _MEAN_R, _SCALE_R)
        g = _finished(g, parameters, _MEAN_G, _SCALE_G)
        b = _finished(b, parameters, _MEAN_B, _SCALE_B)
    tl.store(out + place, r, mask=real)
    tl.store(out + place + 1, g, mask=real)
    tl.store(out + place + 2, b, mask=real)


@triton.jit
def _inside(position, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reflects positions across the borders, without repeating the edge."""
    position = tl.abs(position)
    return tl.where(position < SIDE, position, 2 * (SIDE - 1) - position)


@triton.jit
def _blur_kernel(  # type: ignore[no-untyped-def]
    source,
    table,
    target,
    SIDE: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    NUMBERS: tl.constexpr,
    DOWN: tl.constexpr,
):
    row_tiles: tl.constexpr = (SIDE + ROWS - 1) // ROWS
    number_tiles: tl.constexpr = (3 * SIDE + NUMBERS - 1) // NUMBERS
    view = (tl.program_id(0) // (row_tiles * number_tiles)).to(tl.int64)
    parameters = table + view * _NUM_COLUMNS
    sigma = tl.load(parameters + _SIGMA)
    if sigma > 0:
        tile = tl.program_id(0) % (row_tiles * number_tiles)
        row = (tile // number_tiles * ROWS + tl.arange(0, ROWS))[:, None]
        number = (tile % number_tiles * NUMBERS + tl.arange(0, NUMBERS))[None, :]
        real = (row < SIDE) & (number < 3 * SIDE)
        place = row * (3 * SIDE) + number
        source += view * (SIDE * SIDE * 3)
        if DOWN:
            position, stride = row, 3 * SIDE
        else:
            position, stride = number // 3, 3
        total = tl.load(source + place, mask=real, other=0.0).to(tl.float32)
        weights = 1.0
        for t in range(1, REACH + 1):
            weight = tl.exp(-0.5 * (t / sigma) * (t / sigma))
            before = place + (_inside(position - t, SIDE) - position) * stride
            after = place + (_inside(position + t, SIDE) - position) * stride
            pair = tl.load(source + before, mask=real, other=0.0) + tl.load(source + after, mask=real, other=0.0)
            total += weight * pair
            weights += 2 * weight
        x = total / weights
        if not DOWN:
            channel = number % 3
            mean = tl.where(channel == 0, _MEAN_R, tl.where(channel == 1, _MEAN_G, _MEAN_B))
            scale = tl.where(channel == 0, _SCALE_R, tl.where(channel == 1, _SCALE_G, _SCALE_B))
            x = _finished(x, parameters, mean, scale)
        tl.store(target + view * (SIDE * SIDE * 3) + place, x, mask=real)
