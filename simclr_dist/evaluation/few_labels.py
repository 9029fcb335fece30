"""From a checkpoint to a classifier on disk: fine-tuning, the paper's linear protocol, distillation.

<out>/subset.json              the samples whose labels were used
<out>/classifier.safetensors   what `load_classifier` reads
<out>/result.json              how it was made, and its accuracy
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dist.atomic import replaces
from simclr_dist.augment import normalize
from simclr_dist.checkpoint import load_pretrained
from simclr_dist.config import Config, ConfigError, ModelConfig
from simclr_dist.data import load_images
from simclr_dist.data.errors import DataError
from simclr_dist.evaluation.classifier import Accuracy, Classifier, Start, accuracy, load_classifier, save_classifier
from simclr_dist.evaluation.distill import distil
from simclr_dist.evaluation.features import Precision
from simclr_dist.evaluation.finetune import (
    FINE_TUNE_LR,
    LINEAR_EPOCHS,
    LINEAR_LR,
    default_epochs,
    fine_tune,
    linear_protocol,
)
from simclr_dist.evaluation.offline import LabelledImages, open_labelled
from simclr_dist.evaluation.random_crops import RandomCrops
from simclr_dist.evaluation.subsets import draw_subset, load_subset, save_subset
from simclr_dist.model import build_model

Say = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; None: the paper's value (see finetune.py)."""

    epochs: int | None = None
    base_lr: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Compute:
    device: torch.device
    precision: Precision | None = None  # None: the run's


def finetune_checkpoint(
    source: str | Path,
    out: Path,
    *,
    share: float = 1.0,
    subset_file: Path | None = None,
    start: Start = "encoder",
    freeze: bool = False,
    train: str | None = None,
    test: str | None = None,
    schedule: Schedule = Schedule(),
    compute: Compute,
    say: Say,
) -> dict[str, Any]:
    """Fine-tunes the checkpoint's encoder with a share of the labels, or with freeze only a classifier on top.

    subset_file: take these samples instead of drawing `share` by the schedule's seed. Returns what result.json holds.
    Raises CheckpointError, ConfigError, DataError.
    """
    model, checkpoint = load_pretrained(source, say)
    config = checkpoint.config
    data = open_labelled(config, train, test)
    _refuse_existing(out)
    info = data.train_info
    subset = load_subset(subset_file, info) if subset_file else draw_subset(info, share, schedule.seed)
    save_subset(out / "subset.json", subset)
    epochs = schedule.epochs or (LINEAR_EPOCHS if freeze else default_epochs(subset.share))
    base_lr = schedule.base_lr or (LINEAR_LR if freeze else FINE_TUNE_LR)
    precision = compute.precision or config.train.precision
    say(f"{len(subset.ids)} labels of {info.num_samples}, {data.num_classes} classes, {epochs} epochs")
    torch.manual_seed(schedule.seed)
    classifier = Classifier(model, data.num_classes, start)
    with _crops(data.train, subset.id_array, config, schedule) as crops:
        (linear_protocol if freeze else fine_tune)(
            classifier,
            crops,
            epochs=epochs,
            base_lr=base_lr,
            weight_decay=schedule.weight_decay,
            device=compute.device,
            precision=precision,
            normalize=normalize,
            on_epoch=_reporter(epochs, say),
        )
    history = {
        "method": "linear" if freeze else "finetune",
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "start": start,
        "share": subset.share,
        "num_labels": len(subset.ids),
        "seed": schedule.seed,
        "epochs": epochs,
        "base_lr": base_lr,
        "weight_decay": schedule.weight_decay,
        "batch_size": crops.batch_size,
        "precision": precision,
        "train": data.train,
        "test": data.test,
    }
    return _finish(out, classifier, config, data, history, compute.device, precision)


