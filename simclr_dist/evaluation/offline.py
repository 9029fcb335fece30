"""The score of a checkpoint on labelled images: load, extract features, kNN or linear probe, record the result.

On several processes (`accelerate launch -m simclr_dist.cli evaluate …`) the ranks share the work on the features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.config import DataConfig, Precision
from simclr_dist.data.classes import draw_by_class
from simclr_dist.data.decode.crops import EVALUATION_SHARE
from simclr_dist.data.loading.labelled_images import LabelledImages, open_labelled, require_labels
from simclr_dist.data.loading.load_images import are_whole
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.cache import cache_key, read_features, write_features
from simclr_dist.evaluation.features import Features, digest, extract_features_distributed, pixel_features
from simclr_dist.evaluation.knn import check_k, knn_top1
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.evaluation.score_record import name_of, score_record
from simclr_dist.evaluation.untrained import untrained_encoder
from simclr_dist.network.precision import assumed_precision
from simclr_dist.network.simclr import SimCLR
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.layout import RunDir, append_record, read_records
from simclr_dist.views.augment import normalize

Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """Shares of the test images between 0 and 1."""

    name: str
    top1: float
    top5: float


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
    """h of the readable images of `source` on every rank, from the cache when it has them. Raises DataError."""
    # A cache on a node's own disk may be there, or damaged, for some ranks only; they must all do the same.
    key = cache_key(digest(encoder), info.content_fingerprint, data.image_size, precision)
    found = run_on_all_ranks(lambda: read_features(cache, key) if cache else None, device, catch=Exception)
    ids = np.arange(info.num_samples)
    load = ReadableImages.of(source, data, batch_size)
    if distributed.first_failing_rank(found is None, device) is None:
        assert found is not None
        say(f"features of {source}: from {cache}")
        features = found
    else:
        begin = time.perf_counter()
        features = extract_features_distributed(
            encoder, load, ids, device=device, precision=precision, normalize=normalize
        )
        seconds = time.perf_counter() - begin
        say(f"features of {source}: {len(features)} images, {len(features) / seconds:.0f} images/s")
        if cache and distributed.rank() == 0:
            try:
                write_features(cache, key, features)
            except OSError as error:
                say(f"features of {source} are not kept: {error}")
    if sentence := load.left_out(ids, features, device):
        say(sentence)
    return features


def evaluate(
    source: str | Path,
    *,
    method: Literal["knn", "linear"],
    train: str | None = None,
    test: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    max_train: int | None = None,
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

    Values left None come from the checkpoint's configuration; training images from `evaluation.train`, else data.train.
    max_train: kNN looks at this many of them only, those that it looks at while training with evaluation.knn_max_train.
    cache "run": the folder `features` of the run.
    Returns the scores and the record that was appended to the run's evaluations.jsonl. Raises CheckpointError,
    ConfigError, DataError.
    """
    model, checkpoint, images = run_on_all_ranks(lambda: _open(source, train, test, say), device)
    config = checkpoint.config
    if images.classes.sentence:
        say(images.classes.sentence)
    run = RunDir.of_checkpoint(checkpoint.path)
    settings: dict[str, Any] = {"precision": precision or assumed_precision(config.train.precision, device.type)}
    bank = np.arange(images.train_info.num_samples)
    if method == "knn":
        settings["k"] = k or config.evaluation.knn_k
        settings["temperature"] = temperature or config.evaluation.knn_temperature
        bank = _bank(images, settings["k"], max_train, config.seed)
    else:
        settings |= {"solver": solver, "seed": seed}

    def score(name: str, train: Features, test: Features) -> Score:
        if method == "knn":
            if len(bank) < images.train_info.num_samples:
                train = train[torch.isin(train.sample_ids, torch.from_numpy(bank))]
            knn = knn_top1(
                train,
                test,
                k=settings["k"],
                temperature=settings["temperature"],
                num_classes=images.num_classes,
                device=device,
            )
            return Score(name, knn.top1, knn.top5)
        linear = linear_probe(
            train, test, num_classes=images.num_classes, method=solver, seed=seed, device=device, say=say
        )
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
        train_pixels, test_pixels = run_on_all_ranks(lambda: _pixels(images, config.data), device, catch=Exception)
        untrained = run_on_all_ranks(lambda: untrained_encoder(config.model, config.data, config.seed), device)
        scores.append(score("raw pixels", train_pixels, relabelled(test_pixels, images.classes)))
        scores.append(score("untrained encoder", *features(untrained)))
    trained = features(model.encoder)
    scores.append(score("trained encoder", *trained))
    record = score_record(
        images,
        step=checkpoint.step,
        method=method,
        train_images=int(np.isin(trained[0].sample_ids.numpy(), bank).sum()),
        test_images=len(trained[1]),
        image_size=config.data.image_size,
        **settings,
        top1=scores[-1].top1,
        top5=scores[-1].top5,
    )
    if distributed.rank() == 0:
        try:
            append_record(run.evaluations, record)
        except OSError as error:
            say(f"this result is not kept: {error}")
    return scores, record


def _open(
    source: str | Path, train: str | None, test: str | None, say: Say
) -> tuple[SimCLR, Checkpoint, LabelledImages]:
    model, checkpoint = load_pretrained(source, say)
    config = checkpoint.config
    if config.train.channels_last:  # as it was trained: the same layout rounds alike
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    remedy = "name labelled images with --train, or evaluation.train in the configuration"
    images = open_labelled(config.data, train or config.evaluation.train, test, remedy=remedy)
    require_labels("the training images", images.train, images.train_info, remedy=remedy)
    require_labels("the test images", images.test, images.test_info, remedy="name labelled images with --test")
    return model, checkpoint, images


def _bank(images: LabelledImages, k: int, max_train: int | None, seed: int) -> NDArray[np.int64]:
    """The training images at which kNN looks. Raises ConfigError or DataError before anything is computed."""
    try:
        bank = draw_by_class(images.train_info.labels, max_train, seed)
    except ValueError as error:
        raise ConfigError([f"--max-train: {error}"]) from None
    check_k(k, len(bank))
    return bank


def _pixels(images: LabelledImages, data: DataConfig) -> list[Features]:
    """Of the training images and of the test images."""
    return [
        pixel_features(ReadableImages.of(source, data, 512)(np.arange(info.num_samples)), normalize=normalize)
        for source, info in ((images.train, images.train_info), (images.test, images.test_info))
    ]


def known_accuracy(checkpoint: Checkpoint) -> Mapping[str, float]:
    """What `evaluate` has recorded of this checkpoint, newest last, for the model card."""
    figures: dict[str, float] = {}
    for record in read_records(RunDir.of_checkpoint(checkpoint.path).evaluations):
        if record.get("step") == checkpoint.step and "method" in record:
            for share in ("top1", "top5"):
                if isinstance(value := record.get(share), float | int):
                    figures[name_of(record, share)] = value
    return figures


def crop_share_of(checkpoint: Checkpoint, say: Callable[[str], None]) -> float:
    """How much of a picture's shorter side an evaluation sees, for an export to state: all where they are S x S."""
    data = checkpoint.config.data
    try:
        whole = are_whole(data.train, data.image_size)
    except (DataError, OSError) as error:
        say(
            f"{data.train} cannot be looked at ({error}): pictures are taken to be larger than {data.image_size} x "
            f"{data.image_size}, and cropped to {EVALUATION_SHARE}; otherwise give --crop 1"
        )
        return EVALUATION_SHARE
    return 1.0 if whole else EVALUATION_SHARE
