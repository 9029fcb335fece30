"""A start at step 0 from weights that there are (`model.weights`): the main process reads, the others receive."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from simclr_dist.checkpoint.weights import plan_start
from simclr_dist.config import Config
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import SimCLR
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks


def check_weights(config: Config) -> str:
    """What a start would take from `model.weights`, in a sentence. Raises CheckpointError or ConfigError."""
    if config.model.weights is None:
        return ""
    return "; ".join(plan_start(config.model, shape_of_model(config.model), _say, config.data.pixel_format).sentences)


def start_from_weights(network: SimCLR, config: Config, device: torch.device) -> dict[str, Any] | None:
    """Loads `model.weights` into the network of every rank; all call it together. The record of it; None: no weights.

    Raises a UserError on the main process, FailedElsewhereError on the others.
    """
    if config.model.weights is None:
        return None

    def read() -> dict[str, Any]:
        if distributed.rank() != 0:
            return {}
        start = plan_start(config.model, network, _say, config.data.pixel_format)
        start.load_into(network)
        return {**start.record, "said": list(start.sentences)}

    record = run_on_all_ranks(read, device)
    _broadcast(network, device)
    found: dict[str, Any] = json.loads(distributed.broadcast_text_from_main(json.dumps(record), device))
    return found


def _broadcast(network: nn.Module, device: torch.device) -> None:
    """Of parameters and buffers, from the main process."""
    if distributed.world_size() == 1:
        return
    for tensor in network.state_dict().values():
        there = tensor.detach().to(device).contiguous()
        tensor.copy_(distributed.broadcast_from_main_(there))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
