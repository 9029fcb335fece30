"""The folders of pairs. What is equal is never a negative: pairs that share a content are of one group.

    text_pairs   a token folder of 2n texts (data/tokens/folder.py): texts 2i and 2i + 1 are pair i
                 PAIRS.json     says that they are, and which columns they came from

    image_text   images.beton   n images
                 texts/         a token folder of m >= n texts
                 offsets.npy    int64 [n + 1]: the texts of image i are offsets[i] .. offsets[i + 1] - 1
                 PAIRS.json     says so, with the SHA-256 of offsets.npy

Nothing in them is trusted. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.atomic import replace_text
from simclr_dist.bounded_json import read_json
from simclr_dist.config.schema import IMAGE_TEXT, IMAGES_OF_PAIRS, TEXT_PAIRS
from simclr_dist.data.beton.content import record_digests
from simclr_dist.data.beton.reader import open_beton
from simclr_dist.data.tokens.folder import TokenFolder, open_tokens
from simclr_dist.errors import DataError

PAIRS, IMAGES, TEXTS, OFFSETS = "PAIRS.json", IMAGES_OF_PAIRS, "texts", "offsets.npy"
_FORMAT = 1


@dataclass(frozen=True)
class TextPairs:
    """n pairs of texts."""

    texts: TokenFolder
    columns: tuple[str, str]

    def __len__(self) -> int:
        return len(self.texts) // 2

    def groups(self, content_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n]: the same number for pairs that share a text. content_ids [2n]: the same for texts that are equal."""
        return joined(np.repeat(np.arange(len(self)), 2), content_ids)


@dataclass(frozen=True)
class ImageText:
    """n images, each with at least one text; m texts in all."""

    path: Path
    texts: TokenFolder
    offsets: NDArray[np.int64] = field(repr=False)
    columns: tuple[str, str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def images(self) -> str:
        return str(self.path / IMAGES)

    @cached_property
    def image_of_text(self) -> NDArray[np.int64]:
        """[m]"""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def image_ids(self) -> NDArray[np.int64]:
        """[n]: the same for images of equal content. The images are read for it, once. Raises DataError."""
        with open_beton(self.images) as beton:
            _, first, place = np.unique(record_digests(beton), return_index=True, return_inverse=True)
        return first[place]

    def groups(self, content_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n]: the same number for images that are equal, or share a text. content_ids [m]: as of `TextPairs`."""
        samples = np.concatenate([np.arange(len(self)), self.image_of_text])
        return joined(samples, np.concatenate([self.image_ids, content_ids + len(self)]))

    @property
    def fingerprint(self) -> str:
        """Of the texts, and of whose they are; the images have their own."""
        return f"{self.texts.fingerprint} {_digest(self.offsets)}"

    def verified_fingerprint(self) -> str:
        """The same, after all texts were read. Raises DataError."""
        self.texts.verified_fingerprint()
        return self.fingerprint


def joined(samples: NDArray[np.int64], contents: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n]: the same number, that of the first, for samples that hold a content in common, also by way of others.

    samples, contents [k]: content contents[j] is in sample samples[j]; every sample has one.
    """
    group = np.arange(int(samples.max()) + 1)
    while True:
        lowest = np.full(int(contents.max()) + 1, len(group))
        np.minimum.at(lowest, contents, group[samples])
        found = group.copy()
        np.minimum.at(found, samples, lowest[contents])
        found = found[found]  # twice as far each time: a group's number is one of its samples
        if np.array_equal(found, group):
            return group
        group = found


def kind_of_folder(path: str | Path) -> str | None:
    """`text_pairs`, `image_text`, or None where it is no folder of pairs."""
    try:
        return str(read_json(Path(path) / PAIRS)["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_text_pairs(path: str | Path) -> TextPairs:
    """Raises DataError."""
    columns, _ = _facts(Path(path), TEXT_PAIRS)
    texts = open_tokens(path)
    if len(texts) % 2:
        raise DataError(f"{path}: has {len(texts):,} texts, and pairs need an even number; prepare it again")
    return TextPairs(texts, columns)


def open_image_text(path: str | Path) -> ImageText:
    """Raises DataError."""
    path = Path(path)
    columns, facts = _facts(path, IMAGE_TEXT)
    texts = open_tokens(path / TEXTS)
    try:
        offsets = np.load(path / OFFSETS, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path / OFFSETS}: cannot be read: {error}; prepare the folder again") from None
    with open_beton(path / IMAGES) as beton:
        n = beton.num_samples
    if offsets.shape != (n + 1,) or offsets.dtype != np.int64 or _digest(offsets) != facts.get("offsets_sha256"):
        raise DataError(f"{path}: {OFFSETS} does not fit its {n:,} images; prepare the folder again")
    if offsets[0] != 0 or offsets[-1] != len(texts) or (np.diff(offsets) < 1).any():
        raise DataError(f"{path}: its {n:,} images do not share {len(texts):,} texts; prepare the folder again")
    return ImageText(path, texts, offsets, columns)


def _facts(path: Path, kind: str) -> tuple[tuple[str, str], dict[str, Any]]:
    """The names of both columns, and all that PAIRS.json says."""
    try:
        facts = read_json(path / PAIRS)
        found, version, (first, second) = str(facts["kind"]), facts["format"], facts["columns"]
    except FileNotFoundError:
        raise DataError(
            f"{path}: is no folder of pairs (it has no {PAIRS}); write one with `simclr-dist prepare --kind {kind}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / PAIRS}: cannot be read: {error}; prepare the folder again") from None
    if version != _FORMAT:
        raise DataError(f"{path}: is a folder of pairs of format {version!r}, and this version reads {_FORMAT}")
    if found != kind:
        raise DataError(f"{path}: holds {found}, and data.kind is {kind}")
    return (str(first), str(second)), facts


def write_facts(path: Path, kind: str, columns: tuple[str, ...], **more: Any) -> None:
    replace_text(path / PAIRS, json.dumps({"format": _FORMAT, "kind": kind, "columns": columns, **more}) + "\n")


def write_offsets(path: Path, offsets: NDArray[np.int64]) -> dict[str, str]:
    """What `write_facts` has to say of them."""
    np.save(path / OFFSETS, offsets)
    return {"offsets_sha256": _digest(offsets)}


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()
