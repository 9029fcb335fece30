"""The checkpoints of a run: which one to continue from, and which ones to keep."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from simclr_dist.atomic import replace_text
from simclr_dist.checkpoint.files import Checkpoint, read_checkpoint
from simclr_dist.errors import CheckpointError
from simclr_dist.parallel import distributed
from simclr_dist.run.layout import RunDir, is_checkpoint, step_of


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return RunDir(run_dir).list_checkpoints()


def newest_valid(run_dir: Path, warn: Callable[[str], None], *, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Damaged ones are named to `warn` (and renamed with set_aside). Raises CheckpointError if there are some but none
    is valid: starting from 0 in silence would throw the run away.
    """
    candidates = list_checkpoints(run_dir)
    for path in reversed(candidates):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint: {error}")
            if set_aside:
                os.rename(path, _free_name(path.with_name(path.name + ".corrupt")))
    invalid = list(RunDir(run_dir).checkpoints.glob("step_*"))
    if invalid:
        raise CheckpointError(
            f"{run_dir}/checkpoints: {len(invalid)} checkpoint(s), none of them valid; "
            "to start again from step 0 choose another name=… or remove that directory"
        )
    return None


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{i}") for i in range(1, 1000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


@dataclass(frozen=True)
class Kept:
    """RUN/checkpoints/kept.json: the checkpoints that no pruning removes."""

    milestones: tuple[int, ...] = ()
    """Their steps."""
    best_step: int | None = None
    best_knn_top1: float = -1.0

    @classmethod
    def read(cls, run_dir: Path) -> Kept:
        """Nothing is kept where there is no readable file: a lost file must not stop a run."""
        try:
            values = json.loads(RunDir(run_dir).kept_checkpoints.read_text(encoding="utf-8"))
            best = values["best_step"]
            return cls(
                tuple(int(step) for step in values["milestones"]),
                int(best) if best is not None else None,
                float(values["best_knn_top1"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, run_dir: Path) -> None:
        """Raises OSError."""
        replace_text(RunDir(run_dir).kept_checkpoints, json.dumps(asdict(self)) + "\n")

    def holds(self, path: Path) -> bool:
        return step_of(path) in (*self.milestones, self.best_step)


def prune(run_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and those that are kept, and what a killed save has left."""
    folder = RunDir(run_dir).checkpoints
    kept = Kept.read(run_dir)
    for path in list_checkpoints(run_dir)[:-keep]:
        if kept.holds(path):
            continue
        trash = path.with_name(f".trash-{path.name}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


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


def agree_on_newest(run_dir: Path, device: torch.device, warn: Callable[[str], None]) -> Checkpoint | None:
    """`newest_valid` chosen by rank 0 and read by every rank, or CheckpointError on every rank."""
    chosen, failure, found = -1, None, None
    if distributed.rank() == 0:
        try:
            found = newest_valid(run_dir, warn, set_aside=True)
            chosen = found.step if found else -1
        except CheckpointError as error:
            chosen, failure = -2, error
    step = int(distributed.broadcast_from_main_(torch.tensor([chosen], device=device)))
    if step == -2:
        raise failure or CheckpointError(f"{run_dir}: no valid checkpoint (details on rank 0)")
    if step == -1:
        return None
    return found or read_checkpoint(RunDir(run_dir).checkpoint(step))
