"""`simclr_dist.train` with a fault in it: FAULT="kind rank step"; rank "*" is every rank.

raise: an exception. stuck: sleeps outside of any collective. loss: NaN in the views. gradient: infinite, of one rank.
"""

from __future__ import annotations

import os
import time

import torch

from simclr_dist import train
from simclr_dist.training.trainer import Trainer

kind, rank, step = os.environ["FAULT"].split()
sound_step = Trainer.train_step


def faulty_step(self: Trainer, batch):
    here = rank in ("*", str(self.parts.world.rank)) and self.state.step == int(step)
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
    return sound_step(self, batch)


Trainer.train_step = faulty_step  # type: ignore[method-assign]
if __name__ == "__main__":
    train.main()
