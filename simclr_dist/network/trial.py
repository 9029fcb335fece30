"""Tries a network before anything is trained: does it run at its size, and is every parameter in the loss?

On tensors without memory where the network allows that: it takes a tenth of a second and no memory for a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simclr_dist.config import ModelConfig
from simclr_dist.errors import ConfigError
from simclr_dist.network.freezing import freeze_matching
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import SimCLR, build_model

USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)


@dataclass(frozen=True)
class Tried:
    network: SimCLR
    """Shapes only, on the device "meta"."""
    unused: tuple[str, ...]
    """Trainable parameters that get no gradient: nothing would ever change them, and DDP fails over them."""

    @property
    def remark(self) -> str:
        """A sentence about `unused`; empty where there are none."""
        if not self.unused:
            return ""
        names = ", ".join(self.unused[:5]) + (", …" if len(self.unused) > 5 else "")
        return (
            f"{len(self.unused)} of the network's trainable parameters are in no path to the loss, and are not "
            f"trained: {names}"
        )


def try_model(config: ModelConfig, image_size: int) -> Tried:
    """One image of `image_size` pixels in two views, forward and backward. The global random state stays as it is.

    Raises ConfigError where the encoder is unknown, or cannot take such images.
    """
    with torch.random.fork_rng(devices=[]):
        network = shape_of_model(config)
        try:
            with torch.device("meta"):
                return Tried(network, _unused(network, torch.empty(2, 3, image_size, image_size)))
        except Exception:  # an operation that needs values, or one that fails: with values it will be seen which
            return Tried(network, _try_with_values(config, image_size))


def check_evaluation_size(
    config: ModelConfig, network: SimCLR, image_size: int, *, trained_at: int, asked_by: str = "evaluation.image_size"
) -> None:
    """Raises ConfigError where the encoder of `network`, which may have shapes only, takes no image of that side."""
    if image_size == trained_at:
        return
    reason = refuses(network.encoder, (image_size, image_size))
    if reason and next(network.parameters()).is_meta:  # an operation that needs values is no reason
        reason = refuses(build_model(config).encoder, (image_size, image_size))
    if reason:
        raise ConfigError(
            [
                f"{asked_by}: {image_size}, but {config.encoder} is built for images of {trained_at} px, those of its "
                f"training: leave it out ({reason})"
            ]
        )


@torch.no_grad()
def refuses(encoder: nn.Module, size: tuple[int, int]) -> str:
    """Why the encoder, in evaluation mode, does not take images of this height and width; empty where it does."""
    parameter = next(encoder.parameters(), torch.empty(0))
    try:
        encoder.eval()(torch.zeros(1, 3, *size, device=parameter.device))
    except Exception as error:  # libraries and one's own encoders raise whatever they like
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def freeze(network: nn.Module, names: tuple[str, ...]) -> None:
    """Takes parameters out of training, as if they were constants."""
    for name in names:
        network.get_parameter(name).requires_grad_(False)


def _unused(network: SimCLR, images: Tensor) -> tuple[str, ...]:
    h, z = network.train()(images)
    if h.shape != (len(images), network.feature_dim):
        raise ValueError(f"h has shape {tuple(h.shape)}, not {(len(images), network.feature_dim)}")
    z.sum().backward()
    named = network.named_parameters()
    return tuple(name for name, p in named if p.requires_grad and p.grad is None)


def _try_with_values(config: ModelConfig, image_size: int) -> tuple[str, ...]:
    network = build_model(config)
    freeze_matching(network, config.freeze)
    try:
        return _unused(network, torch.randn(2, 3, image_size, image_size))
    except Exception as error:
        fitting = next((size for size in USUAL_SIZES if size != image_size and _runs(network, size)), None)
        remedy = f"it runs with data.image_size={fitting}" if fitting else "choose another encoder"
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            [
                f"model.encoder: {config.encoder} cannot take images of {image_size} px; {remedy} "
                f"({type(error).__name__}: {first_line})"
            ]
        ) from error


def _runs(network: SimCLR, image_size: int) -> bool:
    try:
        _unused(network, torch.zeros(2, 3, image_size, image_size))
    except Exception:
        return False
    return True
