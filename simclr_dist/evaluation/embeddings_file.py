"""Embeddings on disk, as .npz or .parquet, without pickles.

.npz       arrays h float32 [n, D], labels int64 [n] (-1: none), names [n], class_names [C], and how they were made:
           checkpoint, encoder_digest, source, data_fingerprint, image_size (release 0.1: without it)
.parquet   columns name, label, h (a list of D float32); the rest as JSON under "simclr_dist" in the schema's metadata
"""

from __future__ import annotations

import importlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.atomic import replaces
from simclr_dist.bounded_json import parse_json
from simclr_dist.errors import DataError

_TEXTS = ("checkpoint", "encoder_digest", "source", "data_fingerprint")
_EXPANSION = 100  # of what somebody has compressed; `embed` itself does not
_ARRAYS = ("h", "labels", "names", "class_names")


@dataclass(frozen=True)
class Embeddings:
    h: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    checkpoint: str
    encoder_digest: str
    source: str
    data_fingerprint: str
    image_size: int | None = None
    """Side at which the encoder saw the images, in pixels; None: not known."""


def check_format(path: Path) -> None:
    """Raises DataError if `path` has a format that cannot be written or read here. Call it before hours of work."""
    if path.suffix == ".parquet":
        _pyarrow()
    elif path.suffix != ".npz":
        raise DataError(f"{path}: embeddings are .npz or .parquet files; choose one of these endings")


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Atomic. Raises DataError as `check_format` does."""
    check_format(path)
    with replaces(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                entries = {name: _as_array(getattr(embeddings, name)) for name in (*_ARRAYS, *_TEXTS)}
                if embeddings.image_size is not None:
                    entries["image_size"] = np.asarray(embeddings.image_size)
                np.savez(file, allow_pickle=False, **entries)
        else:
            _write_parquet(temporary, embeddings)


def load_embeddings(path: Path) -> Embeddings:
    """Reads what `save_embeddings` wrote. Raises DataError."""
    check_format(path)
    try:
        found = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
        n = len(found.names)
        if found.h.ndim != 2 or found.h.dtype != np.float32 or len(found.h) != n or found.labels.shape != (n,):
            raise ValueError("its arrays do not fit together")
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises as many kinds as there are features of zip
        raise DataError(f"{path}: is no file of `simclr-dist embed`: {error}") from None
    return found


def _read_npz(path: Path) -> Embeddings:
    # Opened here, because np.load leaves a damaged archive open.
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if any(entry.file_size > _EXPANSION * (entry.compress_size + 4096) for entry in archive.infolist()):
            raise ValueError(f"an array in it expands to more than {_EXPANSION} times its size")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as entries:
        arrays = {name: entries[name] for name in (*_ARRAYS, *_TEXTS)}
        size = int(entries["image_size"]) if "image_size" in entries else None
    names, class_names = (tuple(arrays[name].astype(str).tolist()) for name in ("names", "class_names"))
    texts = {name: str(arrays[name]) for name in _TEXTS}
    return Embeddings(arrays["h"], arrays["labels"], names, class_names, **texts, image_size=size)


def _as_array(value: Any) -> np.ndarray:
    """Names are text, also where there are none: numpy would make numbers of an empty list."""
    return np.asarray(value, dtype=str) if isinstance(value, tuple | str) else np.asarray(value)


def _write_parquet(path: Path, embeddings: Embeddings) -> None:
    arrow, parquet = _pyarrow()
    h = arrow.FixedSizeListArray.from_arrays(arrow.array(embeddings.h.ravel()), embeddings.h.shape[1])
    # UTF-8 has no letters for undecodable bytes of a file's name.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in embeddings.names]
    table = arrow.table({"name": names, "label": embeddings.labels, "h": h})
    about = {name: getattr(embeddings, name) for name in ("class_names", *_TEXTS, "image_size")}
    parquet.write_table(table.replace_schema_metadata({"simclr_dist": json.dumps(about)}), path)


def _read_parquet(path: Path) -> Embeddings:
    _, parquet = _pyarrow()
    table = parquet.read_table(path)
    about = parse_json((table.schema.metadata or {})[b"simclr_dist"])
    h = table["h"].combine_chunks()
    return Embeddings(
        h.flatten().to_numpy().reshape(len(h), -1),
        table["label"].to_numpy(),
        tuple(table["name"].to_pylist()),
        tuple(map(str, about["class_names"])),
        **{name: str(about[name]) for name in _TEXTS},
        image_size=None if about.get("image_size") is None else int(about["image_size"]),
    )


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError("parquet files need pyarrow: pip install 'simclr-dist[eval]', or choose .npz") from None
