"""A file to its samples as they are stored: any number of channels, 8 or 16 bits. TIFF, numpy's arrays, and what
Pillow opens.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from simclr_dist.data.image_size import check_num_pixels
from simclr_dist.data.sources import tiff
from simclr_dist.data.sources.decoding import (
    both_bytes,
    decode,
    orientation_of,
    reason_of,
    upright,
    without_pillows_limit,
)
from simclr_dist.data.sources.listing import image_formats
from simclr_dist.data.sources.sample_values import Decoding, kept_samples
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import MOST_CHANNELS

ARRAY = b"\x93NUMPY"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_AS_RGB = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Kept:
    """samples: uint8 or uint16 [H, W, C], upright. rgb: whether the file says that they are red, green and blue.

    damage: what the JPEG decoder found wrong, though it gave pixels.
    """

    samples: NDArray
    rgb: bool
    damage: str | None = None


def read_kept(file: IO[bytes], decoding: Decoding, page: int | None = None) -> Kept:
    """page: the number of one that is an image of its own.

    Raises DataError, without the image's name, for whatever goes wrong with this image.
    """
    try:
        with without_pillows_limit():
            found = _samples(file, decoding, page)
            kept = np.ascontiguousarray(kept_samples(found.samples, decoding))
            return Kept(kept, found.rgb and decoding.channels == "keep", found.damage)
    except DataError:
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged data
        raise DataError(f"cannot be decoded: {reason_of(error, file)}") from None


def num_pages(path: str, offset: int, size: int) -> int:
    """Of the file in these bytes of another, or in all of it (size -1); 1 for what is no TIFF. Raises OSError."""
    with open(path, "rb") as whole:
        if size < 0:
            return max(1, len(tiff.pages(whole)))
        whole.seek(offset)
        return max(1, len(tiff.pages(io.BytesIO(whole.read(size)))))


def _samples(file: IO[bytes], decoding: Decoding, page: int | None) -> Kept:
    """Of any type and number of channels."""
    file.seek(0)
    head = file.read(len(ARRAY))
    file.seek(0)
    if head == ARRAY:
        return Kept(_of_array(file, decoding), rgb=False)
    pages = _chosen(tiff.pages(file), decoding, page)
    if pages and all(_has_plain_samples(one) for one in pages):
        return _of_tiff(file, pages, decoding)
    if len(pages) > 1 or page:
        raise DataError("TIFF of several pages with compressed colours or a palette: convert it to plain samples")
    file.seek(0)
    with Image.open(file, formats=image_formats()) as image:
        check_num_pixels(image.width, image.height, decoding.max_pixels)
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            file.seek(0)
            found = decode(file, Decoding(max_pixels=decoding.max_pixels))  # which notices damage
            return Kept(found.pixels[..., : len(image.getbands())], image.mode == "RGB", found.damage)
        samples = _by_pillow(file, image)
        return Kept(upright(samples, orientation_of(image)), samples.shape[2] == 3)


def _chosen(pages: list[tiff.Page], decoding: Decoding, page: int | None) -> list[tiff.Page]:
    if page is not None and page < len(pages):
        return [pages[page]]
    if len(pages) > 1 and decoding.pages is None:
        raise DataError(
            f"has {len(pages)} pages: are they channels of one image, or images? Say --pages channels or --pages images"
        )
    if any(one.shape[:2] != pages[0].shape[:2] or one.dtype != pages[0].dtype for one in pages):
        raise DataError(f"its {len(pages)} pages are not alike, so they cannot be channels of one image")
    return pages


def _has_plain_samples(page: tiff.Page) -> bool:
    """Of whole bytes, without a palette or a transform of colours."""
    plain = page.get(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO) in (tiff.WHITE_IS_ZERO, tiff.BLACK_IS_ZERO, tiff.RGB)
    return plain and page.dtype is not None and page.get(tiff.COMPRESSION, 1) in tiff.BYTES_ONLY


def _of_tiff(file: IO[bytes], pages: list[tiff.Page], decoding: Decoding) -> Kept:
    page = pages[0]
    check_num_pixels(page.shape[1], page.shape[0], decoding.max_pixels, num_bands=sum(p.num_samples for p in pages))
    file.seek(0)
    content = file.read()
    samples = np.concatenate([tiff.read_samples(content, one) for one in pages], axis=2)
    photometric = page.get(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO)
    if photometric == tiff.WHITE_IS_ZERO and samples.dtype.kind == "u":
        samples = np.iinfo(samples.dtype).max - samples
    rgb = photometric == tiff.RGB and len(pages) == 1 and page.num_samples == 3
    return Kept(upright(samples, page.get(tiff.ORIENTATION, 1)), rgb)


def _by_pillow(file: IO[bytes], image: ImageFile.ImageFile) -> NDArray:
    """Samples [H, W, S] of any type."""
    stored_as = image.tile[0][3] if image.tile else None  # which loading forgets
    _refuse_lost_bits(file, image, stored_as)
    image.load()
    if stored_as == "LA;16B":
        raise DataError("16-bit grey with transparency: convert it to 16-bit grey, or to TIFF")
    if stored_as in ("RGB;16B", "RGBA;16B"):
        return both_bytes(file, np.asarray(image), str(stored_as))
    if image.mode == "I" and image.format == "PPM":  # which Pillow has scaled to 16 bits
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode == "1":
        image = image.convert("L")  # type: ignore[assignment]
    elif image.mode in _AS_RGB:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")  # type: ignore[assignment]
    samples = np.asarray(image)
    samples = samples.astype(samples.dtype.newbyteorder("="))
    return samples if samples.ndim == 3 else samples[..., None]


def _refuse_lost_bits(file: IO[bytes], image: ImageFile.ImageFile, stored_as: object) -> None:
    """Pillow gives 8 bits of colours that have more in these formats."""
    bits = 8
    if image.format == "PPM" and image.mode == "RGB" and isinstance(stored_as, tuple) and len(stored_as) > 1:
        bits = int(stored_as[1]).bit_length()
    if image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):
        file.seek(0)
        content = file.read()
        at = content.find(b"\xff\x4f\xff\x51")  # the codestream and its sizes
        bits = (content[at + 42] & 0x7F) + 1 if at >= 0 and at + 42 < len(content) else bits
        file.seek(0)
    if bits > 8:
        raise DataError(f"{image.format} of {bits} bits in colour, of which Pillow gives 8: convert it to TIFF or PNG")


def _of_array(file: IO[bytes], decoding: Decoding) -> NDArray:
    """Numbers [H, W, S]. Never unpickles."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise DataError(f"numpy's format {version[0]}.{version[1]} is not read here")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in "uif" or dtype.hasobject:
        raise DataError(f"holds {dtype}, no numbers of an image")
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W]")
    axes = "hw" if len(shape) == 2 else _axes(shape, decoding)
    height, width = shape[axes.index("h")], shape[axes.index("w")]
    num_channels = shape[axes.index("c")] if "c" in axes else 1
    check_num_pixels(width, height, decoding.max_pixels, num_bands=num_channels)
    content = file.read()
    if len(content) != height * width * num_channels * dtype.itemsize:
        raise DataError(f"holds {len(content)} bytes, which is not what its shape {shape} of {dtype} needs")
    samples = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    samples = samples.astype(dtype.newbyteorder("="))
    if axes == "hw":
        return samples[..., None]
    return samples if axes == "hwc" else samples.transpose(1, 2, 0)


def _axes(shape: tuple[int, ...], decoding: Decoding) -> str:
    if decoding.axes is not None:
        return decoding.axes
    first, last = shape[0] <= MOST_CHANNELS, shape[2] <= MOST_CHANNELS
    if first == last:
        raise DataError(
            f"an array of shape {' x '.join(map(str, shape))}: which axis is the channels? Say --axes hwc or --axes chw"
        )
    return "chw" if first else "hwc"
