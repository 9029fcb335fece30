"""`train.on_non_finite`: what follows when the loss or the gradient is NaN or infinite.

Both are the same on every rank: the loss refuses a batch with a bad row on all of them, and the gradient is checked
after it was averaged. So each rank decides alone, and all decide alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_dist.config import TrainConfig
from simclr_dist.data import Batch
from simclr_dist.errors import NonFiniteAbortError
from simclr_dist.loss import NonFiniteError
from simclr_dist.parallel.host_copy import copy_to_host
from simclr_dist.run.layout import RunDir
from simclr_dist.training.step import StepResult


@dataclass(frozen=True)
class StepFacts:
    step: int
    lr: float
    sample_ids: Tensor  # int64 [B], this rank's


class NonFiniteGradientError(NonFiniteError):
    def __init__(self, message: str, facts: StepFacts) -> None:
        super().__init__(message, {})
        self.facts = facts


class NonFinitePolicy:
    """Checks the steps of `model` and decides: stop, or skip up to `max_skipped_steps` in a row."""

    def __init__(
        self,
        settings: TrainConfig,
        run_dir: Path,
        rank: int,
        model: nn.Module,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._model = model
        self._warn = warn
        self._skips = settings.on_non_finite == "skip"
        wider = {"fp32": "", "fp16": "bf16 or fp32"}.get(settings.precision, "fp32")
        self._precision_as_cause = f"too few bits (try train.precision={wider}), " if wider else ""
        self._max_skipped = settings.max_skipped_steps
        # To skip, the norm must be known before the optimiser moves. To stop, it may be read one step late, when it has
        # long arrived on the host: a state with NaN is never saved.
        self._at_once = self._skips or device.type == "cpu"
        self._unchecked: tuple[Callable[[], Tensor], StepFacts] | None = None
        self.skipped_in_a_row = 0

    def check_gradient(self, norm: Tensor, facts: StepFacts) -> None:
        """norm []: of the averaged gradient, before the optimiser's step. Raises NonFiniteGradientError, on CUDA under
        `stop` one step late.
        """
        new = copy_to_host(norm), facts
        checked, self._unchecked = (new if self._at_once else self._unchecked), new
        if checked is not None and not math.isfinite(float(checked[0]())):
            raise NonFiniteGradientError("the gradient is NaN or infinite, though the loss is not", checked[1])

    def run(self, train_step: Callable[[Batch], StepResult], batch: Batch, facts: StepFacts) -> StepResult:
        """The result of `train_step(batch)`, or that of a skipped step. Raises NonFiniteAbortError."""
        # The forward that brings NaN has moved BatchNorm's statistics by the time it is noticed.
        buffers = [buffer.clone() for buffer in self._model.buffers()] if self._skips else []
        try:
            result = train_step(batch)
            self.skipped_in_a_row = 0
            return result
        except NonFiniteError as error:
            self.skipped_in_a_row += 1
            facts = getattr(error, "facts", facts)
            path = self._record(facts, str(error))
            if self._skips and self.skipped_in_a_row <= self._max_skipped:
                with torch.no_grad():
                    for buffer, before in zip(self._model.buffers(), buffers, strict=True):
                        buffer.copy_(before)
                self._warn(f"step {facts.step} skipped: {error}")
                return StepResult.of_skipped_step()
            raise NonFiniteAbortError(
                f"step {facts.step}, learning rate {facts.lr:g}: {error}\n"
                f"The batch's sample ids are in {path}. Usual causes: a learning rate or temperature that does not fit "
                f"the batch, {self._precision_as_cause}damaged images."
            ) from None

    def _record(self, facts: StepFacts, error: str) -> Path:
        path = RunDir(self._run_dir).non_finite(facts.step, self._rank)
        record = {"step": facts.step, "lr": facts.lr, "error": error, "sample_ids": facts.sample_ids.tolist()}
        with suppress(OSError):  # a full disk must not hide the reason
            path.write_text(json.dumps(record), encoding="utf-8")
        return path
