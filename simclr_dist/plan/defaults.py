"""Settings that are safe to begin with, for so many images of such a size on this machine, and why each was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from simclr_dist.config import DataConfig, ModelConfig, OptimConfig

FEWEST_IMAGES = 4
MOST_EPOCHS = 1000
_FEW_EPOCHS = 12  # Muon's smaller momentum gains a point of kNN after 2 and 9 epochs, and loses one after 28
_SHARE_OF_TIME = 0.75  # of the minutes is left to steps; evaluations, saves and starts take the rest
_SIDES = (32, 64, 96, 128, 224)
_SMALL = 64  # up to this side, images have too few pixels for blur and for a large stem
_FOR_CPUS = "resnet_small"
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


def choose_first(at: Situation) -> dict[str, Choice]:
    """What the images and the machine decide alone, by key; without names, paths and epochs.

    Raises ValueError with a sentence where there is too little to learn from.
    """
    if at.num_images < FEWEST_IMAGES:
        raise ValueError(
            f"{at.num_images} {'image' if at.num_images == 1 else 'images'} to train on: SimCLR tells the images of a "
            f"batch apart, so it needs {FEWEST_IMAGES} at least, and hundreds to learn something"
        )
    batch = _batch(at)
    chosen = {
        "data.image_size": Choice(_view_side(at), _why_side(at)),
        "model.encoder": _encoder(at),
        "train.global_batch_size": Choice(batch, _why_batch(at, batch)),
        "checkpoint.every_min": Choice(2.0, "little is lost when it is interrupted"),
        "checkpoint.keep": Choice(2, "the newest, and one before it"),
    }
    if at.num_test:
        k = max(1, min(20, at.num_images // 10))
        chosen["evaluation.knn_k"] = Choice(k, f"neighbours among {at.num_images:,} images")
        chosen["evaluation.knn_max_train"] = Choice(10_000, "enough for a curve while it trains")
    return chosen


def choose_rest(
    at: Situation, data: DataConfig, model: ModelConfig, optim: OptimConfig, batch: int
) -> dict[str, Choice]:
    """What depends on the first choices, or on what replaces them.

    data, model, optim, batch: those, and whatever else was asked for, such as weights or an optimiser.
    """
    from simclr_dist.network.encoders import RESNETS  # torch, for which `--help` does not wait

    is_small = data.image_size <= _SMALL
    preset, why = ("simclr_cifar", "small images: no blur") if is_small else ("simclr_imagenet", "photographs")
    chosen = {
        "augment.preset": Choice(preset, why),
        "augment.crop_scale_min": Choice(0.2, "milder crops learn sooner; 0.08 for long trainings"),
    }
    if data.image_size == _view_side(at) < _side(at):
        why = "crops look larger than whole images do, so these are shown larger (arXiv 1906.06423)"
        chosen["evaluation.image_size"] = Choice(_side(at), why)
    encoder = model.encoder
    if encoder == _FOR_CPUS:
        chosen["model.width"] = Choice(32, "channels of its first stage")
        chosen["model.head_hidden_dim"] = Choice(256, "small, as the encoder")
        chosen["model.head_out_dim"] = Choice(64, "small, as the encoder")
    begins_anew = model.weights is None
    if begins_anew and encoder in RESNETS and is_small:
        chosen["model.stem"] = Choice("cifar", "the first layers keep the few pixels there are")
    if begins_anew and encoder == _FOR_CPUS:
        chosen["model.first_layer"] = Choice("whitened", "filters from the images' own patches: it learns sooner")
    if begins_anew and encoder in RESNETS:
        chosen["model.zero_init_residual"] = Choice(False, "learns sooner; true is as good after 90 epochs")
    chosen["loss.temperature"] = Choice(0.1, "the usual one for short trainings; 0.5 suits long ones on small images")
    optimizer = optim.optimizer
    if "optimizer" not in optim.model_fields_set:
        optimizer = "muon" if begins_anew and encoder == _FOR_CPUS else "adamw"
        why = "learns most in minutes" if optimizer == "muon" else "forgives most choices of the learning rate"
        chosen["optim.optimizer"] = Choice(optimizer, why)
    return chosen | _rates(optimizer, batch)


def _rates(optimizer: str, batch: int) -> dict[str, Choice]:
    if optimizer in ("lars", "sgd"):
        rate, decay, whose = (0.3, 1e-6, "SimCLR's") if optimizer == "lars" else (0.06, 5e-4, "a usual one")
        return {
            "optim.base_lr": Choice(rate, f"{whose}, for 256 images"),
            "optim.lr_scaling": Choice("linear", "as usual for it"),
            "optim.weight_decay": Choice(decay, whose),
        }

    def by_square_root(at_256: float) -> Choice:
        rate = float(f"{at_256 * (batch / 256) ** 0.5:.1e}")
        return Choice(rate, f"{at_256:g} at 256 images, by the square root of {batch}")

    rates = {"optim.base_lr": by_square_root(0.1 if optimizer == "muon" else 1e-3)}
    if optimizer == "muon":
        rates["optim.adamw_base_lr"] = by_square_root(2e-3)
    return {
        **rates,
        "optim.lr_scaling": Choice("none", "the rate above is that of this batch"),
        "optim.weight_decay": Choice(1e-4, "as usual"),
    }


def choose_by_length(at: Situation, optim: OptimConfig, epochs: int) -> dict[str, Choice]:
    """What depends on the number of epochs as well."""
    chosen = {"optim.warmup_epochs": Choice(float(f"{epochs / 20:.3g}"), "a twentieth of the epochs")}
    if optim.optimizer == "muon" and epochs <= _FEW_EPOCHS:
        chosen["optim.muon_momentum"] = Choice(0.6, f"for {_FEW_EPOCHS} epochs or fewer; the usual 0.95 for more")
        chosen["optim.muon_ns_steps"] = Choice(3, "enough for few epochs")
    if at.num_test:
        chosen["evaluation.knn_every_epochs"] = Choice(max(1, epochs // 10), "about ten times")
    return chosen


def epochs_in(minutes: float, images_per_s: float, num_images: int) -> int:
    """How often all images can be seen in that time; once at least."""
    return max(1, min(MOST_EPOCHS, round(60 * minutes * _SHARE_OF_TIME * images_per_s / num_images)))


def _side(at: Situation) -> int:
    """Of whole images, as evaluations see them."""
    most = 224 if at.is_gpu else 64
    return max((side for side in _SIDES if side <= min(at.side, most)), default=_SIDES[0])


def _view_side(at: Situation) -> int:
    return _side(at) if at.is_gpu else _side(at) * 3 // 4


def _why_side(at: Situation) -> str:
    return f"images have about {at.side} px" + (
        "" if at.is_gpu else "; on a CPU more views teach more than more pixels"
    )


def _encoder(at: Situation) -> Choice:
    if not at.is_gpu:
        return Choice(_FOR_CPUS, "what a CPU can train in minutes")
    has_plenty = at.num_images >= _MANY_IMAGES and _side(at) > _SMALL
    return Choice("resnet50" if has_plenty else "resnet18", f"{at.num_images:,} images of this size")


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
