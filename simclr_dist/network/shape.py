"""A network without values: its shapes take neither memory nor time."""

from __future__ import annotations

from accelerate import init_empty_weights

from simclr_dist.config import ModelConfig
from simclr_dist.network.freezing import freeze_matching
from simclr_dist.network.simclr import SimCLR, build_model


def shape_of_model(model: ModelConfig) -> SimCLR:
    """The network on the device "meta", with `model.freeze` as in training. Raises ConfigError.

    Only parameters are made there, not every tensor: some networks (RegNets, Swins) read values while they are built.
    One that reads its parameters, too, is built with values that are then forgotten.
    """
    try:
        with init_empty_weights():
            network = build_model(model)
    except (NotImplementedError, RuntimeError):
        network = build_model(model)
    freeze_matching(network, model.freeze)
    return network.to("meta")
