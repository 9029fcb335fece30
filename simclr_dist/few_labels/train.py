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
from simclr_dist.checkpoint.files import load_pretrained
from simclr_dist.config import Config, ModelConfig, Precision
from simclr_dist.data.loading.build import load_images
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.offline import LabelledImages, open_labelled
from simclr_dist.few_labels.classifier import Classifier, Start, accuracy, load_classifier, save_classifier
from simclr_dist.few_labels.distill import distil
from simclr_dist.few_labels.finetune import (
    FINE_TUNE_LR,
    LINEAR_EPOCHS,
    LINEAR_LR,
    Training,
    default_epochs,
    fine_tune,
    linear_protocol,
)
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.few_labels.subsets import draw_subset, load_subset, save_subset
from simclr_dist.network.simclr import build_model
from simclr_dist.views.augment import normalize

DISTILL_EPOCHS = 100
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a person may choose. None: the paper's value (see finetune.py), or the run's precision."""

    device: torch.device
    epochs: int | None = None
    base_lr: float | None = None  # for a batch of 256
    weight_decay: float = 0.0
    batch_size: int = 256
    seed: int = 0
    precision: Precision | None = None

    def training(self, config: Config, say: Say, *, epochs: int, base_lr: float) -> Training:
        """With `epochs`, `base_lr` and the precision of `config` where nothing else was chosen."""
        epochs = self.epochs or epochs
        return Training(
            epochs,
            self.base_lr or base_lr,
            self.weight_decay,
            self.device,
            self.precision or config.train.precision,
            _reporter(epochs, say),
        )


def finetune_checkpoint(
    source: str | Path,
    out: Path,
    settings: Settings,
    *,
    share: float = 1.0,
    subset_file: Path | None = None,
    start: Start = "encoder",
    freeze: bool = False,
    train: str | None = None,
    test: str | None = None,
    say: Say,
) -> dict[str, Any]:
    """Fine-tunes the checkpoint's encoder with a share of the labels, or with freeze only a classifier on top.

    subset_file: take these samples instead of drawing `share` by the settings' seed. Returns what result.json holds.
    Raises CheckpointError, ConfigError, DataError.
    """
    _refuse_existing(out)
    model, checkpoint = load_pretrained(source, say)
    config = checkpoint.config
    data = open_labelled(config, train, test)
    info = data.train_info
    subset = load_subset(subset_file, info) if subset_file else draw_subset(info, share, settings.seed)
    save_subset(out / "subset.json", subset)
    training = settings.training(
        config,
        say,
        epochs=LINEAR_EPOCHS if freeze else default_epochs(subset.share),
        base_lr=LINEAR_LR if freeze else FINE_TUNE_LR,
    )
    say(f"{len(subset.ids)} labels of {info.num_samples}, {data.num_classes} classes, {training.epochs} epochs")
    torch.manual_seed(settings.seed)
    classifier = Classifier(model, data.num_classes, start)
    made_of = {
        "method": "linear" if freeze else "finetune",
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "start": start,
        "share": subset.share,
        "num_labels": len(subset.ids),
    }
    method = linear_protocol if freeze else fine_tune
    return _train(
        out,
        classifier,
        lambda crops: method(classifier, crops, training),
        subset.id_array,
        config,
        data,
        settings,
        training,
        made_of,
    )


def distill_classifier(
    teacher_file: Path,
    out: Path,
    settings: Settings,
    *,
    student: dict[str, Any] | None = None,
    student_from: str | Path | None = None,
    unlabelled: str | None = None,
    test: str | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    subset_file: Path | None = None,
    say: Say,
) -> dict[str, Any]:
    """Trains a student on the teacher's answers for all images of `unlabelled` (the teacher's training data).

    student: changes to the teacher's model section, e.g. {"encoder": "resnet18"}; the student starts from random
    weights, or from the encoder of the checkpoint student_from. subset_file with alpha below 1: labels to use as well.
    """
    _refuse_existing(out)
    if alpha < 1 and subset_file is None:
        raise ConfigError([f"alpha {alpha:g} gives weight to labels: say which with a subset file"])
    teacher, config, class_names = load_classifier(teacher_file)
    data = open_labelled(config, unlabelled, test)
    if data.test_info.class_names != class_names:
        raise DataError(f"{data.test} has other classes than the teacher {teacher_file}")
    torch.manual_seed(settings.seed)
    if student_from is not None:
        model, checkpoint = load_pretrained(student_from, say)
        student_config = checkpoint.config
    else:
        section = ModelConfig.model_validate({**config.model.model_dump(), **(student or {})})
        student_config = config.model_copy(update={"model": section})
        model = build_model(section)
    network = Classifier(model, len(class_names))
    labelled = torch.from_numpy(load_subset(subset_file, data.train_info).id_array) if subset_file else None
    training = settings.training(config, say, epochs=DISTILL_EPOCHS, base_lr=FINE_TUNE_LR)
    made_of = {
        "method": "distill",
        "teacher": str(teacher_file),
        "student": student_config.model.encoder,
        "student_from": None if student_from is None else str(student_from),
        "temperature": temperature,
        "alpha": alpha,
    }
    return _train(
        out,
        network,
        lambda crops: distil(
            teacher, network, crops, training, labelled_ids=labelled, temperature=temperature, alpha=alpha
        ),
        np.arange(data.train_info.num_samples),
        student_config,
        data,
        settings,
        training,
        made_of,
    )


def _train(
    out: Path,
    classifier: Classifier,
    train: Callable[[RandomCrops], None],
    ids: np.ndarray,
    config: Config,
    data: LabelledImages,
    settings: Settings,
    training: Training,
    made_of: dict[str, Any],
) -> dict[str, Any]:
    """Calls `train` with crops of the samples `ids`, looks at the test images, once, and writes everything down."""
    with RandomCrops(
        data.train,
        ids,
        image_size=config.data.image_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_threads=config.data.num_threads,
    ) as crops:
        train(crops)
    found = accuracy(
        classifier,
        load_images(data.test, config.data.image_size, batch_size=config.evaluation.batch_size),
        device=training.device,
        precision=training.precision,
        normalize=normalize,
    )
    history = {
        **made_of,
        "seed": settings.seed,
        "epochs": training.epochs,
        "base_lr": training.base_lr,
        "weight_decay": training.weight_decay,
        "batch_size": crops.batch_size,
        "precision": training.precision,
        "train": data.train,
        "test": data.test,
    }
    save_classifier(out / "classifier.safetensors", classifier, config, data.train_info.class_names, history)
    num_parameters = sum(p.numel() for p in classifier.parameters())
    result = {**history, "num_parameters": num_parameters, "top1": found.top1, "top5": found.top5}
    with replaces(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


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
