"""How far a training has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """How far training has come, between two steps."""

    step: int = 0
    samples_seen: int = 0
    started_from: dict[str, Any] | None = None
    """The weights that it began with (model.weights): what they were, and how they did; None: random ones."""

    def advance(self, global_batch_size: int) -> None:
        self.step += 1
        self.samples_seen += global_batch_size
