"""Opens any source of images: a folder, an archive, the files of a known dataset, or a dataset's name.

`open_source` looks at what lies at a path and returns an `ImageSource`: images by number, with labels. Only a
compressed archive is unpacked, to a temporary file, and nothing that could run code is loaded.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simclr_dist.config import SHARD_SUFFIX
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.sources.dataset_files import CIFARS, torchvision_archive, torchvision_files
from simclr_dist.data.sources.folders import list_folder
from simclr_dist.data.sources.image_files import images_of
from simclr_dist.data.sources.images import ArrayImages, ImageSource
from simclr_dist.data.sources.listing import TAR_SUFFIXES, Listing, Stamp, stamp
from simclr_dist.data.sources.lists import number_classes
from simclr_dist.data.sources.remote import fetch
from simclr_dist.data.sources.shards import expand, is_pattern, list_file, list_files, list_shards_of_folder
from simclr_dist.errors import DataError
from simclr_dist.safe_text import mask
from simclr_dist.source_text import is_url

DATASETS = ("cifar10", "cifar100", "stl10", "fashion-mnist")
DEBIAN_FASHION_MNIST = Path("/usr/share/dataset-fashion-mnist")


def open_source(source: str | Path, options: SourceOptions | str | None = None) -> ImageSource:
    """The images at a path, or a dataset by name.

    source: a folder of class folders; an archive of one (tar, also compressed, or zip), or a WebDataset; parquet files
        with a column of images; many of these, as a folder, a pattern such as `shards/*.tar` or a range such as
        `train-{000..012}.tar`; a table (.csv, .tsv) of files; a folder with torchvision's files of CIFAR-10, CIFAR-100,
        STL-10 or Fashion-MNIST; or the name `cifar10`, `cifar100`, `stl10` or `fashion-mnist`, which is looked for in
        $SIMCLR_DATA, ./data and where Debian puts it, else downloaded.
    options: how to read it; a string is a split: `train`, `test`, … (STL-10 also has `unlabeled`).
    What was opened before in this process, and has not changed, is not read again.
    Raises DataError.
    """
    if not isinstance(options, SourceOptions):
        options = SourceOptions(split=options)
    try:
        return _open(source, options)
    except OSError as error:
        raise _cannot_be_read(error, source) from None


def _cannot_be_read(error: OSError, source: str | Path) -> DataError:
    """Names the place that failed, which may be a folder far inside the source."""
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else source
    return DataError(f"{place}: cannot be read: {error.strerror or error}")


def _open(source: str | Path, options: SourceOptions) -> ImageSource:
    if is_url(str(source)):
        return _open_remote(str(source), options)
    path = Path(source)
    if str(source) in DATASETS and not path.exists():
        return _by_name(str(source), options)
    if path.name.endswith(".beton"):
        raise DataError(f"{path}: is a .beton file already")
    if not path.exists() and not is_pattern(str(path)):
        near = f", nor a dataset's name ({', '.join(DATASETS)})" if os.sep not in str(source) else ""
        raise DataError(f"{source}: no such file or folder{near}")
    key = (os.path.abspath(path), str(path), options)
    if key in _opened and all(map(_is_unchanged, _opened[key].stamps)):
        return _opened[key].images
    _opened.pop(key, None)
    images, stamps = _read(path, options)
    for file in (options.files, options.labels):
        stamps += [] if file is None else [stamp(file)]
    # A file may be changed again within the clock's tick: what is that young is not remembered.
    if time.time_ns() - max(changed for _, changed, _ in stamps) > _SETTLED_NS:
        _remember(key, _Opened(images, stamps))
    return images


def _remember(key: tuple[str, str, SourceOptions], opened: _Opened) -> None:
    while len(_opened) >= _MOST_OPENED:
        del _opened[next(iter(_opened))]
    _opened[key] = opened


def _open_remote(url: str, options: SourceOptions) -> ImageSource:
    """From copies of the files, which are fetched once a process."""
    if is_url(url, SHARD_SUFFIX):
        raise DataError(f"{mask(url)}: is a {SHARD_SUFFIX} file already")
    fetched = fetch(url)
    key = (url, url, options)
    if key not in _opened:
        try:
            known = None if len(fetched.paths) > 1 else _known(fetched.paths[0], options)
            if known is not None:
                return replace(known, origin=fetched.shown)
            if len(fetched.paths) > 1:
                listing = list_files(list(map(str, fetched.paths)), fetched.shown, options)
            else:
                listing = _list(fetched.paths[0], options)
            fetched.relabel(listing)
            _remember(key, _Opened(images_of(listing, options, _classes_of(options)), []))
        except DataError as error:
            raise DataError(fetched.translate(str(error))) from None
    return _opened[key].images


@dataclass(frozen=True)
class _Opened:
    images: ImageSource
    stamps: list[Stamp]


_opened: dict[tuple[str, str, SourceOptions], _Opened] = {}
_MOST_OPENED = 4
_SETTLED_NS = 2_000_000_000


def _is_unchanged(before: Stamp) -> bool:
    try:
        return stamp(before[0]) == before
    except OSError:
        return False


def _read(path: Path, options: SourceOptions) -> tuple[ImageSource, list[Stamp]]:
    """The images, and what has to be unchanged for them to be the same when they are opened again."""
    known = _known(path, options)
    if known is not None:
        places = [path, Path(known.origin)] if path.is_dir() else [path]
        files = [entry for place in places if place.is_dir() for entry in place.iterdir() if entry.exists()]
        return known, [stamp(str(place)) for place in (*places, *files)]
    listing = _list(path, options)
    return images_of(listing, options, _classes_of(options)), listing.stamps


def _known(path: Path, options: SourceOptions) -> ArrayImages | None:
    """The data set with files of its own that lies there; None: there is none. Raises DataError."""
    is_folder = path.is_dir()
    if is_folder:
        os.scandir(path).close()  # a folder that cannot be read is named itself, not a file that may be in it
    known = torchvision_files(path, options.split) if is_folder else torchvision_archive(path, options.split)
    if known is not None:
        for name in (
            *("layout", "labels", "files", "class_depth", "value_range", "bands", "channels", "pages", "axes"),
            *("image_key", "label_key"),
        ):
            if getattr(options, name) not in (None, "auto", "rgb"):
                option = "--range" if name == "value_range" else f"--{name.replace('_', '-')}"
                raise DataError(f"{path}: {option} is for image files; this is {known.layout}")
        if options.classes_from is not None or options.class_names is not None:
            known = replace(known, **_renumbered(known, options))
    return known


def _list(path: Path, options: SourceOptions) -> Listing:
    if is_pattern(str(path)):
        return list_files(expand(str(path)), str(path), options)
    if not path.is_dir():
        return list_file(path, options)
    folder = list_folder(path)
    return list_shards_of_folder(folder, options) or folder


def _classes_of(options: SourceOptions) -> tuple[str, ...] | None:
    if options.class_names is not None or options.classes_from is None:
        return options.class_names
    if options.classes_from.endswith(".beton"):
        raise DataError(f"classes_from: {options.classes_from} needs `with_class_names` of data.beton.classes_from")
    return open_source(options.classes_from, SourceOptions(layout=options.layout)).class_names


def _renumbered(known: ArrayImages, options: SourceOptions) -> dict[str, Any]:
    """The fields of `known` that change with the classes to use."""
    classes = [known.class_names[label] if label >= 0 else None for label in known.labels.tolist()]
    names, labels = number_classes(classes, _classes_of(options), known.origin, options.classes_from or "class_names")
    return {"class_names": names, "labels": labels}


def data_roots() -> list[Path]:
    """Folders in which datasets are looked for: $SIMCLR_DATA, then ./data."""
    return [Path(root) for root in (os.environ.get("SIMCLR_DATA"), "data") if root]


def _by_name(name: str, options: SourceOptions) -> ImageSource:
    for path in _candidates(name):
        if path.exists():
            return open_source(path, options)
    return open_source(download(name, data_roots()[0], options.split), options)


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
    """Bytes of the files behind a data source; 0 for synthetic images, and of what lies elsewhere. Raises DataError."""
    path = Path(source)
    try:
        if path.is_dir():
            return sum(found.content.num_bytes() for found in list_folder(path).files)
        if not is_url(source) and is_pattern(source):
            return sum(map(os.path.getsize, expand(source)))
        return path.stat().st_size if path.is_file() else 0
    except OSError as error:
        raise _cannot_be_read(error, source) from None
