"""A file to RGB pixels: whatever Pillow reads, and TIFF of any depth and number of bands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from simclr_dist.data.image_size import check_num_pixels
from simclr_dist.data.sources import tiff, turbojpeg
from simclr_dist.data.sources.jpeg_file import JpegFile, read_jpeg_file
from simclr_dist.data.sources.listing import image_formats
from simclr_dist.data.sources.sample_values import ASK, DARK_16_BIT, Decoding, on_white, to_rgb
from simclr_dist.errors import DataError

Pixels = NDArray[np.uint8]  # RGB [H, W, 3]
_Recoded = TypeVar("_Recoded")

_UNKNOWN_FORMATS = (  # first bytes, where, what they are
    (b"DICM", 128, "DICOM, which pydicom reads;"),
    (b"\x93NUMPY", 0, "a numpy array, which numpy.load reads;"),
    (b"ftypavif", 4, "AVIF: pip install pillow-avif-plugin, or"),
    (b"ftyphe", 4, "HEIC: pip install pillow-heif, or"),
    (b"ftypmif1", 4, "HEIF: pip install pillow-heif, or"),
    (b"\xff\x0a", 0, "JPEG XL: pip install pillow-jxl-plugin, or"),
    (b"JXL ", 4, "JPEG XL: pip install pillow-jxl-plugin, or"),
    (b"\x89HDF", 0, "HDF5, which h5py reads;"),
    (b"v/1\x01", 0, "OpenEXR, which OpenEXR reads;"),
    (b"%PDF", 0, "PDF, which pypdfium2 reads;"),
    (b"II\xbc", 0, "JPEG XR, which imagecodecs reads;"),
)


@dataclass(frozen=True)
class Decoded:
    """pixels: RGB uint8 [H, W, 3], upright according to EXIF, transparent pixels on white.

    damage: what the JPEG decoder found wrong, though it gave pixels. note: what else is to be known, such as pages that
    are not taken. jpeg: the file, when it is a usual, undamaged JPEG file whose pixels these are, not turned.
    """

    pixels: Pixels
    damage: str | None = None
    note: str | None = None
    jpeg: JpegFile | None = None


def decode(file: IO[bytes], decoding: Decoding = ASK) -> Decoded:
    """Raises DataError, without the image's name, for whatever goes wrong with this image."""
    return recode_or_decode(file, None, decoding)


def recode_or_decode(
    file: IO[bytes], recode: Callable[[JpegFile], _Recoded | None] | None, decoding: Decoding = ASK
) -> _Recoded | Decoded:
    """As `decode`, unless `recode` makes something of the file.

    recode: is asked for a usual JPEG file that `decode` would neither turn nor take bands of. Its compressed data may
    be damaged.
    """
    try:
        jpeg = _usual_jpeg(file, decoding)
        if jpeg is not None:
            recoded = recode(jpeg) if recode is not None and _is_upright(jpeg) else None
            found = recoded or _decode_usual_jpeg(jpeg)
            if found is not None:
                return found
        with without_pillows_limit():
            pages = tiff.pages(file)
            if pages and not (pages[0].is_plain and len(_pages_as_bands(pages, decoding)) == 1):
                return Decoded(_decode_samples(file, pages, decoding), note=_note_on_pages(pages, decoding))
            try:
                return _decode_by_pillow(file, decoding, pages)
            except Exception as error:
                if not pages or not _may_be_of_metadata(error):
                    raise
                file.seek(0)
                return _decode_by_pillow(BytesIO(tiff.without_metadata(file.read(), pages[0])), decoding, pages)
    except DataError:
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged data
        raise DataError(f"cannot be decoded: {reason_of(error, file)}") from None


def decode_jpeg(content: bytes, height: int, width: int) -> Pixels:
    """RGB uint8 [height, width, 3] of JPEG data that must be of this size, as a file around them declares.

    Raises DataError, without the image's name.
    """
    file = BytesIO(content)
    try:
        with without_pillows_limit(), Image.open(file, formats=["JPEG"]) as image:
            found = image.size
    except Exception as error:
        raise DataError(f"cannot be decoded: {reason_of(error, file)}") from None
    if found != (width, height):
        raise DataError(f"its JPEG data are {found[0]} x {found[1]} pixels where {width} x {height} are declared")
    file.seek(0)
    return decode(file).pixels


