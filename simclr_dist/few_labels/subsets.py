"""Class-balanced parts of a dataset, drawn by seed and saved, so that others can train on the same samples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
    has. Unlabelled images are left out; share 1 takes every labelled image. Raises DataError for an empty class.
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
    chosen = [order[info.labels[order] == label][:per_class] for label in range(len(counts))]
    return Subset(tuple(np.sort(np.concatenate(chosen)).tolist()), info.content_fingerprint, share, seed)


def save_subset(path: Path, subset: Subset) -> None:
    """Writes JSON, one object; atomic."""
    replace_text(path, json.dumps(asdict(subset)) + "\n")


def load_subset(path: Path, info: DatasetInfo) -> Subset:
    """The subset written to `path`. Raises DataError when it is damaged or was drawn from another dataset."""
    try:
        values = read_json(path, most_bytes=LONGEST_SUBSET)
        subset = Subset(
            tuple(int(i) for i in values["ids"]),
            str(values["fingerprint"]),
            float(values["share"]),
            int(values["seed"]),
        )
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no subset file: {error!r}") from None
    if not info.is_called(subset.fingerprint):
        raise DataError(
            f"{path}: was drawn from a dataset with fingerprint {subset.fingerprint}, "
            f"this one has {info.content_fingerprint}"
        )
    if not subset.ids or min(subset.ids) < 0 or max(subset.ids) >= info.num_samples:
        raise DataError(f"{path}: names samples that the dataset does not have (it has {info.num_samples})")
    missing = set(range(len(info.class_names))) - set(info.labels[subset.id_array].tolist())
    if missing:
        names = ", ".join(info.class_names[label] for label in sorted(missing)[:10])
        raise DataError(f"{path}: has no image of the class(es) {names}")
    return subset
