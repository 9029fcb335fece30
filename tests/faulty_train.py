"""`simclr_dist.train` with a fault in it: FAULT="kind rank step"; rank "*" is every rank.

raise: an exception. stuck: sleeps outside of any collective. loss: NaN in the views. gradient: infinite, of one rank.
weights: NaN in a weight after the step. save, evaluation: does not end, at whatever step. takeover: another training
claims the directory while a checkpoint is written. slow_save: takes `step` seconds;
slow_evaluation: rank 0's, after what all do together. unread: only rank 0 may read a checkpoint, none stays in memory.
checked: the launcher's agent has checked the training, on the node of `rank` alone.
"""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from simclr_dist import train
from simclr_dist.checkpoint import files, lineage
from simclr_dist.evaluation import online
from simclr_dist.run import guard
from simclr_dist.training import parts, preflight
from simclr_dist.training.trainer import Trainer

kind, rank, step = os.environ["FAULT"].split()
sound_step = Trainer.train_step


def faulty_step(self: Trainer, batch):
    here = rank in ("*", str(self.parts.world.rank)) and str(self.state.step) == step
    if here and kind == "raise":
        raise ArithmeticError("made to fail")
    if here and kind == "stuck":
        time.sleep(600)
    if here and kind == "loss":
        sound_augment, self.augment = self.augment, lambda batch: torch.full_like(sound_augment(batch), torch.nan)
        try:
            return sound_step(self, batch)
        finally:
            self.augment = sound_augment
    if here and kind == "gradient":
        first = next(self.parts.network.parameters())
        handle = first.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        try:
            return sound_step(self, batch)
        finally:
            handle.remove()
    if kind == "unread":
        assert not any(isinstance(value, files.Checkpoint) for value in gc.get_objects())
    result = sound_step(self, batch)
    if here and kind == "weights":
        with torch.no_grad():
            next(self.parts.network.parameters()).fill_(torch.nan)
    return result


def never_ends(*_: object, **__: object) -> None:
    time.sleep(600)


def taken_over_while_saving(tensors: dict[str, torch.Tensor], path: Path) -> None:
    owner = path.parents[2] / "owner.json"  # runs/<name>/checkpoints/.tmp-…/model.safetensors
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "session": "0" * 12, "attempt": "812.1-bbbbbb"}))
    sound_save_file(tensors, path)


sound_save_file = files.save_file


def slow_save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.name.startswith("model"):
        time.sleep(float(step))
    sound_save_file(tensors, path)


def slow_knn(*arguments: Any, **settings: Any) -> float:
    accuracy = sound_knn(*arguments, **settings)
    if os.environ.get("RANK") == "0":
        time.sleep(float(step))
    return accuracy


sound_knn = online.knn_top1
if kind.startswith("slow"):
    guard.BACKSTOP_S = parts.BACKSTOP_S = 1.0
if kind == "slow_save":
    files.save_file = slow_save_file
if kind == "slow_evaluation":
    online.knn_top1 = slow_knn
if kind == "save":
    files.save_file = never_ends
if kind == "unread" and os.environ.get("RANK") != "0":
    lineage.read_checkpoint = never_ends  # type: ignore[assignment]
if kind == "checked" and os.environ.get("RANK") == rank:
    preflight.Checked().to_environment()
if kind == "takeover":
    files.save_file = taken_over_while_saving
if kind == "evaluation":
    online.knn_top1 = never_ends  # type: ignore[assignment]
Trainer.train_step = faulty_step  # type: ignore[method-assign]
if __name__ == "__main__":
    train.main()
