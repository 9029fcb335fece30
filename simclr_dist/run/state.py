"""How far a training has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """How far training has come, between two steps."""

    step: int = 0
    samples_seen: int = 0

    def advance(self, global_batch_size: int) -> None:
        self.step += 1
        self.samples_seen += global_batch_size
