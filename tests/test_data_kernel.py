"""The kernel's resize and the crops: against OpenCV, torch, torchvision and plain Python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from simclr_dist.data.decode.crops import center_crops, draw_crops, random_crops
from simclr_dist.data.randomness import keys, uniform
from tests.images import make_image

pytest.importorskip("numba")
kernel = pytest.importorskip("simclr_dist.data.decode.kernel")


def resized(
    pixels: np.ndarray, size: int, crop: tuple[int, int, int, int] | None = None, flip: bool = False
) -> np.ndarray:
    height, width, _ = pixels.shape
    top, left, h, w = crop or (0, 0, height, width)
    S = size
    out = np.empty((S, S, 3), np.uint8)
    taps = max(height, width) // S + 3
    kernel.resize_crop(
        pixels.reshape(1, -1).copy(),
        3 * width,
        np.array([top, left, h, w, flip], np.int32),
        out,
        np.empty(3 * max(height, width) + 8, np.int16),
        np.empty(3 * max(height, width) + 8, np.int32),
        np.empty((2, S), np.int32),
        np.empty((2, S), np.int32),
        np.empty((2, S, taps), np.int32),
    )
    return out


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (33, 32), (500, 375), (2000, 40), (32, 3000)])
def test_shrinking_is_opencvs_area(height: int, width: int) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = make_image(0, height, width)
    assert distance(resized(pixels, 32), cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)) <= 1


@pytest.mark.parametrize("side", [1, 2, 7, 31])
def test_enlarging_is_torchs_bilinear(side: int) -> None:
    pixels = make_image(1, side, side)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear").round()[0].permute(1, 2, 0).numpy()
    assert distance(resized(pixels, 32), expected) <= 1


def test_a_crop_is_the_resize_of_the_cut_image() -> None:
    pixels = make_image(2, 80, 120)
    cut = np.ascontiguousarray(pixels[11:61, 30:101])
    assert np.array_equal(resized(pixels, 24, (11, 30, 50, 71)), resized(cut, 24))


def test_the_size_itself_changes_nothing() -> None:
    pixels = make_image(3, 40, 40)
    assert np.array_equal(resized(pixels, 40), pixels)
    assert np.array_equal(resized(make_image(3, 60, 70), 40, (7, 9, 40, 40)), make_image(3, 60, 70)[7:47, 9:49])


def test_flip_is_the_mirror_image() -> None:
    pixels = make_image(4, 50, 70)
    assert np.array_equal(resized(pixels, 32, flip=True), resized(pixels, 32)[:, ::-1])


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("shape", [(1, 1), (9, 200), (500, 333), (32, 32), (6000, 3)])
def test_a_plain_image_stays_plain(level: int, shape: tuple[int, int]) -> None:
    assert (resized(np.full((*shape, 3), level, np.uint8), 32) == level).all()


def oracle_crop(height: int, width: int, sample: int, view: int, scale_min: float) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, with our numbers in place of torch's."""

    def draw(i: int) -> float:
        return float(uniform(keys(5, 2, sample, view), i)[0])

    low, high = math.log(3 / 4), math.log(4 / 3)
    for attempt in range(10):
        area = height * width * (scale_min + (1 - scale_min) * draw(4 * attempt))
        ratio = math.exp(low + (high - low) * draw(4 * attempt + 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw(4 * attempt + 2) * (height - h + 1))
            return [top, int(draw(4 * attempt + 3) * (width - w + 1)), h, w, int(draw(64) < 0.5)]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w, int(draw(64) < 0.5)]


@pytest.mark.parametrize("scale_min", [0.08, 0.5, 1.0])
def test_crops_follow_torchvisions_rule(scale_min: float) -> None:
    sizes = [(32, 32), (375, 500), (1200, 100), (60, 999), (2, 3), (75, 56)]
    ids = np.arange(300)
    heights, widths = np.array([sizes[i % len(sizes)] for i in ids]).T
    view_keys = keys(5, 2, ids[None], np.arange(2)[:, None])
    table = random_crops(view_keys, heights, widths, scale_min=scale_min, flip_p=0.5)
    expected = [
        [oracle_crop(int(heights[i]), int(widths[i]), int(i), view, scale_min) for i in ids] for view in range(2)
    ]
    assert table.tolist() == expected


