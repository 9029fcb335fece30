"""`from simclr_dist.trainer import Trainer`: the public name of simclr_dist/training/trainer.py."""

from simclr_dist.training.trainer import Trainer

__all__ = ["Trainer"]
