"""benchmarks/five_minutes.py: every recipe can be trained, the controls stay what they were, a budget is held."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from benchmarks.five_minutes import ADAMW, BEFORE, CONFIG, ROWS, Row, Seconds, epochs_within, settings, step_s, table
from simclr_dist.config import Config, load_config
from simclr_dist.monitor.speed import LAST_INTERVAL
from simclr_dist.optim.build import unused_settings

ARGUMENTS = argparse.Namespace(train="train.beton", test="test.beton", work="runs", nproc=2, epochs=None)
ARGUMENTS.seconds, ARGUMENTS.cpu_seconds = 300.0, None
# What `make demo` trained in release 0.1.
RELEASED = """
data: {train: train.beton, test: test.beton, image_size: 24}
augment: {preset: simclr_cifar, crop_scale_min: 0.2}
model: {encoder: resnet_small, width: 32, head_hidden_dim: 256, head_out_dim: 64}
loss: {temperature: 0.1}
optim: {optimizer: adamw, base_lr: 2.0e-3, lr_scaling: none, warmup_epochs: 0.2, weight_decay: 1.0e-4}
train: {global_batch_size: 256, epochs: 4, precision: fp32}
"""


def configured(row: Row, *more: str) -> Config:
    return load_config(CONFIG, settings(row, ARGUMENTS, *more), check_data=False, world_size=2)


def test_every_recipe_is_a_training_of_its_own() -> None:
    trained = {name: configured(row) for name, row in ROWS.items()}
    for name, config in trained.items():
        assert not unused_settings(config.optim), name
        others = [other for other, row in ROWS.items() if row.module == ROWS[name].module and trained[other] == config]
        assert others == [name]


def test_the_control_is_the_released_recipe(tmp_path: Path) -> None:
    path = tmp_path / "released.yaml"
    path.write_text(f"name: cifar10_demo\n{RELEASED}")
    released, control = load_config(path, check_data=False), configured(Row(BEFORE), "train.epochs=4")
    for section in ("data", "augment", "model", "loss", "optim", "train"):
        assert getattr(control, section) == getattr(released, section), section
    assert set(ADAMW) < set(BEFORE)


@pytest.mark.parametrize(
    ("budget", "epochs"),
    [
        (Seconds(300, math.inf), 7),  # 195 steps of 0.2 s: 39 s an epoch
        (Seconds(math.inf, 600), 8),  # of 0.37 CPU seconds: 72 s
        (Seconds(300, 600), 7),
        (Seconds(39, math.inf), 1),
        (Seconds(5, math.inf), 1),  # less than one: one
    ],
)
def test_a_budget_is_filled_with_whole_epochs(budget: Seconds, epochs: int) -> None:
    assert epochs_within(budget, Seconds(0.2, 0.37), 195) == epochs


def test_starting_costs_no_budget() -> None:
    start, step = Seconds(11.0, 19.0), Seconds(0.25, 0.5)
    short, long = (Seconds(start.wall + n * step.wall, start.cpu + n * step.cpu) for n in (8, 40))
    assert (long - short) / 32 == step


def test_the_table_has_a_line_for_each_recipe_with_the_mean_of_its_seeds() -> None:
    one = {"row": "demo", "images": 299_520, "wall_s": 240.0, "cpu_s": 470.0, "image_size": 24}
    found = [{**one, "knn": 0.62, "linear": 0.6}, {**one, "knn": 0.64, "linear": 0.61}, {**one, "row": "before"}]
    found[2] |= {"knn": 0.5, "linear": 0.4, "image_size": 16}
    lines = table(found, {"device": "a CPU", "commit": "abc"}, ARGUMENTS)
    assert lines[-2:] == [
        "| demo | 2 | 299,520 | 240 | 470 | 24 px | 63.0 ± 1.4 % | 60.5 ± 0.7 % |",
        "| before | 1 | 299,520 | 240 | 470 | 16 px | 50.0 % | 40.0 % |",
    ]
    assert "300 s by the clock" in " ".join(lines)


def test_a_steps_cost_is_that_of_steps_not_of_starting(tmp_path: Path) -> None:
    speeds = [100.0, 200.0, None, 2560.0, 2550.0, 2570.0]
    lines = [{"step": i, LAST_INTERVAL: speed} if speed else {"step": i} for i, speed in enumerate(speeds)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert step_s(tmp_path, 256) == pytest.approx(0.1, rel=0.01)