def _usual_jpeg(file: IO[bytes], decoding: Decoding) -> JpegFile | None:
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    jpeg = read_jpeg_file(file.read()) if is_jpeg and decoding.bands is None else None
    if jpeg is not None:
        check_num_pixels(jpeg.width, jpeg.height, decoding.max_pixels)
    return jpeg


def _is_upright(jpeg: JpegFile) -> bool:
    """Whether it is known that neither EXIF nor XMP turns it."""
    if not jpeg.has_metadata:
        return True
    try:
        with without_pillows_limit(), Image.open(BytesIO(jpeg.content), formats=["JPEG"]) as image:
            return image.mode in ("L", "RGB") and orientation_of(image) not in _TURNED
    except Exception:  # as many kinds as there are ways to damage a file
        return False


def _decode_usual_jpeg(jpeg: JpegFile) -> Decoded | None:
    """None for a file that Pillow has to look at: with EXIF, unusual, or damaged."""
    if jpeg.has_metadata:
        return None
    pixels = turbojpeg.decode_jpeg(jpeg.content, jpeg.width, jpeg.height)
    return Decoded(pixels, jpeg=jpeg) if isinstance(pixels, np.ndarray) else None


def _decode_by_pillow(file: IO[bytes], decoding: Decoding, pages: list[tiff.Page]) -> Decoded:
    file.seek(0)
    with Image.open(file, formats=image_formats()) as image:
        check_num_pixels(image.width, image.height, decoding.max_pixels)
        found = _decode_jpeg(file, image, decoding)
        if isinstance(found, Decoded):
            return found
        pixels = _by_pillow(file, image, decoding, pages)
        return Decoded(upright(pixels, orientation_of(image)), damage=found, note=_note_on_pages(pages, decoding))


