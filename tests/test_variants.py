"""Each kind of loss, a learnt temperature, more than two views: the same on any number of processes, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training import Training
from tests.variants_train import STEPS, variants

SETTINGS = ("train.global_batch_size=16", "optim.optimizer=adamw", "model.width=8", "monitor.health_every_steps=2")


def run_of(training: Training, at: int, part: str) -> Training:
    """The same object, looking at another folder."""
    training.run_dir = training.run_dir.with_name(f"{training.run_dir.name.partition('-')[0]}-{at}-{part}")
    return training


def column(run_dir: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


@pytest.mark.distributed
def test_every_variant_is_the_same_on_one_two_and_four_processes_and_resumes_with_the_same_bytes(
    images: Path, tmp_path: Path
) -> None:
    trainings = {}
    for world_size in (1, 2, 4):
        training = Training(
            images, tmp_path, f"on{world_size}", *SETTINGS, world_size=world_size, module="tests.variants_train"
        )
        assert training.wait(300) == [0] * world_size, training.output
        trainings[world_size] = training
    for at, (name, settings) in enumerate(variants().items()):
        curves, temperatures = {}, {}
        for world_size, training in trainings.items():
            whole = run_of(training, at, "whole")
            curves[world_size], digests = whole.losses(), whole.final_bytes()
            temperatures[world_size] = column(whole.run_dir, "train/temperature")
            if world_size == 2:
                parts = run_of(training, at, "parts")
                assert parts.final_bytes() == digests, name
                assert parts.losses() == curves[world_size], name
        assert len(curves[1]) == STEPS
        learnt = settings["loss"].get("learn_temperature", False)
        assert len(set(temperatures[1])) == (STEPS if learnt else 0), name
        for world_size in (2, 4):
            assert curves[world_size] == pytest.approx(curves[1], rel=1e-4), (name, world_size)
            assert temperatures[world_size] == pytest.approx(temperatures[1], rel=1e-4), (name, world_size)
        newest = max((parts.run_dir / "checkpoints").glob("step_*"))
        assert ("loss.log_temperature" in load_file(newest / "model.safetensors")) == learnt
