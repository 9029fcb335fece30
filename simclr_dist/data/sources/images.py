"""Labelled images by number, in files or in memory, each read as RGB."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import Account, LeftOut
from simclr_dist.data.digest_cache import digest_once
from simclr_dist.data.sources.channel_files import Kept, read_kept
from simclr_dist.data.sources.content import Content, open_content
from simclr_dist.data.sources.decoding import Decoded, Pixels, decode, recode_or_decode
from simclr_dist.data.sources.jpeg_file import JpegFile
from simclr_dist.data.sources.sample_values import ASK, Decoding
from simclr_dist.errors import DataError

_AT_A_TIME = 1024
_Read = TypeVar("_Read")


class LabelledImages(Protocol):
    """Labelled images by number. `read` may be called from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], -1 where there is no label."""
        ...

    @property
    def account(self) -> Account | None:
        """Everything found at the source, and how it was read; None for a .beton file that does not tell."""
        ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def content_fingerprint(self) -> str:
        """Differs where an image, a label or a class name differs; the same wherever the data lies.

        Files count by their bytes and their names relative to the source. Raises DataError.
        """
        ...

    def read(self, index: int) -> Pixels:
        """RGB uint8 [H, W, 3]. Raises DataError, naming the image, when it cannot be decoded."""
        ...


class ImageSource(LabelledImages, Protocol):
    """Images that a .beton file can be made of."""

    @property
    def account(self) -> Account: ...

    def name(self, index: int) -> str:
        """The name of an image in messages."""
        ...

    def decoded(self, index: int) -> Decoded:
        """As `read`, with what is known of the image."""
        ...

    def recoded(self, index: int, recode: Callable[[JpegFile], _Read | None]) -> _Read | Decoded:
        """As `decoded`, unless `recode` makes something of the image's file: see `recode_or_decode`."""
        ...

    def kept(self, index: int) -> Kept:
        """The samples of an image as they are stored. Raises DataError, naming the image."""
        ...

    def take(self, ids: NDArray[np.int64]) -> ImageSource:
        """Only these images, renumbered from 0: small enough to send to another process."""
        ...


