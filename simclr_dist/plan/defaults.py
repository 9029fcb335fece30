"""Settings that are safe to begin with, for so many images of such a size on this machine, and why each was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

FEWEST_IMAGES = 4
MOST_EPOCHS = 1000
_SHARE_OF_TIME = 0.75  # of the minutes is left to steps; evaluations, saves and starts take the rest
_SIDES = (32, 64, 96, 128, 224)
_MANY_IMAGES = 20_000  # from here on a ResNet-50 has enough to learn from


@dataclass(frozen=True)
class Situation:
    """num_images: to train on. num_test: held-out ones with labels. side: pixels of a typical image's shorter side."""

    num_images: int
    num_test: int
    side: int
    is_gpu: bool
    num_processes: int


class Choice(NamedTuple):
    value: Any
    why: str


def choose_settings(at: Situation) -> dict[str, Choice]:
    """By key, in the order of a configuration; without names, paths and epochs.

    Raises ValueError with a sentence where there is too little to learn from.
    """
    if at.num_images < FEWEST_IMAGES:
        raise ValueError(
            f"{at.num_images} {'image' if at.num_images == 1 else 'images'} to train on: SimCLR tells the images of a "
            f"batch apart, so it needs {FEWEST_IMAGES} at least, and hundreds to learn something"
        )
    size, batch = _image_size(at), _batch(at)
    is_small = size <= 64
    chosen = {
        "data.image_size": Choice(size, _why_size(at, size)),
        "augment.preset": Choice(
            "simclr_cifar" if is_small else "simclr_imagenet", "small images: no blur" if is_small else "photographs"
        ),
        "augment.crop_scale_min": Choice(0.2, "milder crops learn sooner; 0.08 for long trainings"),
        **_encoder(at, is_small),
        "loss.temperature": Choice(0.1, "the usual one for short trainings; 0.5 suits long ones on small images"),
        "optim.optimizer": Choice("adamw", "forgives most choices of the learning rate"),
        "optim.base_lr": Choice(
            _rounded(1e-3 * (batch / 256) ** 0.5), f"1e-3 at 256 images, by the square root of {batch}"
        ),
        "optim.lr_scaling": Choice("none", "the rate above is that of this batch"),
        "optim.weight_decay": Choice(1e-4, "as usual"),
        "train.global_batch_size": Choice(batch, _why_batch(at, batch)),
        "checkpoint.every_min": Choice(2.0, "little is lost when it is interrupted"),
        "checkpoint.keep": Choice(2, "the newest, and one before it"),
    }
    if at.num_test:
        k = max(1, min(20, at.num_images // 10))
        chosen["evaluation.knn_k"] = Choice(k, f"neighbours among {at.num_images:,} images")
        chosen["evaluation.knn_max_train"] = Choice(10_000, "enough for a curve while it trains")
    return chosen


def epochs_in(minutes: float, images_per_s: float, num_images: int) -> int:
    """How often all images can be seen in that time; once at least."""
    return max(1, min(MOST_EPOCHS, round(60 * minutes * _SHARE_OF_TIME * images_per_s / num_images)))


def _image_size(at: Situation) -> int:
    most = 224 if at.is_gpu else 64
    return max((side for side in _SIDES if side <= min(at.side, most)), default=_SIDES[0])


def _why_size(at: Situation, size: int) -> str:
    if size < min(at.side, 224) and not at.is_gpu:
        return f"images have about {at.side} px; on a CPU more images teach more than more pixels"
    return f"images have about {at.side} px"


def _encoder(at: Situation, is_small: bool) -> dict[str, Choice]:
    if not at.is_gpu:
        return {
            "model.encoder": Choice("resnet_small", "what a CPU can train in minutes"),
            "model.width": Choice(32, "channels of its first stage"),
            "model.head_hidden_dim": Choice(256, "small, as the encoder"),
            "model.head_out_dim": Choice(64, "small, as the encoder"),
        }
    name = "resnet50" if at.num_images >= _MANY_IMAGES and not is_small else "resnet18"
    why = f"{at.num_images:,} images of this size"
    stem = {"model.stem": Choice("cifar", "the first layers keep the few pixels there are")} if is_small else {}
    return {"model.encoder": Choice(name, why), **stem}


def _batch(at: Situation) -> int:
    """About a power of two, that divides over the processes and of which an epoch holds two at least."""
    most = 512 if at.is_gpu else 256
    batch = 2
    while 2 * batch <= min(most, at.num_images // 2):
        batch *= 2
    if at.num_processes > batch:
        raise ValueError(f"{at.num_images:,} images are too few for {at.num_processes} processes; use --nproc 1")
    return batch - batch % at.num_processes


def _why_batch(at: Situation, batch: int) -> str:
    if 2 * batch > at.num_images // 2:
        return f"half of {at.num_images:,} images at most"
    return "enough negatives, and it fits"


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