def distill_classifier(
    teacher_file: Path,
    out: Path,
    *,
    student: dict[str, Any] | None = None,
    student_from: str | Path | None = None,
    unlabelled: str | None = None,
    test: str | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    subset_file: Path | None = None,
    schedule: Schedule = Schedule(),
    compute: Compute,
    say: Say,
) -> dict[str, Any]:
    """Trains a student on the teacher's answers for all images of `unlabelled` (the teacher's training data).

    student: changes to the teacher's model section, e.g. {"encoder": "resnet18"}; the student starts from random
    weights, or from the encoder of the checkpoint student_from. subset_file with alpha below 1: labels to use as well.
    """
    teacher, config, class_names = load_classifier(teacher_file)
    data = open_labelled(config, unlabelled, test)
    if data.test_info.class_names != class_names:
        raise DataError(f"{data.test} has other classes than the teacher {teacher_file}")
    _refuse_existing(out)
    if alpha < 1 and subset_file is None:
        raise ConfigError([f"alpha {alpha:g} gives weight to labels: say which with a subset file"])
    torch.manual_seed(schedule.seed)
    if student_from is not None:
        model, checkpoint = load_pretrained(student_from, say)
        student_config = checkpoint.config
    else:
        section = ModelConfig.model_validate({**config.model.model_dump(), **(student or {})})
        student_config = config.model_copy(update={"model": section})
        model = build_model(section)
    network = Classifier(model, len(class_names))
    labelled = torch.from_numpy(load_subset(subset_file, data.train_info).id_array) if subset_file else None
    epochs = schedule.epochs or 100
    base_lr = schedule.base_lr or FINE_TUNE_LR
    precision = compute.precision or config.train.precision
    with _crops(data.train, np.arange(data.train_info.num_samples), config, schedule) as crops:
        distil(
            teacher,
            network,
            crops,
            labelled_ids=labelled,
            temperature=temperature,
            alpha=alpha,
            epochs=epochs,
            base_lr=base_lr,
            weight_decay=schedule.weight_decay,
            device=compute.device,
            precision=precision,
            normalize=normalize,
            on_epoch=_reporter(epochs, say),
        )
    history = {
        "method": "distill",
        "teacher": str(teacher_file),
        "student": student_config.model.encoder,
        "student_from": None if student_from is None else str(student_from),
        "temperature": temperature,
        "alpha": alpha,
        "seed": schedule.seed,
        "epochs": epochs,
        "base_lr": base_lr,
        "weight_decay": schedule.weight_decay,
        "batch_size": crops.batch_size,
        "precision": precision,
        "train": data.train,
        "test": data.test,
    }
    return _finish(out, network, student_config, data, history, compute.device, precision)


def _crops(source: str, ids: np.ndarray, config: Config, schedule: Schedule) -> RandomCrops:
    return RandomCrops(
        source,
        ids,
        image_size=config.data.image_size,
        batch_size=schedule.batch_size,
        seed=schedule.seed,
        num_threads=config.data.num_threads,
    )


def _refuse_existing(out: Path) -> None:
    if (out / "classifier.safetensors").exists():
        raise ConfigError([f"{out} holds a classifier already; choose another folder with --out, or remove it"])


def _reporter(epochs: int, say: Say) -> Callable[[int, float], None]:
    """A line about every tenth of the training."""
    every = max(1, epochs // 10)

    def report(epoch: int, loss: float) -> None:
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            say(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}")

    return report


def _finish(
    out: Path,
    classifier: Classifier,
    config: Config,
    data: LabelledImages,
    history: dict[str, Any],
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """Looks at the test images, once, and writes everything down."""
    batches = load_images(data.test, config.data.image_size, batch_size=config.evaluation.batch_size)
    found: Accuracy = accuracy(classifier, batches, device=device, precision=precision, normalize=normalize)
    save_classifier(out / "classifier.safetensors", classifier, config, data.train_info.class_names, history)
    result = {**history, "top1": found.top1, "top5": found.top5}
    with replaces(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
