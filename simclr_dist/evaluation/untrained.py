"""The encoder before training: with the values from which a run begins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from simclr_dist.checkpoint.weights import plan_start
from simclr_dist.config import DataConfig, ModelConfig
from simclr_dist.data.classes import draw_by_class
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError, UserError
from simclr_dist.network.first_layer import NUM_IMAGES, first_convolution, whiten
from simclr_dist.network.simclr import SimCLR, build_model


def before_training(
    model: ModelConfig, data: DataConfig, seed: int, say: Callable[[str], None]
) -> tuple[str, nn.Module]:
    """A name, and the encoder with the initial values of the run; random ones where model.weights have gone.

    Raises ConfigError or DataError.
    """
    name, network = network_before_training(model, data, seed, say)
    return f"{name} encoder" if name == "untrained" else "encoder as given", network.encoder


def network_before_training(
    model: ModelConfig, data: DataConfig, seed: int, say: Callable[[str], None]
) -> tuple[str, SimCLR]:
    """The same of the whole network: `untrained`, or `as given`."""
    if model.weights is not None:
        try:
            torch.manual_seed(seed)  # of what the weights lack
            network = build_model(model)
            plan_start(model, network, say, data.pixel_format).load_into(network)
            return "as given", network
        except UserError as error:
            say(f"model.weights cannot be read any more, so the baseline is the untrained encoder: {error}")
    torch.manual_seed(seed)
    network = build_model(model)
    set_first_layer(network.encoder, model, data, seed)
    return "untrained", network


def set_first_layer(encoder: nn.Module, model: ModelConfig, data: DataConfig, seed: int) -> None:
    """What `model.first_layer` asks for, from images of data.train as the evaluations crop them.

    The seed draws which. Raises ConfigError where the encoder has no such layer, DataError where no image can be read.
    """
    if model.first_layer == "random":
        return
    convolution = first_convolution(encoder, model.encoder)
    num_images = describe(data.train).num_samples
    ids = draw_by_class(np.zeros(num_images, np.int64), NUM_IMAGES, seed)
    parts = load_images(
        data.train,
        data.image_size,
        batch_size=512,
        ids=ids,
        num_threads=data.num_threads,
        loader=data.loader,
        unreadable={},
    )
    images = [images for images, _, _ in parts]
    if not sum(len(part) for part in images):
        raise DataError(f"model.first_layer: whitened looks at {len(ids)} images of {data.train}: none can be read")
    whiten(convolution, torch.cat(images), data.pixel_format.std, data.pixel_format.largest)
