"""JPEG files that `prepare` stores by way of their coefficients: against numpy, and against encoding their pixels.

Run: pytest tests/test_recode.py
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.data.beton import encode
from simclr_dist.data.beton.prepare import PreparedInfo, prepare
from simclr_dist.data.beton.reader import open_beton
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.jpeg_file import JpegFile, read_jpeg_file
from tests.images import make_image

pytest.importorskip("numba", reason="files are recoded where there is numba")
if turbojpeg.unavailable() is not None:
    pytest.skip(str(turbojpeg.unavailable()), allow_module_level=True)

from simclr_dist.data.beton.coefficients import Plane, read_planes
from simclr_dist.data.beton.recode import Recoded, Recoder

QUALITY = 90
SIZES = [(1, 1), (8, 9), (16, 16), (17, 15), (33, 130), (123, 167), (250, 31)]
# Position in a block of each entry of a table, as the standard lists it.
ZIGZAG = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
]  # fmt: skip


def jpeg(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 97, "subsampling": 0, **options})
    return buffer.getvalue()


def parsed(content: bytes) -> JpegFile:
    file = read_jpeg_file(content)
    assert file is not None
    return file


def recoded(content: bytes) -> Recoded | None:
    recoder = encode._recoder(QUALITY)
    assert isinstance(recoder, Recoder)
    return recoder(parsed(content))


def pixels_of(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(np.float64)


def error(content: bytes, original: np.ndarray) -> float:
    return float(((pixels_of(content) - original) ** 2).mean())


def dct(n: int) -> np.ndarray:
    """Orthonormal, float64: [frequency, sample]."""
    basis = np.cos(np.arange(n)[:, None] * (2 * np.arange(n) + 1) * np.pi / (2 * n)) * np.sqrt(2 / n)
    basis[0] /= np.sqrt(2)
    return basis


def coefficients(content: bytes) -> list[np.ndarray]:
    """Of Y, Cb and Cr, dequantised: [rows of blocks, blocks, 8, 8]."""
    file = parsed(content)
    most = max(factor >> 4 for factor in file.frame[7::3])
    planes: list[np.ndarray] = []
    shapes = [
        (-(-file.height * (factor & 15) // (8 * most)), -(-file.width * (factor >> 4) // (8 * most)), 64)
        for factor in file.frame[7::3]
    ]
    found: list[Plane] | None = read_planes(file.content, shapes)
    assert found is not None
    for plane, number in zip(found, file.frame[8::3], strict=True):
        steps = np.empty(64)
        steps[ZIGZAG] = list(file.tables[number])
        planes.append((plane * steps).reshape(*plane.shape[:2], 8, 8))
    return planes


def half(blocks: np.ndarray) -> np.ndarray:
    """By samples: each block at half its size from its lower frequencies, put together, and cut into blocks again."""
    rows, columns = blocks.shape[:2]
    small = dct(4).T @ (blocks[:, :, :4, :4] / 2) @ dct(4)
    samples = small.transpose(0, 2, 1, 3).reshape(4 * rows, 4 * columns)
    samples = np.pad(samples, ((0, 4 * (rows % 2)), (0, 4 * (columns % 2))), "symmetric")
    shape = len(samples) // 8, 8, samples.shape[1] // 8, 8
    return dct(8) @ samples.reshape(shape).transpose(0, 2, 1, 3) @ dct(8).T


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}, {"optimize": True, "quality": 100}])
def test_what_is_stored_are_the_files_coefficients_at_the_wanted_steps(options: dict) -> None:
    steps = [[*parsed(jpeg(make_image(0, 16, 16), quality=QUALITY, subsampling=2)).tables[i]] for i in (0, 1, 1)]
    for number, size in enumerate(SIZES):
        content = jpeg(make_image(number, *size), **options)
        found = recoded(content)
        assert found is not None
        assert not found.kept
        for i, (old, new) in enumerate(zip(coefficients(content), coefficients(found.content), strict=True)):
            exact = half(old) if i and "subsampling" not in options else old
            assert new.shape == exact.shape
            step = np.empty(64)
            step[ZIGZAG] = steps[i]
            assert (np.abs(new - exact) <= step.reshape(8, 8) * 0.501).all(), (size, i)  # the nearest multiple


def test_recoding_loses_no_more_than_encoding_the_pixels() -> None:
    for number, (mode, options) in enumerate(
        [("RGB", {}), ("RGB", {"quality": 93}), ("RGB", {"subsampling": 2}), ("L", {}), ("RGB", {"progressive": True})]
    ):
        image = Image.fromarray(make_image(number, 250, 310)).convert(mode)
        content = jpeg(np.asarray(image), **options)
        original = pixels_of(content)
        found, encoded = recoded(content), encode._jpeg(original.astype(np.uint8), QUALITY)
        assert found is not None
        assert error(found.content, original) < 1.05 * error(encoded, original) + 1 / 12  # that of rounding
        assert len(found.content) < 1.02 * len(encoded)


def test_only_files_whose_coefficients_are_the_image_are_recoded() -> None:
    picture = make_image(0, 123, 167)
    whole = jpeg(picture)
    middle = len(whole) // 2
    assert recoded(whole) is not None
    others = {
        "damaged": whole[:middle] + b"\xff" * 64 + whole[middle + 64 :],
        "cut off": whole[:middle],
        "4:2:2": jpeg(picture, subsampling=1),
        "RGB": whole.replace(b"JFIF", b"JFIX").replace(b"\x01\x11\x00\x02\x11\x01\x03", b"R\x11\x00G\x11\x01B"),
    }
    assert [name for name, content in others.items() if recoded(content) is not None] == []


def prepared(folder: Path, content: bytes, **options) -> PreparedInfo:
    (folder / "in" / "a").mkdir(parents=True)
    (folder / "in" / "a" / "0.jpg").write_bytes(content)
    return prepare(folder / "in", folder / "out.beton", num_workers=1, **options)


def stored(info: PreparedInfo) -> bytes:
    """The record of its only image."""
    with open_beton(info.path) as beton:
        return info.path.read_bytes()[int(beton.images["data_ptr"][0]) :][: int(beton.record_bytes[0])]


def test_images_that_must_be_turned_or_shrunk_are_decoded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(make_image(0, 123, 167), exif=exif)
    assert pixels_of(stored(prepared(tmp_path / "turned", turned))).shape == (167, 123, 3)
    shrunk = prepared(tmp_path / "shrunk", jpeg(make_image(0, 123, 167)), max_side=140)
    assert pixels_of(stored(shrunk)).shape == (103, 140, 3)
    exif[0x0112] = 1
    upright = jpeg(make_image(0, 123, 167), exif=exif)
    found = recoded(upright)
    assert found is not None
    assert stored(prepared(tmp_path / "upright", upright)) == found.content


def test_without_numba_the_pixels_are_encoded_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(make_image(0, 123, 167))
    assert prepared(tmp_path / "with", content).warnings == ()
    encode._recoder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        info = prepared(tmp_path / "without", content)
    finally:
        encode._recoder.cache_clear()
    assert stored(info) == encode._jpeg(pixels_of(content).astype(np.uint8), QUALITY)
    assert ["numba is not installed" in text for text in info.warnings] == [True]


def test_what_is_stored_as_pixels_needs_no_numba(tmp_path: Path) -> None:
    """Its import takes as long as a thousand small images."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(jpeg(make_image(0, 32, 32)))
    code = (
        "import sys; from simclr_dist.data.beton.prepare import prepare;"
        f"prepare({str(tmp_path / 'in')!r}, {str(tmp_path / 'out.beton')!r}, num_workers=1);"
        "print([name for name in ('numba', 'torch') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
