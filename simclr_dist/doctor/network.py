"""Findings about the network of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from simclr_dist.config import ModelConfig
from simclr_dist.doctor.finding import Finding
from simclr_dist.network.inputs import Inputs
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import build_model


def examine_random_layers(model: ModelConfig, inputs: Inputs) -> Iterator[Finding]:
    """Whether dropout and its like will be the same on any number of processes. Raises ConfigError."""
    found = key_draws(shape_of_model(model), inputs)
    if found.failure:  # it reads values
        found = key_draws(build_model(model), inputs)
    if summary := found.summary():
        yield Finding("ok", "random layers", summary)
    if warning := found.warning():
        yield Finding("warning", "random layers", warning)
