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
from simclr_dist.network.inputs import Inputs
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import SimCLR, build_model

_ROWS = 4  # two views of two samples: of images with texts two each, and BatchNorm needs two


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


def try_model(config: ModelConfig, inputs: Inputs) -> Tried:
    """Two samples in two views, forward and backward. The global random state stays as it is.

    Raises ConfigError where the encoder is unknown, or cannot take such inputs.
    """
    with torch.random.fork_rng(devices=[]):
        network = shape_of_model(config)
        try:
            views = inputs.example(_ROWS).to("meta")
            with torch.device("meta"):
                return Tried(network, _unused(network, views))
        except Exception:  # an operation that needs values, or one that fails: with values it will be seen which
            return Tried(network, _try_with_values(config, inputs))


def check_evaluation_size(
    config: ModelConfig, network: SimCLR, image_size: int, *, trained_at: int, asked_by: str = "evaluation.image_size"
) -> None:
    """Raises ConfigError where the encoder of `network`, which may have shapes only, takes no image of that side."""
    if image_size == trained_at:
        return
    reason = refuses(network.encoder, (image_size, image_size), config.channels)
    if reason and next(network.parameters()).is_meta:  # an operation that needs values is no reason
        reason = refuses(build_model(config).encoder, (image_size, image_size), config.channels)
    if reason:
        raise ConfigError(
            [
                f"{asked_by}: {image_size}, but {config.encoder} is built for images of {trained_at} px, those of its "
                f"training: leave it out ({reason})"
            ]
        )


@torch.no_grad()
def refuses(encoder: nn.Module, size: tuple[int, int], channels: int = 3) -> str:
    """Why the encoder, in evaluation mode, does not take images of this height and width; empty where it does."""
    parameter = next(encoder.parameters(), torch.empty(0))
    try:
        encoder.eval()(torch.zeros(1, channels, *size, device=parameter.device))
    except Exception as error:  # libraries and one's own encoders raise whatever they like
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


@torch.no_grad()
def normalised_over_positions(encoder: nn.Module, inputs: Inputs) -> list[str]:
    """The BatchNorm layers of `encoder`, which may have shapes only, whose statistics are not of rows [n, C] alone.

    Where sequences are padded, their padding is in these statistics.
    """
    found: list[str] = []
    device = next(encoder.parameters()).device
    rows = 2

    def look(name: str, given: tuple[Tensor, ...]) -> None:
        if given[0].dim() != 2 or len(given[0]) != rows:
            found.append(name)

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: look(name, given))  # type: ignore[misc]
        for name, module in encoder.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    was_training = encoder.training
    try:
        if handles:
            encoder.eval()(inputs.example(rows).to(device))
    finally:
        encoder.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def freeze(network: nn.Module, names: tuple[str, ...]) -> None:
    """Takes parameters out of training, as if they were constants."""
    for name in names:
        network.get_parameter(name).requires_grad_(False)


def _unused(network: SimCLR, views: Tensor) -> tuple[str, ...]:
    h, z = network.train()(views)
    if h.shape != (len(views), network.feature_dim):
        raise ValueError(f"h has shape {tuple(h.shape)}, not {(len(views), network.feature_dim)}")
    z.sum().backward()
    named = network.named_parameters()
    return tuple(name for name, p in named if p.requires_grad and p.grad is None)


def _try_with_values(config: ModelConfig, inputs: Inputs) -> tuple[str, ...]:
    network = build_model(config)
    freeze_matching(network, config.freeze)
    try:
        return _unused(network, inputs.example(_ROWS))
    except Exception as error:
        fitting = next((setting for setting, draw in inputs.others.items() if _runs(network, draw(_ROWS))), None)
        remedy = f"it runs with {fitting}" if fitting else "choose another encoder"
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            [
                f"model.encoder: {config.encoder} cannot take {inputs.what} of {inputs.size}; {remedy} "
                f"({type(error).__name__}: {first_line})"
            ]
        ) from error


def _runs(network: SimCLR, views: Tensor) -> bool:
    try:
        _unused(network, views)
    except Exception:
        return False
    return True
