"""Which checkpoint of a run to continue from. What becomes of the others: run/history.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from simclr_dist.checkpoint.files import Checkpoint, read_checkpoint
from simclr_dist.config import parse_config
from simclr_dist.errors import CheckpointError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.layout import RunDir, is_checkpoint

_Source = TypeVar("_Source")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return RunDir(run_dir).list_checkpoints()


def find_checkpoint(path: str | Path | Checkpoint, warn: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """`path` is a run's directory (its newest valid checkpoint is taken) or one checkpoint. Raises CheckpointError.

    One that has been read already is handed back: beside a training, its directory may have gone since.
    """
    if isinstance(path, Checkpoint):
        return path
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
    tried: set[Path] = set()
    # Listed again after each: a training that saves meanwhile removes old ones, but there is always a newer one then.
    while left := [path for path in list_checkpoints(run_dir) if path not in tried]:
        path = left[-1]
        tried.add(path)
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            if not os.path.lexists(path):
                continue
            warn(f"damaged checkpoint: {error}")
            if set_aside:
                _set_aside(path, warn)
    others = _names_in(RunDir(run_dir).checkpoints)
    if others:
        raise CheckpointError(
            f"{run_dir}/checkpoints: {len(others)} checkpoint(s), none of them valid (or all set aside by a rewind); "
            "name one with resume=…, or choose another name=… to start from step 0"
        )
    return None


def _set_aside(path: Path, warn: Callable[[str], None]) -> None:
    try:
        os.rename(path, _free_name(path.with_name(path.name + ".corrupt")))
    except OSError as error:
        warn(f"{path} cannot be set aside: {error.strerror or error}")


def _names_in(folder: Path) -> list[str]:
    """Of checkpoints, also of those that are set aside. Raises CheckpointError where nobody can tell."""
    try:
        return [name for name in os.listdir(folder) if name.startswith("step_")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{i}") for i in range(1, 1000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


# ---------------------------------------------------------------------------------------------------------------------
# All ranks


def same_on_all_ranks(source: _Source, device: torch.device, warn: Callable[[str], None]) -> _Source | Checkpoint:
    """A run's newest checkpoint as the main process reads it; another source as it is. All together.

    While the run trains on, each rank would find another one. Raises as `find_checkpoint` and `run_on_all_ranks`.
    """
    is_run = isinstance(source, str | Path) and RunDir(Path(source)).checkpoints.is_dir()
    if distributed.world_size() == 1 or not is_run:
        return source
    assert isinstance(source, str | Path)
    found = run_on_all_ranks(lambda: find_checkpoint(source, warn) if distributed.rank() == 0 else None, device)
    shared = share(found, device)
    assert shared is not None
    return shared


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
            "facts": {
                key: getattr(found, key)
                for key in ("step", "samples_seen", "fingerprint", "grad_scaler", "started_from")
            },
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
