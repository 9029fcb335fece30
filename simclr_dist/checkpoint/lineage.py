"""Which checkpoint of a run to continue from. What becomes of the others: run/history.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simclr_dist.checkpoint.files import Checkpoint, read_checkpoint
from simclr_dist.config import parse_config
from simclr_dist.errors import CheckpointError
from simclr_dist.parallel import distributed
from simclr_dist.run.layout import RunDir, is_checkpoint


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return RunDir(run_dir).list_checkpoints()


def find_checkpoint(path: str | Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """`path` is a run's directory (its newest valid checkpoint is taken) or one checkpoint. Raises CheckpointError."""
    path = Path(path)
    if (path / "MANIFEST.json").exists() or is_checkpoint(path):
        return read_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run's directory or one of its checkpoints/step_…")
    found = newest_valid(path, warn)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint in it; expected {path}/checkpoints/step_…")
    return found


def newest_valid(run_dir: Path, warn: Callable[[str], None], *, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Damaged ones are named to `warn` (and renamed with set_aside). Raises CheckpointError if there are some but none
    is valid: starting from 0 in silence would throw the run away.
    """
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint: {error}")
            if set_aside:
                os.rename(path, _free_name(path.with_name(path.name + ".corrupt")))
    others = list(RunDir(run_dir).checkpoints.glob("step_*"))
    if others:
        raise CheckpointError(
            f"{run_dir}/checkpoints: {len(others)} checkpoint(s), none of them valid (or all set aside by a rewind); "
            "name one with resume=…, or choose another name=… to start from step 0"
        )
    return None


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{i}") for i in range(1, 1000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


# ---------------------------------------------------------------------------------------------------------------------
# All ranks


def share(found: Checkpoint | None, device: torch.device) -> Checkpoint | None:
    """The main process's checkpoint on every rank: it alone reads and verifies, the others receive. All together."""
    if distributed.world_size() == 1:
        return found
    parts = ("model_state", "optimizer_state", "probe_state")
    header: dict[str, Any] | None = None
    if found is not None:
        header = {
            "path": str(found.path),
            "config": found.config.model_dump(mode="json"),
            "facts": {key: getattr(found, key) for key in ("step", "samples_seen", "fingerprint", "grad_scaler")},
            "tensors": {
                part: [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in state.items()]
                for part, state in ((part, getattr(found, part)) for part in parts)
            },
        }
    header = json.loads(distributed.broadcast_text_from_main(json.dumps(header), device))
    if header is None:
        return None
    states: dict[str, dict[str, torch.Tensor]] = {}
    for part in parts:
        own = getattr(found, part) if found is not None else {}
        states[part] = {}
        for name, dtype, shape in header["tensors"][part]:
            there = own[name].to(device) if own else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            states[part][name] = distributed.broadcast_from_main_(there).cpu()
    if found is not None:
        return found
    facts: dict[str, Any] = {**header["facts"], **states, "config": parse_config(json.dumps(header["config"]))}
    return Checkpoint(Path(header["path"]), **facts)
