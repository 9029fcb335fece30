"""JPEG by libturbojpeg, which says what Pillow does not: that the compressed data are damaged.

The library is the one in Pillow (libjpeg-turbo), so pixels and bytes are the same.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import features

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")  # what ffcv's library is linked with
_RGB = 0  # TJPF_RGB
_SAMP_420, _ACCURATE_DCT = 2, 4096  # as Pillow encodes
NO_OUTPUT, NO_EXTRA_MARKERS = 16, 64  # TJXOPT_NOOUTPUT, TJXOPT_COPYNONE
_WARNING = 0  # TJERR_WARNING: the data are damaged, and have been decoded all the same


class _Transform(ctypes.Structure):  # tjtransform
    _fields_ = (
        ("region", ctypes.c_int * 4),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL | None:
    if not features.check("libjpeg_turbo"):  # another libjpeg in Pillow could round differently
        return None
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            for initialise in (library.tjInitDecompress, library.tjInitCompress, library.tjInitTransform):
                initialise.restype = ctypes.c_void_p
            library.tjGetErrorStr2.restype = ctypes.c_char_p
            library.tjGetErrorCode.restype = ctypes.c_int
            return library
        except (OSError, AttributeError):  # AttributeError: a version before 2.0
            continue
    return None


def unavailable() -> str | None:
    """Why damaged JPEG data go unnoticed here, or None when they are noticed."""
    if _library() is None:
        return "libturbojpeg is not installed (on Debian: apt install libturbojpeg0), or Pillow has another libjpeg"
    return None


def decode_jpeg(content: bytes, width: int, height: int) -> NDArray[np.uint8] | str | None:
    """RGB uint8 [height, width, 3]; or what is damaged; or None when libturbojpeg cannot decode it or is not there.

    width, height: the size according to Pillow, as a guard for the memory that is written to.
    """
    library = _library()
    handle = library.tjInitDecompress() if library is not None else None
    if library is None or handle is None:
        return None
    try:
        found = [ctypes.c_int() for _ in range(4)]  # width, height, subsampling, colour space
        source = (ctypes.c_void_p(handle), content, ctypes.c_ulong(len(content)))
        if library.tjDecompressHeader3(*source, *(ctypes.byref(value) for value in found)) < 0:
            return _damage(library, handle)
        if (found[0].value, found[1].value) != (width, height):
            return None
        pixels = np.empty((height, width, 3), np.uint8)
        target = (ctypes.c_void_p(pixels.ctypes.data), width, 3 * width, height, _RGB, 0)
        return _damage(library, handle) if library.tjDecompress2(*source, *target) < 0 else pixels
    finally:
        library.tjDestroy(ctypes.c_void_p(handle))


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes | None:
    """The bytes that Pillow would write, in three quarters of the time; None when libturbojpeg cannot or is not there.

    pixels: RGB uint8 [height, width, 3].
    """
    library = _library()
    handle = library.tjInitCompress() if library is not None else None
    if library is None or handle is None:
        return None
    pixels = np.ascontiguousarray(pixels)
    height, width, _ = pixels.shape
    source = (ctypes.c_void_p(pixels.ctypes.data), width, 3 * width, height, _RGB)
    content, size = ctypes.c_void_p(), ctypes.c_ulong()
    try:
        target = (ctypes.byref(content), ctypes.byref(size), _SAMP_420, quality, _ACCURATE_DCT)
        failed = library.tjCompress2(ctypes.c_void_p(handle), *source, *target) < 0
        return None if failed else ctypes.string_at(content, size.value)
    finally:
        library.tjFree(content)
        library.tjDestroy(ctypes.c_void_p(handle))


def transform_jpeg(content: bytes, options: int, data: int, filter_: int) -> bytes | None:
    """A JPEG file with its coefficients as a filter leaves them; empty with NO_OUTPUT.

    options: NO_OUTPUT, NO_EXTRA_MARKERS. filter_, data: the address of a C function, and of what it may use: see
    tjtransform in turbojpeg.h.
    None when the compressed data are damaged, or libturbojpeg cannot or is not there.
    """
    transform = _Transform(options=options, data=data, filter=filter_)
    library = _library()
    handle = library.tjInitTransform() if library is not None else None
    if library is None or handle is None:
        return None
    source = (ctypes.c_void_p(handle), content, ctypes.c_ulong(len(content)))
    out, size = ctypes.c_void_p(), ctypes.c_ulong()
    try:
        target = (ctypes.byref(out), ctypes.byref(size), ctypes.byref(transform), 0)
        failed = library.tjTransform(*source, 1, *target) < 0
        return None if failed else ctypes.string_at(out, size.value)
    finally:
        library.tjFree(out)
        library.tjDestroy(ctypes.c_void_p(handle))


def _damage(library: ctypes.CDLL, handle: int) -> str | None:
    if library.tjGetErrorCode(ctypes.c_void_p(handle)) != _WARNING:
        return None
    message: bytes = library.tjGetErrorStr2(ctypes.c_void_p(handle))
    return message.decode("ascii", "replace")
