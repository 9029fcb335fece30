"""The score of a checkpoint on labelled images: load, extract features, kNN or linear probe, record the result.

On several processes (`accelerate launch -m simclr_dist.cli evaluate …`) the ranks share the work on the features.
"""

from __future__ import annotations

import tempfile
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
from simclr_dist.checkpoint.lineage import same_on_all_ranks
from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.config import DataConfig, Precision
from simclr_dist.data.classes import draw_by_class
from simclr_dist.data.decode.crops import EVALUATION_SHARE
from simclr_dist.data.loading.load_images import are_whole
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.cache import cache_key, read_features, write_features
from simclr_dist.evaluation.feature_file import extract_to_file
from simclr_dist.evaluation.features import Features, digest, extract_features
from simclr_dist.evaluation.knn import check_k, knn_top1
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.evaluation.score_record import name_of, require_method, score_record
from simclr_dist.evaluation.untrained import before_training
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.kinds.labelled_images import LabelledImages, open_labelled, require_labels
from simclr_dist.network.precision import assumed_precision
from simclr_dist.network.simclr import SimCLR
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.layout import RunDir, append_record, is_share, read_records
from simclr_dist.run.results import Keeping, results_dir

Say = Callable[[str], None]
FeatureDtype = Literal["float32", "float16"]


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
    keeping: Keeping | None = None,
    dtype: FeatureDtype = "float32",
    ids: NDArray[np.int64] | None = None,
) -> Features:
    """h of the readable images of `source` on every rank, from the cache when it has them. Raises DataError.

    ids: of the images; None: all.
    keeping: is told when the cache cannot be written; None: `say` is, at once.
    """
    # A cache on a node's own disk may be there, or damaged, for some ranks only; they must all do the same.
    kind = kind_of(data)
    key = cache_key(digest(encoder), info.content_fingerprint, kind.input_signature, precision, dtype, ids)
    found = run_on_all_ranks(lambda: read_features(cache, key) if cache else None, device, catch=Exception)
    ids = np.arange(info.num_samples) if ids is None else ids
    load = ReadableImages(kind, source, batch_size)
    if distributed.first_failing_rank(found is None, device) is None:
        assert found is not None
        say(f"features of {source}: from {cache}")
        features = found
    else:
        begin = time.perf_counter()
        places = [*([cache] if cache else []), Path(tempfile.gettempdir())]
        features = extract_to_file(
            encoder,
            load,
            ids,
            places=places,
            dtype=getattr(torch, dtype),
            device=device,
            precision=precision,
            normalize=kind.to_input,
        )
        seconds = time.perf_counter() - begin
        say(f"features of {source}: {len(features)} {kind.noun}s, {len(features) / seconds:.0f} {kind.noun}s/s")
        if cache and distributed.rank() == 0:
            kept = keeping or Keeping(say)
            with kept.attempt("features"):
                write_features(cache, key, features)
            if keeping is None:
                kept.warn()
    if sentence := load.left_out(ids, features, device):
        say(sentence)
    return features


def evaluate(
    source: Source,
    *,
    method: Literal["knn", "linear"],
    train: str | None = None,
    test: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    max_train: int | None = None,
    image_size: int | None = None,
    solver: Literal["lbfgs", "sgd"] = "lbfgs",
    seed: int = 0,
    precision: Precision | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
    untrained_train: int | None = None,
    cache: Path | Literal["run"] | None = "run",
    out: Path | None = None,
    feature_dtype: FeatureDtype = "float32",
    show: Callable[[list[Score], dict[str, Any]], None] = lambda scores, record: None,
    device: torch.device,
    say: Say,
) -> tuple[list[Score], dict[str, Any]]:
    """Scores of the trained encoder, with `baselines` also of raw pixels and of the encoder before training (first).

    Values left None come from the checkpoint's configuration; training images from `evaluation.train`, else data.train.
    image_size: side at which the encoder sees images; None: evaluation.image_size, else data.image_size.
    untrained_train: how many training images the encoder before training is scored with; None: all. Its name says so.
    max_train: kNN looks at this many of them only, those that it looks at while training with evaluation.knn_max_train.
    cache "run": the folder `features` beside the record. out: the folder for both; None: that of the run. Weights from
    elsewhere (ForeignEncoder) have no run: without `out` nothing is kept.
    feature_dtype: of h as it is kept, while it is used and in the cache.
    show: called in the main process with what is returned, before it is written down.
    Returns the scores and the record that is appended to evaluations.jsonl; where that, or the cache, cannot be
    written, `say` gets one warning. Raises CheckpointError, ConfigError, DataError.
    """
    found = same_on_all_ranks(source, device, say)
    model, checkpoint, images = run_on_all_ranks(lambda: _open(found, method, train, test, image_size, say), device)
    config, kind = checkpoint.config, kind_of(checkpoint.config.evaluation_data)
    if images.classes.sentence:
        say(images.classes.sentence)
    run, keeping = results_dir(checkpoint.path if checkpoint.of_run else None, out), Keeping(say)
    settings: dict[str, Any] = {"precision": precision or assumed_precision(config.train.precision, device.type)}
    if feature_dtype != "float32":
        settings["feature_dtype"] = feature_dtype
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

    def features(encoder: nn.Module, ids: NDArray[np.int64] | None = None) -> tuple[Features, Features]:
        train, test = (
            features_of(
                encoder.to(device),
                source,
                info,
                kind.data,
                device=device,
                precision=settings["precision"],
                batch_size=batch_size or config.evaluation.batch_size,
                cache=(run.features if run else None) if cache == "run" else cache,
                say=say,
                keeping=keeping,
                dtype=feature_dtype,
                ids=of_these,
            )
            for source, info, of_these in (
                (images.train, images.train_info, ids),
                (images.test, images.test_info, None),
            )
        )
        return train, relabelled(test, images.classes)

    scores = []
    if baselines:
        known = run_on_all_ranks(lambda: _baselines(images, kind), device, catch=Exception)
        name, encoder = run_on_all_ranks(lambda: before_training(config.model, config.data, config.seed, say), device)
        few = bank[draw_by_class(images.train_info.labels[bank], untrained_train, config.seed)]
        if len(few) < len(bank):
            name = f"{name}, {len(few):,} training {images.noun}s"
        scores += [score(name, train, relabelled(test, images.classes)) for name, (train, test) in known.items()]
        scores.append(score(name, *features(encoder, few if len(few) < images.train_info.num_samples else None)))
    trained = features(model.encoder)
    scores.append(score("trained encoder", *trained))
    record = score_record(
        images,
        step=checkpoint.step,
        method=method,
        train_images=int(np.isin(trained[0].sample_ids.numpy(), bank).sum()),
        test_images=len(trained[1]),
        signature=kind.input_signature,
        **settings,
        top1=scores[-1].top1,
        top5=scores[-1].top5,
    )
    if distributed.rank() == 0:
        show(scores, record)
        if run is not None:
            with keeping.attempt(f"the line in {run.evaluations.name}"):
                run.path.mkdir(parents=True, exist_ok=True)
                append_record(run.evaluations, record)
        keeping.warn()
    return scores, record


