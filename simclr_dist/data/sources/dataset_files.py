"""Datasets with file formats of their own: CIFAR's pickles, STL-10's and Fashion-MNIST's arrays.

Pickles come from the network, so they are read by an unpickler that can build arrays only.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.sources.images import ArrayImages, ImageSource
from simclr_dist.errors import DataError


@dataclass(frozen=True)
class Cifar:
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str


CIFARS = {
    "cifar10": Cifar(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": Cifar(
        "cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"
    ),
}

FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def torchvision_files(root: Path, split: str | None) -> ImageSource | None:
    """The dataset whose files are in `root`, as published or as torchvision stores them; None if there is none."""
    for cifar in CIFARS.values():
        for folder in (root, root / cifar.folder):
            if folder.name == cifar.folder and (folder / cifar.meta).is_file():
                names = (*cifar.train, *cifar.test, cifar.meta)
                present = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
                return _cifar(cifar, split, str(folder), present.__getitem__)
        if (root / cifar.archive).is_file():
            return torchvision_archive(root / cifar.archive, split)
    for folder in (root, root / "stl10_binary"):
        if (folder / "train_X.bin").is_file() or (folder / "unlabeled_X.bin").is_file():
            return _stl10(folder, split)
    for folder in (root, root / "FashionMNIST" / "raw", root / "raw"):
        if list(folder.glob("train-images-idx3-ubyte*")):
            return _idx(folder, split)
    return None


def torchvision_archive(path: Path, split: str | None) -> ImageSource | None:
    for cifar in CIFARS.values():
        if path.name == cifar.archive:
            try:
                with tarfile.open(path) as archive:
                    members = {PurePosixPath(m.name).name: archive.extractfile(m) for m in archive if m.isreg()}
                    files = {name: file.read() for name, file in members.items() if file is not None}
                return _cifar(cifar, split, str(path), files.__getitem__)
            except (tarfile.TarError, EOFError, OSError, KeyError) as error:
                raise DataError(f"{path}: is not a complete archive of {cifar.folder}: {error}") from None
    return None


def _check_split(split: str | None, known: tuple[str, ...], origin: str) -> str:
    if split not in known:
        raise DataError(f"{origin}: has the splits {', '.join(known)}; say which with --split")
    return split


def _cifar(cifar: Cifar, split: str | None, origin: str, read: Callable[[str], bytes]) -> ArrayImages:
    split = _check_split(split, ("train", "test"), origin)
    try:
        parts = [_load_arrays(read(name)) for name in (cifar.train if split == "train" else cifar.test)]
        names = _load_arrays(read(cifar.meta))[cifar.names_key]
    except (OSError, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{origin}: cannot be read: {error}") from None
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(part[cifar.label_key], np.int64) for part in parts])
    return ArrayImages(origin, tuple(names), labels, np.ascontiguousarray(pixels))


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and plain values only, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            import codecs

            return codecs.encode
        if module.startswith("numpy") and name in ("dtype", "ndarray"):
            return getattr(np, name)
        if module.startswith("numpy") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dataset does not need")


def _load_arrays(content: bytes) -> dict[str, Any]:
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def _stl10(folder: Path, split: str | None) -> ArrayImages:
    split = _check_split(split, ("train", "test", "unlabeled"), str(folder))
    side = 96
    file = folder / f"{split}_X.bin"
    try:
        count, rest = divmod(file.stat().st_size, 3 * side * side)
        # Stored channel by channel, each channel column by column.
        images = np.memmap(file, np.uint8, "r", shape=(count, 3, side, side)).transpose(0, 3, 2, 1)
        names = tuple((folder / "class_names.txt").read_text().split())
        if split == "unlabeled":
            labels = np.full(count, -1, np.int64)
        else:
            labels = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if rest or len(labels) != count:
        raise DataError(f"{file}: {count} images (and {rest} bytes), but {len(labels)} labels; download it again")
    return ArrayImages(str(folder), names, labels, images)


def _idx(folder: Path, split: str | None) -> ArrayImages:
    split = _check_split(split, ("train", "test"), str(folder))
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1).astype(np.int64)
    if len(labels) != len(images):
        raise DataError(f"{folder}: {len(images)} images of `{split}`, but {len(labels)} labels")
    return ArrayImages(str(folder), FASHION_MNIST_CLASSES, labels, images)


def _read_idx(folder: Path, name: str, ndim: int) -> NDArray[np.uint8]:
    """An IDX file: 0, 0, type (8: uint8), number of dimensions, each dimension in 4 bytes, values."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
        shape = np.frombuffer(content, ">u4", count=ndim, offset=4)
        if content[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{plain if plain.is_file() else packed}: cannot be read: {error}") from None
