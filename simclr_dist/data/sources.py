"""Where pictures come from: folders, archives, torchvision's files, Debian's Fashion-MNIST.

`open_source` looks at what lies at a path and gives an `ImageSource`: pictures by number, with labels. Nothing is
unpacked to disk but the bytes of a compressed archive, and nothing that could run code is loaded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from simclr_dist.data.errors import DataError

Picture = NDArray[np.uint8]  # [H, W, 3]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "unlabeled"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


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


def open_source(source: str | Path, split: str | None = None) -> ImageSource:
    """The pictures at a path, or a dataset by name.

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
        known = _torchvision_files(path, split)
        return known if known is not None else _arranged(_walk(path), split, str(path))
    if path.name.endswith(".beton"):
        raise DataError(f"{path}: is a .beton file already")
    if path.is_file():
        known = _torchvision_archive(path, split)
        if known is not None:
            return known
        if path.name.endswith(TAR_SUFFIXES):
            return _open_tar(path, split)
        raise DataError(f"{path}: neither a folder nor a tar archive ({', '.join(TAR_SUFFIXES)})")
    near = f", nor a dataset's name ({', '.join(DATASETS)})" if os.sep not in str(source) else ""
    raise DataError(f"{source}: no such file or folder{near}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and archives


_Entry = tuple[PurePosixPath, str, int, int]  # relative path, file, offset, size


def _walk(root: Path) -> Iterator[_Entry]:
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        here = Path(folder)
        for name in files:
            if _is_image(name):
                yield PurePosixPath((here / name).relative_to(root).as_posix()), str(here / name), 0, -1


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _open_tar(path: Path, split: str | None) -> FileImages:
    try:
        with tarfile.open(path, "r:"):
            plain, keep = path, None
    except tarfile.TarError:
        keep = _decompressed(path)
        plain = Path(keep.name)
    try:
        with open(plain, "rb") as file:
            entries = [(name, str(plain), offset, size) for name, offset, size in _tar_images(file, PurePosixPath())]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: is no whole tar archive: {error}") from None
    return _arranged(entries, split, str(path), keep)


def _decompressed(path: Path) -> Any:
    """The archive without its compression, in a file that vanishes when it is closed. Read once, front to back."""
    import bz2
    import lzma
    import shutil

    openers: dict[str, Callable[..., Any]] = {"gz": gzip.open, "tgz": gzip.open, "xz": lzma.open, "txz": lzma.open}
    opener = openers.get(path.name.rpartition(".")[2], bz2.open)
    keep = tempfile.NamedTemporaryFile(prefix="simclr-", suffix=".tar")  # noqa: SIM115 - lives as long as the source
    try:
        with opener(path, "rb") as compressed:
            shutil.copyfileobj(compressed, keep, 1 << 20)
        keep.flush()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        keep.close()
        raise DataError(f"{path}: cannot be decompressed: {error} (TMPDIR={tempfile.gettempdir()})") from None
    return keep


def _tar_images(file: IO[bytes], prefix: PurePosixPath) -> Iterator[tuple[PurePosixPath, int, int]]:
    """Name, offset and size of every picture; tars within (as in ImageNet's own archive) count as class folders."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        inner = []
        for member in archive:
            name = PurePosixPath(member.name.lstrip("/"))
            if not member.isreg():
                continue
            if _is_image(name.name):
                yield prefix / name, member.offset_data, member.size
            elif name.suffix == ".tar":
                inner.append((prefix / name.with_suffix(""), member.offset_data))
    for name, offset in inner:
        file.seek(offset)
        yield from _tar_images(file, name)


def _arranged(entries: Iterable[_Entry], split: str | None, origin: str, keep: Any = None) -> FileImages:
    """Finds split and class of each picture in its path: [common/folders/][split/]class/…/picture.jpg."""
    found = sorted((entry for entry in entries), key=lambda entry: entry[0].parts)
    if not found:
        raise DataError(f"{origin}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    parts = [entry[0].parts for entry in found]
    # A folder around everything says nothing, unless it is the split or the only class.
    while all(len(p) > 2 for p in parts) and len({p[0] for p in parts}) == 1 and parts[0][0] not in SPLIT_NAMES:
        parts = [p[1:] for p in parts]
    heads = {p[0] for p in parts}
    if heads <= SPLIT_NAMES and all(len(p) > 1 for p in parts):
        if split is None and len(heads) == 1:
            split = next(iter(heads))
        if split not in heads:
            asked = "say which with --split" if split is None else f"there is no `{split}`"
            raise DataError(f"{origin}: has the splits {', '.join(sorted(heads))}; {asked}")
        chosen = [i for i, p in enumerate(parts) if p[0] == split]
        found, parts = [found[i] for i in chosen], [parts[i][1:] for i in chosen]
    elif split is not None:
        raise DataError(f"{origin}: has no splits (folders such as train and test), but `{split}` was asked for")
    class_names = tuple(sorted({p[0] for p in parts if len(p) > 1}))
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number[p[0]] if len(p) > 1 else -1 for p in parts], np.int64)
    named = [
        (f"{origin}/{relative}" if size >= 0 else path, path, offset, size) for relative, path, offset, size in found
    ]
    return FileImages(class_names, labels, named, keep)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that come in files of their own


@dataclass(frozen=True)
class _Cifar:
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str


_CIFARS = {
    "cifar10": _Cifar(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": _Cifar(
        "cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"
    ),
}
DATASETS = ("cifar10", "cifar100", "stl10", "fashion-mnist")
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DEBIAN_FASHION_MNIST = Path("/usr/share/dataset-fashion-mnist")


def _torchvision_files(root: Path, split: str | None) -> ImageSource | None:
    """The dataset whose files lie in `root` as torchvision leaves them, or as they come; None if there is none."""
    for cifar in _CIFARS.values():
        for folder in (root, root / cifar.folder):
            if folder.name == cifar.folder and (folder / cifar.meta).is_file():
                names = (*cifar.train, *cifar.test, cifar.meta)
                present = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
                return _cifar(cifar, split, str(folder), present.__getitem__)
        if (root / cifar.archive).is_file():
            return _torchvision_archive(root / cifar.archive, split)
    for folder in (root, root / "stl10_binary"):
        if (folder / "train_X.bin").is_file() or (folder / "unlabeled_X.bin").is_file():
            return _stl10(folder, split)
    for folder in (root, root / "FashionMNIST" / "raw", root / "raw"):
        if list(folder.glob("train-images-idx3-ubyte*")):
            return _idx(folder, split)
    return None


def _torchvision_archive(path: Path, split: str | None) -> ImageSource | None:
    for cifar in _CIFARS.values():
        if path.name == cifar.archive:
            try:
                with tarfile.open(path) as archive:
                    members = {PurePosixPath(m.name).name: archive.extractfile(m) for m in archive if m.isreg()}
                    files = {name: file.read() for name, file in members.items() if file is not None}
                return _cifar(cifar, split, str(path), files.__getitem__)
            except (tarfile.TarError, EOFError, OSError, KeyError) as error:
                raise DataError(f"{path}: is no whole archive of {cifar.folder}: {error}") from None
    return None


def _need_split(split: str | None, known: tuple[str, ...], origin: str) -> str:
    if split not in known:
        raise DataError(f"{origin}: has the splits {', '.join(known)}; say which with --split")
    return split


def _cifar(cifar: _Cifar, split: str | None, origin: str, read: Callable[[str], bytes]) -> ArrayImages:
    split = _need_split(split, ("train", "test"), origin)
    try:
        parts = [_load_arrays(read(name)) for name in (cifar.train if split == "train" else cifar.test)]
        names = _load_arrays(read(cifar.meta))[cifar.names_key]
    except (OSError, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{origin}: cannot be read: {error}") from None
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(part[cifar.label_key], np.int64) for part in parts])
    return ArrayImages(origin, tuple(names), labels, np.ascontiguousarray(pixels))


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's files are pickles: this one builds arrays and plain values and refuses all that could run code."""

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
    split = _need_split(split, ("train", "test", "unlabeled"), str(folder))
    side = 96
    file = folder / f"{split}_X.bin"
    try:
        count, rest = divmod(file.stat().st_size, 3 * side * side)
        # Stored channel by channel, and within a channel column by column.
        pictures = np.memmap(file, np.uint8, "r", shape=(count, 3, side, side)).transpose(0, 3, 2, 1)
        names = tuple((folder / "class_names.txt").read_text().split())
        if split == "unlabeled":
            labels = np.full(count, -1, np.int64)
        else:
            labels = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if rest or len(labels) != count:
        raise DataError(f"{file}: {count} pictures (and {rest} bytes), but {len(labels)} labels; download it again")
    return ArrayImages(str(folder), names, labels, pictures)


def _idx(folder: Path, split: str | None) -> ArrayImages:
    split = _need_split(split, ("train", "test"), str(folder))
    prefix = "train" if split == "train" else "t10k"
    pictures = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1).astype(np.int64)
    if len(labels) != len(pictures):
        raise DataError(f"{folder}: {len(pictures)} pictures of `{split}`, but {len(labels)} labels")
    return ArrayImages(str(folder), FASHION_MNIST_CLASSES, labels, pictures)


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