def _open(
    source: Source, method: str, train: str | None, test: str | None, image_size: int | None, say: Say
) -> tuple[SimCLR, Checkpoint, LabelledImages]:
    model, checkpoint = load_pretrained(source, say, image_size)
    config = checkpoint.config
    if not checkpoint.of_run and train is None:
        raise ConfigError([f"{checkpoint.path}: is of no run, so name labelled images with --train and --test"])
    if config.train.channels_last:  # as it was trained: the same layout rounds alike
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kind = kind_of(config.data)
    require_method(kind, method)
    remedy = f"name labelled {kind.noun}s with --train, or evaluation.train in the configuration"
    images = open_labelled(config.data, train or config.evaluation.train, test, remedy=remedy)
    require_labels(images.noun, f"the training {images.noun}s", images.train, images.train_info, remedy=remedy)
    remedy = f"name labelled {images.noun}s with --test"
    require_labels(images.noun, f"the test {images.noun}s", images.test, images.test_info, remedy=remedy)
    return model, checkpoint, images


def _bank(images: LabelledImages, k: int, max_train: int | None, seed: int) -> NDArray[np.int64]:
    """The training images at which kNN looks. Raises ConfigError or DataError before anything is computed."""
    try:
        bank = draw_by_class(images.train_info.labels, max_train, seed)
    except ValueError as error:
        raise ConfigError([f"--max-train: {error}"]) from None
    check_k(k, len(bank))
    return bank


def _baselines(images: LabelledImages, kind: Kind) -> dict[str, list[Features]]:
    """Of the training samples and of the test samples, by the name of what nobody has trained."""
    return {
        name: [
            extract_features(
                encoder,
                ReadableImages(kind, source, 512)(np.arange(info.num_samples)),
                device="cpu",
                normalize=kind.to_input,
            )
            for source, info in ((images.train, images.train_info), (images.test, images.test_info))
        ]
        for name, encoder in kind.baselines(images.train).items()
    }


def known_accuracy(checkpoint: Checkpoint, say: Say) -> Mapping[str, float]:
    """What `evaluate` has recorded of this checkpoint, newest last, for the model card."""
    figures: dict[str, float] = {}
    records = read_records(RunDir.of_checkpoint(checkpoint.path).evaluations, method=str, step=int)
    if records.remark:
        say(records.remark)
    for record in records:
        if record["step"] == checkpoint.step:
            for share in ("top1", "top5"):
                if is_share(value := record.get(share)):
                    figures[name_of(record, share)] = value
    return figures


def crop_share_of(checkpoint: Checkpoint, image_size: int | None, say: Callable[[str], None]) -> float:
    """How much of a picture's shorter side an evaluation sees, for an export to state: all where they are S x S.

    image_size: S; None: that of the run's evaluations.
    """
    source, S = checkpoint.config.data.train, image_size or checkpoint.config.evaluation_data.image_size
    try:
        whole = are_whole(source, S)
    except (DataError, OSError) as error:
        say(
            f"{source} cannot be looked at ({error}): pictures are taken to be larger than {S} x {S}, and cropped to "
            f"{EVALUATION_SHARE}; otherwise give --crop 1"
        )
        return EVALUATION_SHARE
    return 1.0 if whole else EVALUATION_SHARE
