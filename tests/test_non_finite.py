"""What follows from a loss or gradient that is NaN, on one process; several ranks are in test_faults.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from simclr_dist.config import TrainConfig
from simclr_dist.data import Batch
from simclr_dist.errors import NonFiniteAbortError
from simclr_dist.health.check import Recording
from simclr_dist.loss import NonFiniteError
from simclr_dist.training.non_finite import NonFinitePolicy, StepFacts
from simclr_dist.training.step import StepResult
from simclr_dist.training.trainer import Trainer

IDS = torch.tensor([3, 5])
BATCH = Batch(torch.zeros(2, 2, 1, 1, 3, dtype=torch.uint8), IDS, IDS, 0)


class Training:
    """Steps of BatchNorm under a policy that skips two bad steps in a row."""

    def __init__(self, run_dir: Path, on_non_finite: str = "skip") -> None:
        self.model = nn.BatchNorm1d(2)
        self.warnings: list[str] = []
        settings = TrainConfig(global_batch_size=2, epochs=1, on_non_finite=on_non_finite, max_skipped_steps=2)
        self.policy = NonFinitePolicy(settings, run_dir, 0, self.model, torch.device("cpu"), self.warnings.append)

    def step(self, value: float) -> StepResult:
        """The loss is as finite as `value`."""

        def train_step(batch: Batch) -> StepResult:
            h = self.model(torch.tensor([[1.0, value], [2.0, 3.0]]))
            if not math.isfinite(value):
                raise NonFiniteError("row 0 of z is NaN", {0: (1, 0)})
            loss = h.detach().sum()
            return StepResult(loss, loss, h, h, None)

        return self.policy.run(train_step, BATCH, StepFacts(7, 0.5, IDS))


def test_a_skipped_step_leaves_the_statistics_of_batch_norm_as_they_were(tmp_path: Path) -> None:
    training = Training(tmp_path)
    assert not training.step(1.0).skipped
    before = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
    assert training.step(math.nan).skipped
    assert all(torch.equal(buffer, before[name]) for name, buffer in training.model.named_buffers())
    assert training.warnings == ["step 7 skipped: row 0 of z is NaN"]


def test_more_bad_steps_in_a_row_than_allowed_end_the_training(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for value in (math.nan, math.nan, 1.0, math.nan, math.nan):  # a good step in between counts anew
        training.step(value)
    with pytest.raises(NonFiniteAbortError, match=r"step 7, learning rate 0\.5: row 0 of z is NaN"):
        training.step(math.nan)


def test_under_stop_the_first_bad_step_ends_the_training_and_its_samples_are_written(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteAbortError, match="sample ids are in"):
        Training(tmp_path, "stop").step(math.nan)
    (record,) = tmp_path.glob("non_finite_*.json")
    assert json.loads(record.read_text())["sample_ids"] == [3, 5]


@pytest.mark.parametrize(("precision", "advice"), [("fp32", None), ("bf16", "fp32"), ("fp16", "bf16 or fp32")])
def test_the_advice_names_a_precision_only_where_there_is_a_wider_one(
    tmp_path: Path, precision: str, advice: str | None
) -> None:
    settings = TrainConfig.model_validate({"global_batch_size": 4, "epochs": 1, "precision": precision})
    policy = NonFinitePolicy(settings, tmp_path, 0, nn.Linear(1, 1), torch.device("cpu"), print)

    def diverge(batch: object) -> StepResult:
        raise NonFiniteError("z is NaN", {})

    with pytest.raises(NonFiniteAbortError) as caught:
        policy.run(diverge, None, StepFacts(3, 0.1, torch.arange(2)))  # type: ignore[arg-type]
    assert ("try train.precision" in str(caught.value)) == (advice is not None)
    assert advice is None or f"train.precision={advice})" in str(caught.value)


def test_the_loss_scale_that_a_step_used_is_kept_and_not_the_next_one() -> None:
    scaler = SimpleNamespace(scale=1024.0)
    scaler.get_scale = lambda: scaler.scale

    def step() -> None:
        scaler.scale = 2048.0  # as it does after many steps without infinity

    parts = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        optimizer=SimpleNamespace(step=step, step_was_skipped=False),
        nt_xent=SimpleNamespace(limit_temperature=lambda: None),
    )
    trainer = SimpleNamespace(parts=parts, grad_norm=lambda: torch.tensor(1.0))
    x = torch.zeros(1)
    result = Trainer._step_with_loss_scale(trainer, None, x, x, x, Recording())  # type: ignore[arg-type]
    assert result.loss_scale == 1024.0