def _decode_jpeg(file: IO[bytes], image: Image.Image, decoding: Decoding) -> Decoded | str | None:
    """None or the damage when Pillow has to decode it: it knows what to do with damaged data."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    file.seek(0)
    content = file.read()
    pixels = turbojpeg.decode_jpeg(content, image.width, image.height)
    if pixels is None or isinstance(pixels, str):
        return pixels
    orientation = orientation_of(image)
    if decoding.bands is not None:
        pixels = to_rgb(pixels if image.mode == "RGB" else pixels[..., :1], decoding)
    if decoding.bands is None and orientation not in _TURNED:
        return Decoded(pixels, jpeg=read_jpeg_file(content))
    return Decoded(upright(pixels, orientation))


def _by_pillow(file: IO[bytes], image: ImageFile.ImageFile, decoding: Decoding, pages: list[tiff.Page]) -> Pixels:
    stored_as = image.tile[0][3] if image.tile else None  # which loading forgets
    image.load()
    if pages and pages[0].get(tiff.BITS, 1) == 12:
        return (np.asarray(image) >> 4).astype(np.uint8)[..., None].repeat(3, axis=2)
    if isinstance(stored_as, str) and stored_as in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return _from_16_bits(file, image, stored_as, decoding)
    return _to_rgb(image, decoding)


def _may_be_of_metadata(error: Exception) -> bool:
    """Pillow reports damaged pixels as OSError."""
    return isinstance(error, UnidentifiedImageError) or not isinstance(error, DataError | MemoryError | OSError)


def _to_rgb(image: Image.Image, decoding: Decoding) -> Pixels:
    if image.mode.startswith("I;16") or image.mode == "F":
        return to_rgb(np.asarray(image)[..., None], decoding, num_colours=1)
    if image.mode == "I":
        samples = np.asarray(image)[..., None]
        # Pillow has scaled what PGM holds to 16 bits.
        return to_rgb(samples.astype(np.uint16) if image.format == "PPM" else samples, decoding, num_colours=1)
    if decoding.bands is not None:
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        samples = np.asarray(image)
        return to_rgb(samples if samples.ndim == 3 else samples[..., None], decoding)
    if image.has_transparency_data:
        return on_white(image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bits(file: IO[bytes], image: Image.Image, stored_as: str, decoding: Decoding) -> Pixels:
    """Of colours with 16 bits, of which Pillow has taken the upper bytes."""
    upper = np.asarray(image)
    if decoding.value_range is None and upper[..., :3].max() >= DARK_16_BIT >> 8:
        return _to_rgb(image, decoding)
    if stored_as == "LA;16B":
        raise DataError("16-bit grey with transparency, nearly black: convert it to 16-bit grey, then say --range")
    samples = both_bytes(file, upper, stored_as)
    return to_rgb(samples, decoding, num_colours=3, alpha=3 if image.mode == "RGBA" else None)


def both_bytes(file: IO[bytes], upper: NDArray[np.uint8], stored_as: str) -> NDArray[np.uint16]:
    """Of colours with 16 bits, of which Pillow has taken the upper bytes; stored_as: as Pillow calls it."""
    file.seek(0)
    with Image.open(file, formats=image_formats()) as again:
        # Read as if the other byte came first.
        again.tile = [(*tile[:3], stored_as.replace(";16B", ";16L")) for tile in again.tile]  # type: ignore[misc]
        return upper.astype(np.uint16) << 8 | np.asarray(again)


def _decode_samples(file: IO[bytes], pages: list[tiff.Page], decoding: Decoding) -> Pixels:
    """Of a TIFF whose samples Pillow does not give as they are."""
    page = pages[0]
    height, width, num_samples = page.shape
    bands = _pages_as_bands(pages, decoding)
    check_num_pixels(width, height, decoding.max_pixels, num_bands=num_samples * len(bands))
    file.seek(0)
    content = file.read()
    samples = np.concatenate([tiff.read_samples(content, page) for page in bands], axis=2)
    photometric = page.get(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO)
    unassociated = page.dtype in (np.uint8, np.uint16) and page.get(tiff.EXTRA_SAMPLES, 2) == 2
    alpha = page.alpha if unassociated else None
    pixels = to_rgb(samples, decoding, num_colours=3 if photometric == tiff.RGB else 1, alpha=alpha)
    if photometric == tiff.WHITE_IS_ZERO:
        pixels = 255 - pixels
    return upright(pixels, page.get(tiff.ORIENTATION, 1))


def _pages_as_bands(pages: list[tiff.Page], decoding: Decoding) -> list[tiff.Page]:
    """Microscopes store each channel as a page."""
    alike = all(page.shape == pages[0].shape and page.dtype == pages[0].dtype for page in pages)
    return pages if decoding.bands is not None and pages[0].num_samples == 1 and alike else pages[:1]


def _note_on_pages(pages: list[tiff.Page], decoding: Decoding) -> str | None:
    taken = len(_pages_as_bands(pages, decoding)) if pages else 0
    return None if taken == len(pages) else f"only the first of its {len(pages)} pages is taken"


def orientation_of(image: Image.Image) -> int:
    """Of EXIF; 1, which is upright, when EXIF is damaged. The image has been loaded, if Pillow decodes it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as many kinds as there are ways to damage EXIF
        return 1


_TURNED = range(2, 9)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes what EXIF says about the camera: 2 to 8 are the ways to turn and mirror an image."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class _Limit:
    """Pillow's own limit, which warns without naming the file; set aside while any thread decodes."""

    lock = threading.Lock()
    num_decoding = 0
    of_pillow: int | None = None


@contextmanager
def without_pillows_limit() -> Iterator[None]:
    with _Limit.lock:
        if _Limit.num_decoding == 0:
            _Limit.of_pillow, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _Limit.num_decoding += 1
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.num_decoding -= 1
            if _Limit.num_decoding == 0:
                Image.MAX_IMAGE_PIXELS = _Limit.of_pillow


def reason_of(error: Exception, file: IO[bytes]) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, UnidentifiedImageError):
        file.seek(0)
        head = file.read(160)
        if not head:
            return "the file is empty"
        for magic, start, what in _UNKNOWN_FORMATS:
            if head[start:].startswith(magic):
                return f"it is {what} convert it first"
        return f"it is no image that Pillow knows, or its header is damaged (it begins with {head[:12]!r})"
    if isinstance(error, OSError | ValueError | SyntaxError | EOFError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"
