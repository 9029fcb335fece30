"""From a checkpoint to a classifier on disk: fine-tuning, the paper's linear protocol, distillation.

<out>/subset.json              the samples whose labels were used
<out>/classifier.safetensors   what `load_classifier` reads
<out>/result.json              how it was made, and its accuracy
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.atomic import replace_text
from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.config import DataConfig, ModelConfig, Precision, PrecisionSetting, parse_config
from simclr_dist.data.classes import match_classes
from simclr_dist.data.loading.labelled_images import LabelledImages, open_labelled
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.offline import Say
from simclr_dist.few_labels.classifier import Accuracy, Classifier, Start, accuracy, load_classifier, save_classifier
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
from simclr_dist.network.precision import assumed_precision
from simclr_dist.network.simclr import build_model
from simclr_dist.views.augment import normalize

DISTILL_EPOCHS = 100


@dataclass(frozen=True)
class Settings:
    """The choices of the user. None: the value of the paper (see finetune.py), or the precision of the run."""

    device: torch.device
    epochs: int | None = None
    base_lr: float | None = None  # for a batch of 256
    weight_decay: float = 0.0
    batch_size: int = 256
    seed: int = 0
    precision: Precision | None = None

    def training(self, *, epochs: int, base_lr: float, precision: PrecisionSetting, say: Say) -> Training:
        """With these values where the user has chosen none."""
        epochs = self.epochs or epochs
        return Training(
            epochs,
            self.base_lr or base_lr,
            self.weight_decay,
            self.device,
            self.precision or assumed_precision(precision, self.device.type),
            _reporter(epochs, say),
        )


def finetune_checkpoint(
    source: Source,
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
    """Fine-tunes the encoder of a checkpoint with a share of the labels, or with freeze only a classifier on top.

    subset_file: take these samples instead of drawing `share` by the settings' seed. Returns what result.json holds.
    Raises CheckpointError, ConfigError, DataError.
    """
    _refuse_existing(out)
    model, checkpoint = load_pretrained(source, say)
    config = checkpoint.config
    if not checkpoint.of_run:
        if train is None:
            raise ConfigError([f"{checkpoint.path}: is of no run, so name labelled images with --train and --test"])
        if start == "head":
            raise ConfigError([f"{checkpoint.path}: has no projection head of ours; leave out --from head"])
    images = open_labelled(
        config.data,
        train or config.evaluation.train,
        test,
        remedy="name labelled images with --train, or evaluation.train in the configuration",
    )
    info = images.train_info
    subset = load_subset(subset_file, info) if subset_file else draw_subset(info, share, settings.seed)
    save_subset(out / "subset.json", subset)
    training = settings.training(
        epochs=LINEAR_EPOCHS if freeze else default_epochs(subset.share),
        base_lr=LINEAR_LR if freeze else FINE_TUNE_LR,
        precision=config.train.precision,
        say=say,
    )
    say(f"{len(subset.ids)} labels of {info.num_samples}, {images.num_classes} classes, {training.epochs} epochs")
    torch.manual_seed(settings.seed)
    classifier = Classifier(model, images.num_classes, start)
    with _random_crops(images, subset.id_array, config.data, settings) as crops:
        (linear_protocol if freeze else fine_tune)(classifier, crops, training)
    found = _test(classifier, images, config.data, config.evaluation.batch_size, training)
    history = {
        "method": "linear" if freeze else "finetune",
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "start": start,
        "share": subset.share,
        "num_labels": len(subset.ids),
        **_history(settings, training, images, crops),
    }
    return _save(out, classifier, images, config.model_dump_json(), history, found)


def distill_classifier(
    teacher_file: Path,
    out: Path,
    settings: Settings,
    *,
    student: dict[str, Any] | None = None,
    student_from: Source | None = None,
    unlabelled: str | None = None,
    test: str | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    subset_file: Path | None = None,
    say: Say,
) -> dict[str, Any]:
    """Trains a student on the teacher's logits for all images of `unlabelled` (None: data.train of the teacher's run).

    student: changes to the teacher's model section, e.g. {"encoder": "resnet18"}; the student starts from random
    weights, or from the encoder of the checkpoint student_from. subset_file with alpha below 1: labels to use as well.
    """
    _refuse_existing(out)
    if alpha < 1 and subset_file is None:
        raise ConfigError([f"alpha {alpha:g} gives weight to labels: name the samples with a subset file"])
    teacher = load_classifier(teacher_file)
    config = parse_config(teacher.config_json)
    source = unlabelled or (config.evaluation.train if subset_file else None) or config.data.train
    images = _images_for_students(source, test or config.data.test, teacher.class_names, teacher_file)
    torch.manual_seed(settings.seed)
    if student_from is not None:
        model, checkpoint = load_pretrained(student_from, say)
        student_config = checkpoint.config
    else:
        section = ModelConfig.model_validate({**config.model.model_dump(), **(student or {})})
        student_config = config.model_copy(update={"model": section})
        model = build_model(section)
    classifier = Classifier(model, images.num_classes)
    labelled = torch.from_numpy(load_subset(subset_file, images.train_info).id_array) if subset_file else None
    training = settings.training(epochs=DISTILL_EPOCHS, base_lr=FINE_TUNE_LR, precision=config.train.precision, say=say)
    every_id = np.arange(images.train_info.num_samples)
    with _random_crops(images, every_id, student_config.data, settings) as crops:
        distil(
            teacher.network,
            classifier,
            crops,
            training,
            labelled_ids=labelled,
            temperature=temperature,
            alpha=alpha,
        )
    found = _test(classifier, images, student_config.data, student_config.evaluation.batch_size, training)
    history = {
        "method": "distill",
        "teacher": str(teacher_file),
        "student": student_config.model.encoder,
        "student_from": None if student_from is None else str(checkpoint.path),
        "temperature": temperature,
        "alpha": alpha,
        **_history(settings, training, images, crops),
    }
    return _save(out, classifier, images, student_config.model_dump_json(), history, found)


def _images_for_students(source: str, test: str | None, class_names: tuple[str, ...], teacher: Path) -> LabelledImages:
    """Labels of `source` are not read, but if it has some, they must be of the teacher's classes, in their order."""
    if test is None:
        raise ConfigError(["data.test is null, and there is no --test: give held-out images with --test PATH"])
    info, test_info = describe(source), describe(test)
    if (info.labels >= 0).any() and info.class_names != class_names:
        raise DataError(
            f"{source} does not have the classes of the teacher {teacher} in its order; distil on images without "
            "labels, or prepared with the same classes (`simclr-dist prepare --classes-from`)"
        )
    classes = match_classes(class_names, test_info.class_names, test_info.labels, train=str(teacher), test=test)
    return LabelledImages(source, test, replace(info, class_names=class_names), test_info, classes)


