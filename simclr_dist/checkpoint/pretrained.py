"""The trained network of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simclr_dist.checkpoint.files import Checkpoint, check_names
from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.network.simclr import SimCLR, build_model


def load_pretrained(
    path: str | Path | Checkpoint, warn: Callable[[str], None] = lambda _: None
) -> tuple[SimCLR, Checkpoint]:
    """The trained network of a run or checkpoint, on the CPU, in eval mode. Raises CheckpointError."""
    checkpoint = find_checkpoint(path, warn)
    model = build_model(checkpoint.config.model)
    state = {name: x for name, x in checkpoint.model_state.items() if not name.startswith("loss.")}
    check_names(checkpoint.path, "model", state, model.state_dict())
    model.load_state_dict(state)
    return model.eval(), checkpoint