def test_compiled_crops_are_those_of_numpy_to_the_last_bit() -> None:
    n = 20_000
    sides = np.array([1, 2, 3, 5, 32, 33, 96, 375, 500, 2000], np.float64)
    heights, widths = sides[np.arange(n) % 10], sides[np.arange(n) // 10 % 10]
    view_keys = keys(3, 1, np.arange(n), 0)
    for scale_min in (0.08, 1.0):
        expected = np.empty((n, 5), np.int32)
        draw_crops(view_keys, heights, widths, scale_min, 0.5, expected)
        found = random_crops(view_keys, heights, widths, scale_min=scale_min, flip_p=0.5)
        assert np.array_equal(found, expected)


def test_a_crop_writes_nothing_beside_its_own_pixels() -> None:
    """Four bytes are written for three: the last must not reach a view that another thread may have written."""
    pixels = make_image(5, 40, 40).reshape(1, -1)
    for size in (1, 2, 31, 32, 50):
        views = np.full((3, size, size, 3), 77, np.uint8)
        row, sums = np.empty(128, np.int16), np.empty(128, np.int32)
        first, count, weight = (
            np.empty((2, size), np.int32),
            np.empty((2, size), np.int32),
            np.empty((2, size, 43), np.int32),
        )
        for flip in (0, 1):
            crop = np.array([0, 0, 40, 40, flip], np.int32)
            kernel.resize_crop(pixels, 120, crop, views[1], row, sums, first, count, weight)
        assert (views[::2] == 77).all()


def test_crops_are_distributed_as_torchvisions() -> None:
    height, width, n = 375, 500, 4000
    view_keys = keys(0, 0, np.arange(n), 0)
    table = random_crops(view_keys, np.full(n, height), np.full(n, width), scale_min=0.08, flip_p=0.5)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])

    def features(t: np.ndarray) -> np.ndarray:
        top, left, h, w = t[:, :4].T
        return np.stack([h * w / (height * width), np.log(w / h), top / (height - h + 1), left / (width - w + 1)])

    for ours, reference in zip(features(table), features(theirs), strict=True):
        grid = np.quantile(reference, np.linspace(0.05, 0.95, 19))
        gap = abs(np.searchsorted(np.sort(ours), grid) / n - np.searchsorted(np.sort(reference), grid) / n)
        assert gap.max() < 0.045  # two-sample Kolmogorov-Smirnov: p < 1e-3
    assert abs(table[:, 4].mean() - 0.5) < 0.03


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 50), (3000, 1), (2, 5)])
def test_crops_of_tiny_images_lie_inside(shape: tuple[int, int]) -> None:
    table = random_crops(
        keys(0, 0, np.arange(500), 0), np.full(500, shape[0]), np.full(500, shape[1]), scale_min=0.08, flip_p=0.5
    )
    top, left, h, w = table[:, :4].T
    assert (np.stack([h, w]) >= 1).all()
    assert (np.stack([top, left]) >= 0).all()
    assert (top + h <= shape[0]).all()
    assert (left + w <= shape[1]).all()


def test_center_crop_keeps_seven_eighths_of_the_shorter_side() -> None:
    table = center_crops(np.array([256, 375, 224]), np.array([256, 500, 224]), 224)
    assert table.tolist() == [[16, 16, 224, 224, 0], [23, 86, 328, 328, 0], [0, 0, 224, 224, 0]]


def test_statuses_name_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(200)) * 2)
    #          offset size mode height width
    records = np.array(
        [
            [0, 300, kernel.RAW, 10, 10],
            [0, 301, kernel.RAW, 10, 10],
            [200, 300, kernel.RAW, 10, 10],
            [0, 400, kernel.JPEG, 10, 10],
            [0, 500, kernel.RAW, 10, 10],
            [0, 300, kernel.RAW, 40, 40],
        ]
    )
    status = np.full(len(records), -1, np.int32)
    scratch = np.zeros((1, 400), np.uint8), np.zeros((1, 400), np.uint8)
    crops = np.zeros((1, len(records), 5), np.int32)
    crops[..., 2:4] = 10
    out = np.zeros((1, len(records), 4, 4, 3), np.uint8)
    with open(tmp_path / "data", "rb") as file:
        kernel.decode_and_crop(file.fileno(), records, crops, out, status, *scratch)
    K = kernel
    assert status.tolist() == [K.OK, K.WRONG_SIZE, K.UNREADABLE, K.UNDECODABLE, K.WRONG_SIZE, K.WRONG_SIZE]
    assert out[0, 0].any()
    assert not out[0, 1:].any()