def _random_crops(images: LabelledImages, ids: NDArray[np.int64], data: DataConfig, settings: Settings) -> RandomCrops:
    """Of the training images `ids`."""
    return RandomCrops(
        images.train,
        ids,
        image_size=data.image_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_threads=data.num_threads,
    )


def _test(
    classifier: Classifier, images: LabelledImages, data: DataConfig, batch_size: int, training: Training
) -> Accuracy:
    """On the test images, which are used only here, with the training set's class numbers."""
    batches = (
        (pixels, torch.from_numpy(images.classes(labels.numpy())), ids)
        for pixels, labels, ids in load_images(images.test, data.image_size, batch_size=batch_size)
    )
    return accuracy(
        classifier,
        batches,
        device=training.device,
        precision=training.precision,
        normalize=normalize,
    )


def _history(settings: Settings, training: Training, images: LabelledImages, crops: RandomCrops) -> dict[str, Any]:
    return {
        "seed": settings.seed,
        "epochs": training.epochs,
        "base_lr": training.base_lr,
        "weight_decay": training.weight_decay,
        "batch_size": crops.batch_size,
        "precision": training.precision,
        "train": images.train,
        "test": images.test,
    }


def _save(
    out: Path,
    classifier: Classifier,
    images: LabelledImages,
    config_json: str,
    history: dict[str, Any],
    found: Accuracy,
) -> dict[str, Any]:
    """Writes classifier.safetensors, then result.json, and returns what the latter holds."""
    class_names = images.train_info.class_names
    save_classifier(out / "classifier.safetensors", classifier, class_names, config_json, history)
    num_parameters = sum(p.numel() for p in classifier.parameters())
    result = {**history, "num_parameters": num_parameters, "top1": found.top1, "top5": found.top5}
    replace_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _refuse_existing(out: Path) -> None:
    if (out / "classifier.safetensors").exists():
        raise ConfigError([f"{out} holds a classifier already; choose another folder with --out, or remove it"])


def _reporter(epochs: int, say: Say) -> Callable[[int, float], None]:
    """Prints about ten lines over the whole training."""
    every = max(1, epochs // 10)

    def report(epoch: int, loss: float) -> None:
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            say(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}")

    return report