# ---------------------------------------------------------------------------------------------------------------------
# Datasets by name


def data_roots() -> list[Path]:
    """Folders in which datasets are looked for: $SIMCLR_DATA, then ./data."""
    return [Path(root) for root in (os.environ.get("SIMCLR_DATA"), "data") if root]


def _by_name(name: str, split: str | None) -> ImageSource:
    for path in _candidates(name):
        if path.exists():
            return open_source(path, split)
    return open_source(download(name, data_roots()[0], split), split)


def _candidates(name: str) -> list[Path]:
    """Where the files of a dataset may lie."""
    places: list[Path] = []
    for root in data_roots():
        if name in _CIFARS:
            cifar = _CIFARS[name]
            dashed = name.replace("cifar", "cifar-")
            places += [root / cifar.folder, root / cifar.archive]
            places += [root / stem for stem in (name, dashed, f"{name}-jpeg")]
            places += [root / f"{stem}{suffix}" for stem in (f"{name}-jpeg", name) for suffix in TAR_SUFFIXES]
        elif name == "stl10":
            places.append(root / "stl10_binary")
        else:
            places += [root / "FashionMNIST" / "raw", root / "fashion-mnist"]
    if name == "fashion-mnist":
        places.append(DEBIAN_FASHION_MNIST)
    return places


def download(name: str, root: Path, split: str | None = None, timeout_s: float = 10.0) -> Path:
    """Fetches a dataset with torchvision and returns the folder with its files. Raises DataError within seconds
    when there is no network."""
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
        return root / _CIFARS[name].folder
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be downloaded to {root}: {error}; fetch it elsewhere and set SIMCLR_DATA to its folder"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def find_dataset() -> tuple[str, Path]:
    """The first dataset for a demonstration that is there: (its name, its place); both splits lie in that place.

    CIFAR-10 as image folder, archive or torchvision's files in one of `data_roots`, then a download of it, then
    Debian's Fashion-MNIST. Raises DataError with every place that was tried.
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
