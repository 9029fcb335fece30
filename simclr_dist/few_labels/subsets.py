"""Class-balanced parts of a dataset, drawn by seed and saved, so that others can train on the same samples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.atomic import replace_text
from simclr_dist.bounded_json import read_json
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.errors import DataError

LONGEST_SUBSET = 256 << 20  # bytes: a number for each image


@dataclass(frozen=True)
class Subset:
    """ids: the chosen samples, rising, of the dataset with this fingerprint. share: of the labelled images, 0 to 1."""

    ids: tuple[int, ...]
    fingerprint: str
    share: float
    seed: int

    @property
    def id_array(self) -> NDArray[np.int64]:
        return np.array(self.ids, dtype=np.int64)


def draw_subset(info: DatasetInfo, share: float, seed: int) -> Subset:
    """The same number of images of each class, `share` of all labelled ones together (at least one a class).

    As in SimCLR's 1 % and 10 % of ImageNet (Chen et al. 2020, section 4.3). A class with fewer images gives all it
    has (`shortfall` tells). Unlabelled images are left out; share 1 takes every labelled image.
    Raises DataError for an empty class.
    """
    if not 0 < share <= 1:
        raise DataError(f"the share of labels must be above 0 and at most 1, not {share:g}")
    labelled = np.flatnonzero(info.labels >= 0)
    counts = np.bincount(info.labels[labelled], minlength=len(info.class_names))
    if not len(labelled) or not len(info.class_names):
        raise DataError("the dataset has no labels to take a part of")
    empty = [name for name, count in zip(info.class_names, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{len(empty)} class(es) have no image to choose from: {', '.join(empty[:10])}")
    if share == 1:
        return Subset(tuple(labelled.tolist()), info.content_fingerprint, share, seed)
    per_class = max(1, round(share * len(labelled) / len(counts)))
    order = np.random.Generator(np.random.Philox(seed)).permutation(labelled)
    by_class = order[np.argsort(info.labels[order], kind="stable")]  # class after class, each as it was shuffled
    place = np.arange(len(by_class)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each in its class
    return Subset(tuple(np.sort(by_class[place < per_class]).tolist()), info.content_fingerprint, share, seed)


def shortfall(subset: Subset, info: DatasetInfo) -> str:
    """A sentence where a draw could not be the share that was asked for; empty where it is, up to rounding by class."""
    labels, C = info.labels[info.labels >= 0], len(info.class_names)
    asked, drawn = subset.share * len(labels), len(subset.ids)
    if abs(asked - drawn) <= C / 2:
        return ""
    sentence = f"{subset.share:g} of {len(labels):,} labels are {asked:,.0f}; drawn are {drawn:,}"
    per_class = round(asked / C)
    if per_class < 1:
        return f"{sentence}, one of each class"
    small = np.flatnonzero(np.bincount(labels, minlength=C) < per_class)
    named = ", ".join(info.class_names[label] for label in small[:5]) + (", …" if len(small) > 5 else "")
    return f"{sentence}, because {len(small)} class(es) have fewer than {per_class:,} images: {named}"


def save_subset(path: Path, subset: Subset) -> None:
    """Writes JSON, one object; atomic."""
    replace_text(path, json.dumps(asdict(subset)) + "\n")


def load_subset(path: Path, info: DatasetInfo) -> Subset:
    """The subset written to `path`. Raises DataError when it is damaged or was drawn from another dataset."""
    try:
        subset = _parsed(read_json(path, most_bytes=LONGEST_SUBSET))
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no subset file: {error!r}") from None
    if not info.is_called(subset.fingerprint):
        raise DataError(
            f"{path}: was drawn from a dataset with fingerprint {subset.fingerprint}, "
            f"this one has {info.content_fingerprint}"
        )
    if not subset.ids or min(subset.ids) < 0 or max(subset.ids) >= info.num_samples:
        raise DataError(f"{path}: names samples that the dataset does not have (it has {info.num_samples})")
    labels = info.labels[subset.id_array]
    if (unlabelled := subset.id_array[labels < 0]).size:
        raise DataError(
            f"{path}: {unlabelled.size:,} of its {len(subset.ids):,} samples have no label (first: {unlabelled[0]}); "
            "name labelled ones only"
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=len(info.class_names)) == 0)
    if missing.size:
        names = ", ".join(info.class_names[label] for label in missing[:10])
        raise DataError(f"{path}: has no image of the class(es) {names}")
    return subset


def _parsed(values: Any) -> Subset:
    """Raises KeyError, TypeError or ValueError for what `save_subset` cannot have written."""
    ids, share, seed = values["ids"], values["share"], values["seed"]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError("ids must be a list of whole numbers")
    if len(set(ids)) < len(ids):
        twice = next(i for i, count in Counter(ids).items() if count > 1)
        raise ValueError(f"sample {twice} is named more than once")
    if type(seed) is not int or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, and seed a whole number; found {share!r}, {seed!r}")
    return Subset(tuple(sorted(ids)), str(values["fingerprint"]), float(share), seed)
