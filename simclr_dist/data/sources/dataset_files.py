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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN, LeftOut
from simclr_dist.data.sources.images import ArrayImages
from simclr_dist.data.sources.listing import image_suffixes
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


def torchvision_files(root: Path, split: str | None) -> ArrayImages | None:
    """The dataset whose files are in `root`, as published or as torchvision stores them; None if there is none.

    Raises DataError, also when there is more than one.
    """
    found: dict[str, tuple[Path, Callable[[Path, str | None], ArrayImages]]] = {}
    for name, cifar in CIFARS.items():
        folder = next(
            (at for at in (root, root / cifar.folder) if at.name == cifar.folder and _has(at, cifar.meta)), None
        )
        if folder is not None:
            found[name] = folder, partial(_cifar_folder, cifar)
        elif _has(root, cifar.archive):
            found[name] = root / cifar.archive, partial(_cifar_archive, cifar)
    for folder in (root, root / "stl10_binary"):
        if _has(folder, "train_X.bin") or _has(folder, "unlabeled_X.bin"):
            found.setdefault("stl10", (folder, _stl10))
    for folder in (root, root / "FashionMNIST" / "raw", root / "raw"):
        if list(folder.glob("train-images-idx3-ubyte*")):
            found.setdefault("fashion-mnist", (folder, _idx))
    if len(found) > 1:
        places = ", ".join(f"{name} in {place}" for name, (place, _) in found.items())
        raise DataError(f"{root}: holds several datasets; give the place of one: {places}")
    for name, (place, read) in found.items():
        images = read(place, split)
        return replace(images, layout=f"{name}, {images.layout}", left_out=_beside(root, place, name))
    return None


def torchvision_archive(path: Path, split: str | None) -> ArrayImages | None:
    """The dataset that the archive is, told by its name; None for others. Raises DataError."""
    for name, cifar in CIFARS.items():
        if path.name == cifar.archive:
            images = _cifar_archive(cifar, path, split)
            return replace(images, layout=f"{name}, {images.layout}")
    return None


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _beside(root: Path, place: Path, name: str) -> tuple[LeftOut, ...]:
    """What lies in root and is not part of the dataset: everything beside its folder, images beside its files."""
    own = {place.relative_to(root).parts[0]} if place != root else set()
    own |= {cifar.archive for cifar in CIFARS.values()}
    names = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.name not in own and (place != root or entry.is_dir() or entry.suffix.lower() in image_suffixes())
    )
    return (LeftOut(f"not part of {name}", len(names), tuple(names[:NAMES_SHOWN])),) if names else ()


def _check_split(split: str | None, known: tuple[str, ...], origin: str) -> str:
    if split not in known:
        raise DataError(f"{origin}: has the splits {', '.join(known)}; say which with --split")
    return split


def _cifar_folder(cifar: Cifar, folder: Path, split: str | None) -> ArrayImages:
    return _cifar(cifar, split, str(folder), lambda name: (folder / name).read_bytes())


def _cifar_archive(cifar: Cifar, path: Path, split: str | None) -> ArrayImages:
    try:
        with tarfile.open(path) as archive:
            members = {PurePosixPath(m.name).name: archive.extractfile(m) for m in archive if m.isreg()}
            files = {name: file.read() for name, file in members.items() if file is not None}
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a complete archive of {cifar.folder}: {error}") from None
    return _cifar(cifar, split, str(path), files.__getitem__)


def _cifar(cifar: Cifar, split: str | None, origin: str, read: Callable[[str], bytes]) -> ArrayImages:
    split = _check_split(split, ("train", "test"), origin)
    try:
        parts = [_load_arrays(read(name)) for name in (cifar.train if split == "train" else cifar.test)]
        names = tuple(map(str, _load_arrays(read(cifar.meta))[cifar.names_key]))
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([np.asarray(part[cifar.label_key], np.int64) for part in parts])
    except Exception as error:  # a damaged pickle raises nearly everything
        raise DataError(f"{origin}: cannot be read: {type(error).__name__}: {error}") from None
    return _checked(origin, names, labels, np.ascontiguousarray(pixels), split)


def _checked(
    origin: str, names: tuple[str, ...], labels: NDArray[np.int64], images: NDArray[np.uint8], split: str
) -> ArrayImages:
    if images.dtype != np.uint8 or len(labels) != len(images):
        raise DataError(f"{origin}: {len(images)} images ({images.dtype}) of `{split}`, but {len(labels)} labels")
    if len(labels) and not -1 <= labels.min() <= labels.max() < len(names):
        raise DataError(f"{origin}: labels from {labels.min()} to {labels.max()}, but {len(names)} classes")
    return ArrayImages(origin, names, labels, images, layout=f"split {split}, {len(names)} classes by its own list")


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
    return _checked(str(folder), names, labels, images, split)


def _idx(folder: Path, split: str | None) -> ArrayImages:
    split = _check_split(split, ("train", "test"), str(folder))
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1).astype(np.int64)
    return _checked(str(folder), FASHION_MNIST_CLASSES, labels, images, split)


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
