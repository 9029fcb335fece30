"""From a checkpoint to a classifier on disk: fine-tuning, the paper's linear protocol, distillation.

<out>/subset.json              the samples whose labels were used
<out>/classifier.safetensors   what `load_classifier` reads
<out>/result.json              how it was made, and its accuracy; written last
<out>/unfinished.safetensors   a training that was stopped or killed, to go on from (unfinished.py)

On several ranks all call these functions together; the main process alone writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.atomic import replace_text
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.lineage import same_on_all_ranks
from simclr_dist.checkpoint.pretrained import Source, images_alone, load_pretrained
from simclr_dist.config import DataConfig, ModelConfig, Precision, PrecisionSetting, parse_config
from simclr_dist.data.classes import match_classes
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.features import digest, part_of_rank
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
from simclr_dist.few_labels.subsets import Subset, draw_subset, load_subset, save_subset, shortfall
from simclr_dist.few_labels.unfinished import Unfinished, differences
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.kinds.labelled_images import LabelledImages, open_labelled
from simclr_dist.network.inputs import images as images_of
from simclr_dist.network.precision import assumed_precision
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks, run_on_main
from simclr_dist.pixel_format import PixelFormat
from simclr_dist.run.layout import read_record
from simclr_dist.run.results import require_writable

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
    save_every_minutes: float = 10.0

    def training(
        self, *, epochs: int, base_lr: float, precision: PrecisionSetting, pixels: PixelFormat, say: Say
    ) -> Training:
        """With these values where the user has chosen none."""
        epochs = self.epochs or epochs
        return Training(
            epochs,
            self.base_lr or base_lr,
            self.weight_decay,
            self.device,
            self.precision or assumed_precision(precision, self.device.type),
            _reporter(epochs, say),
            pixels=pixels,
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
    image_size: int | None = None,
    say: Say,
) -> dict[str, Any]:
    """Fine-tunes the encoder of a checkpoint with a share of the labels, or with freeze only a classifier on top.

    subset_file: take these samples instead of drawing `share` by the settings' seed. image_size: of crops and test
    images; None: that of the run's evaluations. Returns what result.json holds.
    What was begun in `out` with the same settings is continued, what was finished there is not repeated.
    Raises CheckpointError, ConfigError, DataError, FloatingPointError, StoppedError.
    """
    device = settings.device
    found = same_on_all_ranks(source, device, say)
    model, checkpoint = images_alone(
        *run_on_all_ranks(lambda: load_pretrained(found, say, image_size), device), "fine-tuning"
    )
    config, data = checkpoint.config, checkpoint.config.evaluation_data
    if not checkpoint.of_run:
        if train is None:
            raise ConfigError([f"{checkpoint.path}: is of no run, so name labelled images with --train and --test"])
        if start == "head":
            raise ConfigError([f"{checkpoint.path}: has no projection head of ours; leave out --from head"])
    remedy = "name labelled images with --train, or evaluation.train in the configuration"
    images = run_on_all_ranks(
        lambda: open_labelled(config.data, train or config.evaluation.train, test, remedy=remedy), device
    )
    info = images.train_info

    def choose() -> dict[str, Any]:
        return asdict(load_subset(subset_file, info) if subset_file else draw_subset(info, share, settings.seed))

    chosen = run_on_main(choose, device)
    subset = Subset(**{**chosen, "ids": tuple(chosen["ids"])})
    if sentence := shortfall(subset, info):
        say(sentence)
    training = settings.training(
        epochs=LINEAR_EPOCHS if freeze else default_epochs(subset.share),
        base_lr=LINEAR_LR if freeze else FINE_TUNE_LR,
        precision=config.train.precision,
        pixels=data.pixel_format,
        say=say,
    )
    say(f"{len(subset.ids)} labels of {info.num_samples}, {images.num_classes} classes, {training.epochs} epochs")
    asked = {
        "method": "linear" if freeze else "finetune",
        "weights": digest(model),
        "step": checkpoint.step,
        "start": start,
        "share": subset.share,
        "num_labels": len(subset.ids),
        "samples": _name_of(subset.ids),
    }
    return _complete(
        _Job(
            out,
            asked=asked,
            about={"checkpoint": str(checkpoint.path)},
            classifier=_classifier(model, images, start, data, settings, say),
            data=data,
            test_batch_size=config.evaluation.batch_size,
            config_json=config.model_dump_json(),
            images=images,
            ids=subset.id_array,
            subset=subset,
            training=training,
            settings=settings,
            train=linear_protocol if freeze else fine_tune,
        ),
        say,
    )


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
    weights, or from the encoder of the checkpoint student_from, which must have been trained at the teacher's image
    size. subset_file with alpha below 1: labels to use as well. Otherwise as `finetune_checkpoint`.
    """
    device = settings.device
    if alpha < 1 and subset_file is None:
        raise ConfigError([f"alpha {alpha:g} gives weight to labels: name the samples with a subset file"])
    teacher = run_on_all_ranks(lambda: load_classifier(teacher_file), device)
    config = parse_config(teacher.config_json)
    source = unlabelled or (config.evaluation.train if subset_file else None) or config.data.train
    images = run_on_all_ranks(
        lambda: _images_for_students(
            kind_of(config.data), source, test or config.data.test, teacher.class_names, teacher_file
        ),
        device,
    )
    torch.manual_seed(settings.seed)
    data = config.evaluation_data  # of the teacher's crops, and so of the student's
    given = {"image_size": data.image_size, **(student or {})}
    section = ModelConfig.model_validate({**config.model.model_dump(), **given})
    begin = None if student_from is None else same_on_all_ranks(student_from, device, say)
    model, checkpoint = run_on_all_ranks(lambda: _student(section, data, begin, say), device)
    student_config = checkpoint.config if checkpoint else config.model_copy(update={"model": section, "data": data})
    ids = None
    if subset_file is not None:
        ids = run_on_main(lambda: load_subset(subset_file, images.train_info).ids, device)
    training = settings.training(
        epochs=DISTILL_EPOCHS,
        base_lr=FINE_TUNE_LR,
        precision=config.train.precision,
        pixels=student_config.data.pixel_format,
        say=say,
    )

    def train(classifier: Classifier, crops: RandomCrops, training: Training) -> None:
        labelled = None if ids is None else torch.tensor(ids)
        distil(
            *(teacher.network, classifier, crops, training),
            labelled_ids=labelled,
            temperature=temperature,
            alpha=alpha,
            teacher_pixels=data.pixel_format,
        )

    asked = {
        "method": "distill",
        "teacher_weights": digest(teacher.network),
        "student": student_config.model.encoder,
        "student_width": student_config.model.width,
        "student_weights": None if checkpoint is None else digest(model),
        "temperature": temperature,
        "alpha": alpha,
        "labelled_samples": None if ids is None or alpha == 1 else _name_of(ids),
    }
    return _complete(
        _Job(
            out,
            asked=asked,
            about={
                "teacher": str(teacher_file),
                "student_from": None if checkpoint is None else str(checkpoint.path),
            },
            classifier=_classifier(model, images, "encoder", student_config.evaluation_data, settings, say),
            data=student_config.evaluation_data,
            test_batch_size=student_config.evaluation.batch_size,
            config_json=student_config.model_dump_json(),
            images=images,
            ids=np.arange(images.train_info.num_samples),
            subset=None,
            training=training,
            settings=settings,
            train=train,
        ),
        say,
    )


