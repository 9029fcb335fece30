"""A training of cpu_step.py: `simclr_dist.train`, timed, without what CPU_STEP_WITHOUT names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import ClassVar

from simclr_dist import train
from simclr_dist.data import Batch
from simclr_dist.parallel import accelerator, distributed
from simclr_dist.trainer import Trainer
from simclr_dist.training.step import StepResult


class TimedTrainer(Trainer):
    began: ClassVar[list[float]] = []

    def train_step(self, batch: Batch) -> StepResult:
        self.began.append(time.perf_counter())
        return super().train_step(batch)


def main() -> None:
    without = os.environ["CPU_STEP_WITHOUT"].split()
    if "neighbours" in without:
        distributed.meet_neighbours = lambda timeout_s: None
    if "memory" in without:
        accelerator.keep_freed_memory = lambda: None  # type: ignore[attr-defined]
    train.main(trainer_class=TimedTrainer)
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["CPU_STEP_TIMES"]).write_text(json.dumps(TimedTrainer.began))


if __name__ == "__main__":
    main()
