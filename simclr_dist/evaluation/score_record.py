"""A line of RUN/evaluations.jsonl: an accuracy beside everything that it depends on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from simclr_dist.errors import ConfigError
from simclr_dist.kinds import Kind
from simclr_dist.kinds.labelled_images import LabelledImages

HEADLINES = {"similarity": ("spearman", "Spearman"), "retrieval": ("r1", "R@1 both ways")}
"""By method: the key of its figure in a record, and its name; of the others top1, top-1."""


def require_method(kind: Kind, method: str) -> None:
    """Raises ConfigError where the method of `simclr-dist evaluate` makes no sense for the kind."""
    if method not in kind.evaluations:
        raise ConfigError(
            [f"{method} says nothing of {kind.noun}s; they are evaluated by {', '.join(kind.evaluations)}"]
        )


def score_record(
    images: LabelledImages,
    *,
    step: int,
    method: str,
    train_images: int,
    test_images: int,
    signature: Mapping[str, Any],
    top1: float,
    top5: float,
    **settings: Any,
) -> dict[str, Any]:
    """train_images, test_images: how many took part. signature: Kind.input_signature. settings: k and temperature, or
    the solver's; the precision.
    """
    return {
        "step": step,
        "method": method,
        "train": images.train,
        "test": images.test,
        "train_fingerprint": images.train_info.content_fingerprint,
        "test_fingerprint": images.test_info.content_fingerprint,
        "train_images": train_images,
        "test_images": test_images,
        **signature,
        **settings,
        "top1": top1,
        "top5": top5,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def name_of(record: Mapping[str, Any], share: str) -> str:
    """knn (k=20) top-1 on data/test.beton; T=0.1, 5,000 training images of data/train.beton, 10,000 test images, 32 px

    Two figures of one name and step are one measurement. Records of release 0.1 name less. share: "top-1", "top-5".
    """
    is_knn = record.get("method") == "knn"
    setting = f" (k={record.get('k')})" if is_knn else f" ({record['solver']})" if "solver" in record else ""
    more = [f"T={record['temperature']}"] if is_knn and "temperature" in record else []
    if isinstance(number := record.get("train_images"), int):
        more.append(f"{number:,} training images of {record.get('train')}")
    if isinstance(number := record.get("test_images"), int):
        more.append(f"{number:,} test images")
    if isinstance(number := record.get("pairs"), int):
        more.append(f"{number:,} pairs")
    if isinstance(templates := record.get("templates"), list):
        more.append(" | ".join(map(str, templates)))
    if "image_size" in record:
        more.append(f"{record['image_size']} px")
    if "precision" in record:
        more.append(str(record["precision"]))
    return f"{record.get('method')}{setting} {share} on {record.get('test')}" + (f"; {', '.join(more)}" if more else "")