def _name_of(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:16]


def _student(
    section: ModelConfig, data: DataConfig, student_from: Source | None, say: Say
) -> tuple[SimCLR, Checkpoint | None]:
    """A fresh network, or that of a checkpoint, whose evaluations must see the images as the teacher does."""
    image_size, pixels = data.image_size, data.pixel_format
    if student_from is None:
        return build_model(section), None
    model, checkpoint = images_alone(*load_pretrained(student_from, say), "distillation")
    if not checkpoint.config.data.pixel_format.has_pixels_of(pixels):
        raise ConfigError(
            [
                f"--student-from {checkpoint.path}: takes {checkpoint.config.data.pixel_format}, the teacher {pixels}, "
                "and both see the same images"
            ]
        )
    if (size := checkpoint.config.evaluation_data.image_size) != image_size:
        raise ConfigError(
            [
                f"--student-from {checkpoint.path}: is evaluated on images of {size} px, the teacher on {image_size} "
                f"px, and both see the same crops: take a student of evaluation.image_size={image_size}"
            ]
        )
    return model, checkpoint


def _images_for_students(
    kind: Kind, source: str, test: str | None, class_names: tuple[str, ...], teacher: Path
) -> LabelledImages:
    """Labels of `source` are not read, but if it has some, they must be of the teacher's classes, in their order."""
    if test is None:
        raise ConfigError(["data.test is null, and there is no --test: give held-out images with --test PATH"])
    info, test_info = kind.describe(source), kind.describe(test)
    if (info.labels >= 0).any() and info.class_names != class_names:
        raise DataError(
            f"{source} does not have the classes of the teacher {teacher} in its order; distil on images without "
            "labels, or prepared with the same classes (`simclr-dist prepare --classes-from`)"
        )
    classes = match_classes(class_names, test_info.class_names, test_info.labels, train=str(teacher), test=test)
    return LabelledImages("image", source, test, replace(info, class_names=class_names), test_info, classes)


def _classifier(
    model: SimCLR, images: LabelledImages, start: Start, data: DataConfig, settings: Settings, say: Say
) -> Classifier:
    """On top of `model`, whose dropout and its like draw by key from here on, so that a training can be continued."""
    if warning := key_draws(model, images_of(data.image_size, data.pixel_format.channels)).warning():
        say(f"warning: {warning}")
    torch.manual_seed(settings.seed)
    return Classifier(model, images.num_classes, start)


# ---------------------------------------------------------------------------------------------------------------------
# Begin, go on, finish


