"""Features on disk, under a key made of everything that they depend on, and memory-mapped when read.

    <folder>/<key>/h.npy, labels.npy, sample_ids.npy, MANIFEST.json

A directory appears complete or not at all. The manifest has the hash of each file; a file with another hash is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.bounded_json import read_json
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features

_ARRAYS: dict[str, tuple[type, ...]] = {
    "h": (np.float32, np.float16),
    "labels": (np.int64,),
    "sample_ids": (np.int64,),
}


def cache_key(
    encoder_digest: str,
    data_fingerprint: str,
    signature: Mapping[str, Any],
    precision: str,
    dtype: str = "float32",
    ids: NDArray[np.int64] | None = None,
) -> str:
    """A name for the features of one encoder on one dataset. encoder_digest: of `features.digest`. dtype: of h.

    signature: Kind.input_signature. ids: of the images; None: all.
    """
    more = [] if dtype == "float32" else [dtype]
    if ids is not None:
        more.append(hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest())
    parts = json.dumps([1, encoder_digest, data_fingerprint, *signature.values(), precision, *more], sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def read_features(folder: Path, key: str) -> Features | None:
    """The features stored under `key`, mapped into memory; None if there are none. Raises DataError when damaged."""
    entry = folder / key
    try:
        if not entry.is_dir() or not os.access(entry, os.R_OK | os.X_OK):
            return None
    except OSError:  # the cache of somebody else, closed to us: as if there were none
        return None
    advice = f"the feature cache is damaged; remove {entry} and run again"
    try:
        expected = read_json(entry / "MANIFEST.json")["files"]
        for name in _ARRAYS:
            if _hash(entry / f"{name}.npy") != expected[name]:
                raise DataError(f"{entry / name}.npy: its content has changed since it was written: {advice}")
        # Copy-on-write: torch needs writable arrays, and the file must not change.
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in _ARRAYS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{entry}: cannot be read ({error}): {advice}") from None
    for name, dtypes in _ARRAYS.items():
        if arrays[name].dtype not in dtypes:
            raise DataError(f"{entry / name}.npy: holds {arrays[name].dtype}: {advice}")
    return Features(*(torch.from_numpy(arrays[name]) for name in _ARRAYS))


def write_features(folder: Path, key: str, features: Features) -> None:
    """Stores `features` under `key`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{key}-{secrets.token_hex(4)}"  # several hosts may write at once
    temporary.mkdir()
    try:
        hashes = {}
        for name in _ARRAYS:
            array: NDArray = getattr(features, name).numpy()
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            hashes[name] = _hash(temporary / f"{name}.npy")
        (temporary / "MANIFEST.json").write_text(json.dumps({"files": hashes}, indent=1))
        try:
            os.rename(temporary, folder / key)
        except OSError:
            if not (folder / key / "MANIFEST.json").exists():  # else another process has written the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
