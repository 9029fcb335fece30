"""The score of a checkpoint on labelled images: load, extract features, kNN or linear probe, record the result.

On several processes (`accelerate launch -m simclr_dist.cli evaluate …`) the ranks share the work on the features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.config import DataConfig, ModelConfig, Precision
from simclr_dist.data.classes import ClassMap, match_classes
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import DatasetInfo, describe
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.cache import cache_key, read_features, write_features
from simclr_dist.evaluation.features import Features, digest, extract_features_distributed, pixel_features
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.network.simclr import build_model
from simclr_dist.parallel import distributed
from simclr_dist.run.layout import RunDir, append_record, read_records
from simclr_dist.views.augment import normalize

Say = Callable[[str], None]


@dataclass(frozen=True)
class LabelledImages:
    """Training and held-out images of the same classes."""

    train: str
    test: str
    train_info: DatasetInfo
    test_info: DatasetInfo
    classes: ClassMap
    """From the test set's class numbers to the training set's."""

    @property
    def num_classes(self) -> int:
        return len(self.train_info.class_names)


@dataclass(frozen=True)
class Score:
    """Shares of the test images between 0 and 1."""

    name: str
    top1: float
    top5: float


def open_labelled(data: DataConfig, train: str | None = None, test: str | None = None) -> LabelledImages:
    """The images of the section `data`, or others in their place: evaluating on another dataset is a transfer.

    Raises ConfigError without test data, DataError when the test set has classes that the training set lacks.
    """
    train, test = train or data.train, test or data.test
    if test is None:
        raise ConfigError(["data.test is null, and there is no --test: give held-out images with --test PATH"])
    train_info, test_info = describe(train), describe(test)
    return LabelledImages(train, test, train_info, test_info, match(train_info, test_info, train=train, test=test))


def match(train_info: DatasetInfo, test_info: DatasetInfo, *, train: str, test: str) -> ClassMap:
    """`match_classes` of two described data sets."""
    return match_classes(train_info.class_names, test_info.class_names, test_info.labels, train=train, test=test)


def features_of(
    encoder: nn.Module,
    source: str,
    info: DatasetInfo,
    data: DataConfig,
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    cache: Path | None,
    say: Say,
) -> Features:
    """h of all images of `source` on every rank, from the cache when it has them. Raises DataError."""
    key = cache_key(digest(encoder), info.content_fingerprint, data.image_size, precision)
    found = read_features(cache, key) if cache else None
    # A cache on a node's own disk may be there for some ranks only; they must all do the same.
    if not distributed.all_reduce_max_(torch.tensor([found is None], dtype=torch.int32, device=device)).item():
        assert found is not None
        say(f"features of {source}: from {cache}")
        return found
    begin = time.perf_counter()
    features = extract_features_distributed(
        encoder,
        lambda ids: load_images(
            source,
            data.image_size,
            batch_size=batch_size,
            ids=ids,
            num_threads=data.num_threads,
        ),
        info.num_samples,
        device=device,
        precision=precision,
        normalize=normalize,
    )
    seconds = time.perf_counter() - begin
    say(f"features of {source}: {len(features)} images, {len(features) / seconds:.0f} images/s")
    if cache and distributed.rank() == 0:
        write_features(cache, key, features)
    return features


def evaluate(
    source: str | Path,
    *,
    method: Literal["knn", "linear"],
    train: str | None = None,
    test: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    solver: Literal["lbfgs", "sgd"] = "lbfgs",
    seed: int = 0,
    precision: Precision | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
    cache: Path | Literal["run"] | None = "run",
    device: torch.device,
    say: Say,
) -> tuple[list[Score], dict[str, Any]]:
    """Scores of the trained encoder, with `baselines` also of raw pixels and of the untrained encoder (first).

    Values left None come from the checkpoint's configuration. cache "run": the folder `features` of the run.
    Returns the scores and the record that was appended to the run's evaluations.jsonl. Raises CheckpointError,
    ConfigError, DataError.
    """
    model, checkpoint = load_pretrained(source, say)
    config = checkpoint.config
    images = open_labelled(config.data, train, test)
    if images.classes.sentence:
        say(images.classes.sentence)
    run = RunDir.of_checkpoint(checkpoint.path)
    settings: dict[str, Any] = {"precision": precision or config.train.precision}
    if method == "knn":
        settings["k"] = k or config.evaluation.knn_k
        settings["temperature"] = temperature or config.evaluation.knn_temperature
    else:
        settings |= {"solver": solver, "seed": seed}

    def score(name: str, train: Features, test: Features) -> Score:
        if method == "knn":
            knn = knn_top1(
                train,
                test,
                k=settings["k"],
                temperature=settings["temperature"],
                num_classes=images.num_classes,
                device=device,
            )
            return Score(name, knn.top1, knn.top5)
        linear = linear_probe(train, test, num_classes=images.num_classes, method=solver, seed=seed, device=device)
        if name == "trained encoder":
            settings["weight_decay"] = linear.weight_decay
        return Score(name, linear.top1, linear.top5)

    def features(encoder: nn.Module) -> tuple[Features, Features]:
        train, test = (
            features_of(
                encoder.to(device),
                source,
                info,
                config.data,
                device=device,
                precision=settings["precision"],
                batch_size=batch_size or config.evaluation.batch_size,
                cache=run.features if cache == "run" else cache,
                say=say,
            )
            for source, info in ((images.train, images.train_info), (images.test, images.test_info))
        )
        return train, relabelled(test, images.classes)

    scores = []
    if baselines:
        pixels = (
            pixel_features(load_images(source, config.data.image_size, batch_size=512), normalize=normalize)
            for source in (images.train, images.test)
        )
        train_pixels, test_pixels = pixels
        scores.append(score("raw pixels", train_pixels, relabelled(test_pixels, images.classes)))
        scores.append(score("untrained encoder", *features(_untrained(config.model, config.seed))))
    scores.append(score("trained encoder", *features(model.encoder)))
    record = {
        "step": checkpoint.step,
        "method": method,
        "train": images.train,
        "test": images.test,
        "train_fingerprint": images.train_info.content_fingerprint,
        "test_fingerprint": images.test_info.content_fingerprint,
        **settings,
        "top1": scores[-1].top1,
        "top5": scores[-1].top5,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if distributed.rank() == 0:
        append_record(run.evaluations, record)
    return scores, record


def _untrained(model: ModelConfig, seed: int) -> nn.Module:
    """The encoder with the initial values of the run."""
    torch.manual_seed(seed)
    return build_model(model).encoder


def known_accuracy(checkpoint: Checkpoint) -> Mapping[str, float]:
    """What `evaluate` has recorded of this checkpoint, newest last, for the model card."""
    figures: dict[str, float] = {}
    for record in read_records(RunDir.of_checkpoint(checkpoint.path).evaluations):
        if record.get("step") == checkpoint.step:
            setting = f"k={record['k']}" if record["method"] == "knn" else record["solver"]
            for share in ("top1", "top5"):
                figures[f"{record['method']} ({setting}) {share} on {record['test']}"] = record[share]
    return figures