@dataclass(frozen=True)
class _Job:
    """A classifier to be trained, tested and kept in `out`.

    asked: what its weights depend on, beside settings and images. about: what result.json says as well.
    data: how images are loaded and cropped. ids: of those to train on. config_json: for `save_classifier`.
    """

    out: Path
    asked: dict[str, Any]
    about: dict[str, Any]
    classifier: Classifier
    data: DataConfig
    test_batch_size: int
    config_json: str
    images: LabelledImages
    ids: NDArray[np.int64]
    subset: Subset | None
    training: Training
    settings: Settings
    train: Callable[[Classifier, RandomCrops, Training], None]

    @property
    def file(self) -> Path:
        return self.out / "classifier.safetensors"

    @property
    def result(self) -> Path:
        return self.out / "result.json"

    def settled(self) -> dict[str, Any]:
        """`asked`, complete. Images are named by what they are: a path may be written in several ways."""
        return {
            **self.asked,
            "seed": self.settings.seed,
            "epochs": self.training.epochs,
            "base_lr": self.training.base_lr,
            "weight_decay": self.training.weight_decay,
            "batch_size": min(self.settings.batch_size, len(self.ids)),
            "precision": self.training.precision,
            "image_size": self.data.image_size,
            "train_fingerprint": self.images.train_info.content_fingerprint,
            "test_fingerprint": self.images.test_info.content_fingerprint,
        }


def _complete(job: _Job, say: Say) -> dict[str, Any]:
    """What result.json holds: from disk, or after what is left to do."""
    device = job.settings.device
    asked = run_on_main(job.settled, device)
    unfinished = Unfinished(
        job.out / "unfinished.safetensors", asked, device, say, every_s=60 * job.settings.save_every_minutes
    )
    if result := run_on_main(lambda: _finished(job, asked), device):
        say(f"{job.out}: done already")
        unfinished.remove()
        return result

    def begin() -> None:
        require_writable(job.out)
        if job.subset is not None:
            save_subset(job.out / "subset.json", job.subset)

    run_on_main(begin, device)
    with run_on_all_ranks(lambda: _random_crops(job), device) as crops:
        job.train(job.classifier, crops, replace(job.training, unfinished=unfinished))
    found = _test(job)
    facts = {
        **asked,
        **job.about,
        "train": job.images.train,
        "test": job.images.test,
        "num_parameters": sum(p.numel() for p in job.classifier.parameters()),
        "top1": found.top1,
        "top5": found.top5,
    }
    run_on_main(lambda: _save(job, facts), device)
    unfinished.remove()
    return facts


def _finished(job: _Job, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was done before. Raises ConfigError where that was something else. Release 0.1 wrote down less."""
    if not job.result.exists():
        return None
    result = read_record(job.result)
    if result is None or not job.file.exists():
        raise ConfigError([f"{job.out}: its result cannot be read; remove it, or name another folder with --out"])
    known = {key: value for key, value in asked.items() if key in result}
    if changes := differences({key: result[key] for key in known}, known):
        raise ConfigError(
            [
                f"{job.out} holds another classifier already ({'; '.join(changes)}): choose another folder with --out, "
                "or remove it"
            ]
        )
    return result


def _random_crops(job: _Job) -> RandomCrops:
    return RandomCrops(
        job.images.train,
        job.ids,
        image_size=job.data.image_size,
        batch_size=job.settings.batch_size,
        seed=job.settings.seed,
        num_threads=job.data.num_threads,
    )


def _test(job: _Job) -> Accuracy:
    """On the test images, which are used only here, with the training set's class numbers. Ranks share them."""
    images = job.images
    own = part_of_rank(images.test_info.num_samples, distributed.rank(), distributed.world_size())
    loaded = load_images(images.test, job.data.image_size, batch_size=job.test_batch_size, ids=own)
    batches = ((pixels, torch.from_numpy(images.classes(labels.numpy())), ids) for pixels, labels, ids in loaded)
    return accuracy(
        job.classifier,
        batches if len(own) else None,
        device=job.settings.device,
        precision=job.training.precision,
        normalize=kind_of(job.data).to_input,
    )


def _save(job: _Job, facts: dict[str, Any]) -> None:
    """Writes classifier.safetensors, then result.json. Raises ConfigError with the figure where they cannot be."""
    history = {key: value for key, value in facts.items() if key not in ("num_parameters", "top1", "top5")}
    try:
        save_classifier(job.file, job.classifier, job.images.train_info.class_names, job.config_json, history)
        replace_text(job.result, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            [
                f"top-1 {facts['top1']:.2%}, top-5 {facts['top5']:.2%}, but {job.out} cannot be written to "
                f"({error.strerror or error}): make room and run the same command, or name another folder with --out"
            ]
        ) from None


def _reporter(epochs: int, say: Say) -> Callable[[int, float], None]:
    """Prints about ten lines over the whole training."""
    every = max(1, epochs // 10)

    def report(epoch: int, loss: float) -> None:
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            say(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}")

    return report
