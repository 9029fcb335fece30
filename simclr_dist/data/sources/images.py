"""Labelled pictures by number, in files or in memory, and how any of them becomes RGB."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from simclr_dist.errors import DataError

Picture = NDArray[np.uint8]  # [H, W, 3]


class Pictures(Protocol):
    """Labelled pictures by number. `read` may be called from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], -1 where there is no label."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, index: int) -> Picture:
        """RGB uint8 [H, W, 3]. Raises DataError, naming the picture, when it cannot be decoded."""
        ...


class ImageSource(Pictures, Protocol):
    """Pictures that a .beton file can be made of."""

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        ...

    def take(self, ids: NDArray[np.int64]) -> ImageSource:
        """Only these pictures, renumbered from 0: small enough to send to another process."""
        ...


def decode_image(file: str | Path | IO[bytes]) -> Picture:
    """RGB uint8 [H, W, 3] of any picture that Pillow reads: grey, palette, CMYK, 16 bits; turned as EXIF says.

    Transparent places become white. Raises OSError or ValueError on unreadable and truncated pictures.
    """
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I;16", "I;16B", "I;16L", "I"):
            # Pillow clips 16 bits to 8; what is meant is the upper byte.
            return np.repeat((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.mode == "F":
            raise ValueError("floating-point pictures have no defined range")
        if upright.has_transparency_data:
            solid = upright.convert("RGBA")
            white = Image.new("RGBA", solid.size, "white")
            upright = Image.alpha_composite(white, solid)
        return np.asarray(upright.convert("RGB"))


# What Pillow raises on damaged pictures, depending on the format.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class FileImages:
    """Pictures in files, or in byte ranges of a file.

    entries: (name, file, offset, size) each; size -1 stands for the whole file.
    """

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    entries: list[tuple[str, str, int, int]]
    keep: Any = field(default=None, repr=False)  # a temporary file that must live as long as this

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for (name, path, _, size), label in zip(self.entries, self.labels.tolist(), strict=True):
            size = size if size >= 0 else os.path.getsize(path)
            digest.update(f"{name}\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def name(self, index: int) -> str:
        return self.entries[index][0]

    def take(self, ids: NDArray[np.int64]) -> FileImages:
        return FileImages(self.class_names, self.labels[ids], [self.entries[i] for i in ids])

    def read(self, index: int) -> Picture:
        name, path, offset, size = self.entries[index]
        try:
            if size < 0:
                return decode_image(path)
            with open(path, "rb") as file:
                file.seek(offset)
                return decode_image(io.BytesIO(file.read(size)))
        except UNREADABLE as error:
            raise DataError(f"{name}: cannot be decoded: {error}") from None


@dataclass(frozen=True)
class ArrayImages:
    """Pictures in memory (or memory-mapped): uint8 [n, H, W, 3] or [n, H, W]."""

    origin: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    pictures: NDArray[np.uint8]
    numbers: NDArray[np.int64] | None = None  # what messages call the pictures; their index by default

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.pictures.shape}".encode(), digest_size=16)
        digest.update(self.labels.tobytes())
        for start in range(0, len(self.pictures), 4096):
            digest.update(self.pictures[start : start + 4096].tobytes())
        return digest.hexdigest()

    def name(self, index: int) -> str:
        return f"{self.origin}[{index if self.numbers is None else self.numbers[index]}]"

    def take(self, ids: NDArray[np.int64]) -> ArrayImages:
        return ArrayImages(self.origin, self.class_names, self.labels[ids], np.array(self.pictures[ids]), ids)

    def read(self, index: int) -> Picture:
        picture = np.asarray(self.pictures[index])
        return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