@dataclass(frozen=True)
class FileImages:
    """Images in files, or in containers. entries: the name of each, and where its bytes lie."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    entries: list[tuple[str, Content]]
    account: Account
    root: str = ""  # what all names begin with, and what is no part of the images' identity
    decoding: Decoding = ASK
    keep: Any = field(default=None, repr=False)  # temporary files that must exist as long as this object
    page_of: NDArray[np.int64] | None = None  # the number of the page of its file that each image is; -1: all of it

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for (name, content), label in zip(self.entries, self.labels.tolist(), strict=True):
            with _read_error(name):
                size = content.num_bytes()
            digest.update(f"{name}\0{size}\0{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def content_fingerprint(self) -> str:
        """All files are read for it once, by all CPUs; again when the size or time of one of them has changed."""
        digest = _digest_of_labels(self.class_names, self.labels)
        files = self._digest_of_unpacked if self.keep is not None else digest_once(self._state(), self._digest_of_files)
        digest.update(files.encode())
        return digest.hexdigest()

    def _state(self) -> tuple[str, str]:
        """Changes when a file does, as far as one can tell without reading it."""
        state = hashlib.sha256()
        found = {path: _stat(path) for path in {content.path for _, content in self.entries}}
        for name, content in self.entries:
            file = found[content.path]
            values = (*content[1:], file.st_size, file.st_mtime_ns, file.st_ino)
            state.update(self._encoded(name) + f"\0{values}\n".encode())
        return os.path.realpath(self.root or os.curdir), state.hexdigest()

    @cached_property
    def _digest_of_unpacked(self) -> str:
        return self._digest_of_files()

    def _digest_of_files(self) -> str:
        together = hashlib.sha256()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(self.entries), _AT_A_TIME):
                indices = range(start, min(start + _AT_A_TIME, len(self.entries)))
                for index, one in zip(indices, pool.map(self._digest_of_file, indices), strict=True):
                    together.update(self._encoded(self.entries[index][0]) + b"\0" + one)
        return together.hexdigest()

    def _digest_of_file(self, index: int) -> bytes:
        name, content = self.entries[index]
        with _read_error(name):
            return hashlib.sha256(content.read()).digest()

    def _encoded(self, name: str) -> bytes:
        return name.removeprefix(self.root).encode("utf-8", "surrogateescape")

    def name(self, index: int) -> str:
        return self.entries[index][0]

    def take(self, ids: NDArray[np.int64]) -> FileImages:
        pages = None if self.page_of is None else self.page_of[ids]
        entries = [self.entries[i] for i in ids]
        return replace(self, labels=self.labels[ids], entries=entries, keep=None, page_of=pages)

    def read(self, index: int) -> Pixels:
        found = self.decoded(index)
        if found.damage is not None and self.decoding.on_damage != "warn":
            raise DataError(f"{self.name(index)}: {found.damage}")
        return found.pixels

    def decoded(self, index: int) -> Decoded:
        return self._opened(index, lambda file: decode(file, self.decoding))

    def recoded(self, index: int, recode: Callable[[JpegFile], _Read | None]) -> _Read | Decoded:
        return self._opened(index, lambda file: recode_or_decode(file, recode, self.decoding))

    def kept(self, index: int) -> Kept:
        page = -1 if self.page_of is None else int(self.page_of[index])
        return self._opened(index, lambda file: read_kept(file, self.decoding, None if page < 0 else page))

    def _opened(self, index: int, read: Callable[[IO[bytes]], _Read]) -> _Read:
        name, content = self.entries[index]
        with _read_error(name), open_content(content) as file:
            return read(file)


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory (or memory-mapped): uint8 [n, H, W, 3] or [n, H, W]."""

    origin: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    images: NDArray[np.uint8]
    numbers: NDArray[np.int64] | None = None  # the images' numbers in messages; by default their index
    layout: str = "images in memory"
    left_out: tuple[LeftOut, ...] = ()

    @property
    def account(self) -> Account:
        return Account(self.origin, self.layout, len(self.labels), self.left_out)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.images.shape}".encode(), digest_size=16)
        digest.update(self.labels.tobytes())
        for start in range(0, len(self.images), 4096):
            digest.update(self.images[start : start + 4096].tobytes())
        return digest.hexdigest()

    @cached_property
    def content_fingerprint(self) -> str:
        digest = _digest_of_labels(self.class_names, self.labels)
        digest.update(f"{self.images.shape}".encode())
        for start in range(0, len(self.images), 4096):
            digest.update(self.images[start : start + 4096].tobytes())
        return digest.hexdigest()

    def name(self, index: int) -> str:
        return f"{self.origin}[{index if self.numbers is None else self.numbers[index]}]"

    def take(self, ids: NDArray[np.int64]) -> ArrayImages:
        return replace(self, labels=self.labels[ids], images=np.array(self.images[ids]), numbers=ids)

    def decoded(self, index: int) -> Decoded:
        return Decoded(self.read(index))

    def recoded(self, index: int, recode: Callable[[JpegFile], _Read | None]) -> Decoded:
        return self.decoded(index)

    def kept(self, index: int) -> Kept:
        image = np.asarray(self.images[index])
        return Kept(image if image.ndim == 3 else image[..., None], rgb=image.ndim == 3)

    def read(self, index: int) -> Pixels:
        image = np.asarray(self.images[index])
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


@contextmanager
def _read_error(name: str) -> Iterator[None]:
    """Names the image of which something cannot be read."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _digest_of_labels(class_names: tuple[str, ...], labels: NDArray[np.int64]) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\0".join(class_names).encode("utf-8", "surrogateescape"))
    digest.update(labels.tobytes())
    return digest
