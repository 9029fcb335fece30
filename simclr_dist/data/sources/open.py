"""Opens any source of images: a folder, an archive, the files of a known dataset, or a dataset's name.

`open_source` looks at what lies at a path and returns an `ImageSource`: images by number, with labels. Only a
compressed archive is unpacked, to a temporary file, and nothing that could run code is loaded.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from simclr_dist.data.sources.dataset_files import CIFARS, torchvision_archive, torchvision_files
from simclr_dist.data.sources.folders import TAR_SUFFIXES, open_folder, open_tar
from simclr_dist.data.sources.images import ImageSource
from simclr_dist.errors import DataError

DATASETS = ("cifar10", "cifar100", "stl10", "fashion-mnist")
DEBIAN_FASHION_MNIST = Path("/usr/share/dataset-fashion-mnist")


def open_source(source: str | Path, split: str | None = None) -> ImageSource:
    """The images at a path, or a dataset by name.

    source: a folder of class folders; a tar (.tar, .tar.gz, .tar.xz, .tar.bz2) of one; a folder with torchvision's
        files of CIFAR-10, CIFAR-100, STL-10 or Fashion-MNIST; or the name `cifar10`, `cifar100`, `stl10` or
        `fashion-mnist`, which is looked for in $SIMCLR_DATA, ./data and where Debian puts it, else downloaded.
    split: `train`, `test`, … where the source has several; STL-10 also has `unlabeled`.
    Raises DataError.
    """
    path = Path(source)
    if str(source) in DATASETS and not path.exists():
        return _by_name(str(source), split)
    if path.is_dir():
        known = torchvision_files(path, split)
        return known if known is not None else open_folder(path, split)
    if path.name.endswith(".beton"):
        raise DataError(f"{path}: is a .beton file already")
    if path.is_file():
        known = torchvision_archive(path, split)
        if known is not None:
            return known
        if path.name.endswith(TAR_SUFFIXES):
            return open_tar(path, split)
        raise DataError(f"{path}: neither a folder nor a tar archive ({', '.join(TAR_SUFFIXES)})")
    near = f", nor a dataset's name ({', '.join(DATASETS)})" if os.sep not in str(source) else ""
    raise DataError(f"{source}: no such file or folder{near}")


def data_roots() -> list[Path]:
    """Folders in which datasets are looked for: $SIMCLR_DATA, then ./data."""
    return [Path(root) for root in (os.environ.get("SIMCLR_DATA"), "data") if root]


def _by_name(name: str, split: str | None) -> ImageSource:
    for path in _candidates(name):
        if path.exists():
            return open_source(path, split)
    return open_source(download(name, data_roots()[0], split), split)


def _candidates(name: str) -> list[Path]:
    """Paths where the files of a dataset may be."""
    paths: list[Path] = []
    for root in data_roots():
        if name in CIFARS:
            cifar = CIFARS[name]
            dashed = name.replace("cifar", "cifar-")
            paths += [root / cifar.folder, root / cifar.archive]
            paths += [root / stem for stem in (name, dashed, f"{name}-jpeg")]
            paths += [root / f"{stem}{suffix}" for stem in (f"{name}-jpeg", name) for suffix in TAR_SUFFIXES]
        elif name == "stl10":
            paths.append(root / "stl10_binary")
        else:
            paths += [root / "FashionMNIST" / "raw", root / "fashion-mnist"]
    if name == "fashion-mnist":
        paths.append(DEBIAN_FASHION_MNIST)
    return paths


def download(name: str, root: Path, split: str | None = None, timeout_s: float = 10.0) -> Path:
    """Fetches a dataset with torchvision and returns the folder with its files.

    Raises DataError, within seconds when there is no network.
    """
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name == "stl10":
            datasets.STL10(str(root), split=split or "train", download=True)
            return root / "stl10_binary"
        if name == "fashion-mnist":
            datasets.FashionMNIST(str(root), download=True)
            return root / "FashionMNIST" / "raw"
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        kind(str(root), download=True)
        return root / CIFARS[name].folder
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be downloaded to {root}: {error}; fetch it elsewhere and set SIMCLR_DATA to its folder"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def find_dataset() -> tuple[str, Path]:
    """The first dataset found for a demonstration: (its name, the path of both splits).

    Tries CIFAR-10 as image folder, archive or torchvision's files in one of `data_roots`, then its download, then
    Debian's Fashion-MNIST. Raises DataError with every path that was tried.
    """
    tried = []
    for path in _candidates("cifar10"):
        if path.exists():
            try:
                for split in ("train", "test"):
                    if path.is_dir():
                        open_source(path, split)
                return "cifar10", path
            except DataError as error:
                tried.append(str(error))
        else:
            tried.append(f"{path}: does not exist")
    try:
        return "cifar10", download("cifar10", Path("data"))
    except DataError as error:
        tried.append(str(error))
    for path in _candidates("fashion-mnist"):
        if list(path.glob("train-images-idx3-ubyte*")):
            return "fashion-mnist", path
        tried.append(f"{path}: does not exist (on Debian: apt install dataset-fashion-mnist)")
    lines = "\n".join(f"  - {line}" for line in tried)
    raise DataError(
        f"no images to learn from; tried\n{lines}\n"
        "Set SIMCLR_DATA to a folder with cifar-10-python.tar.gz, cifar10-jpeg.tar.xz or cifar10/{train,test}/<class>/"
    )


def size_on_disk(source: str) -> int:
    """Bytes of the files behind a data source; 0 for synthetic images."""
    path = Path(source)
    if path.is_dir():
        return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)
    return path.stat().st_size if path.is_file() else 0
