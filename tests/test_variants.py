"""Each kind of loss, optimiser and start, and more views: the same on any number of processes, and resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import simclr_dist
from simclr_dist.config import Config, DataConfig, LossConfig, load_config
from simclr_dist.data import Batch
from simclr_dist.errors import CheckpointError, ConfigError, DataError
from simclr_dist.kinds.labelled_images import check_loss_labels
from simclr_dist.trainer import Trainer
from simclr_dist.training.summary import loss_in_words
from tests.conftest import REPOSITORY
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
        learnt = settings.get("loss", {}).get("learn_temperature", False)
        assert len(set(temperatures[1])) == (STEPS if learnt else 0), name
        for world_size in (2, 4):
            assert curves[world_size] == pytest.approx(curves[1], rel=1e-4), (name, world_size)
            assert temperatures[world_size] == pytest.approx(temperatures[1], rel=1e-4), (name, world_size)
        newest = max((parts.run_dir / "checkpoints").glob("step_*"))
        assert ("loss.log_temperature" in load_file(newest / "model.safetensors")) == learnt


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and what is refused


def smoke(runs_dir: Path, *overrides: str) -> Config:
    few = ("data.test=null", "evaluation.knn_every_epochs=null", "train.max_steps=2", "train.global_batch_size=8")
    return load_config(REPOSITORY / "configs" / "smoke.yaml", [f"runs_dir={runs_dir}", *few, *overrides])


def test_a_learnt_temperature_is_kept_in_the_run_and_in_no_encoder(tmp_path: Path) -> None:
    learnt = ("loss.learn_temperature=true", "loss.temperature_max=0.502", "optim.optimizer=lars", "optim.base_lr=30")
    run = simclr_dist.pretrain(smoke(tmp_path, *learnt, "monitor.log_every_steps=1"))
    found = column(run.path, "train/temperature")
    assert found == pytest.approx([0.5, 0.502])  # the warm-up begins at 0; then the rate is far too high
    assert (
        f"temperature {found[-1]:.4g}, learnt from 0.5"
        in run.export(tmp_path / "e.safetensors", format="safetensors").card.read_text()
    )
    assert [name for name, _ in run.encoder().named_parameters() if "temperature" in name] == []
    for now in ("loss.learn_temperature=false", "loss.temperature=0.3"):
        with pytest.raises(CheckpointError, match=r"loss\.learn_temperature: true then, false now"):
            simclr_dist.pretrain(smoke(tmp_path, now, "train.max_steps=3", "optim.optimizer=lars"))
    again = simclr_dist.pretrain(smoke(tmp_path, *learnt, "name=again", f"model.weights={run.path}"))
    assert again.state == "finished"


def test_a_temperature_begins_between_its_limits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.temperature \(0.5\) must lie between .* \(0.02\) and .* \(0.4\)"):
        smoke(tmp_path, "loss.learn_temperature=true", "loss.temperature_max=0.4")
    assert smoke(tmp_path, "loss.temperature=5").loss.temperature == 5  # one that stays has no limits


def test_pairs_across_are_for_two_views_and_no_labels(tmp_path: Path) -> None:
    across = "loss.pairs=across"
    assert smoke(tmp_path, across, "loss.kind=dcl").loss.pairs == "across"
    with pytest.raises(ConfigError, match=r"loss.pairs=across compares the two views .*, but data.num_views is 3"):
        smoke(tmp_path, across, "data.num_views=3")
    with pytest.raises(ConfigError, match=r"loss.pairs=across .* nt_xent or dcl .*, but loss.kind is supcon"):
        smoke(tmp_path, across, "loss.kind=supcon")


def test_the_loss_is_called_with_groups_where_a_batch_has_them_and_with_classes_for_supcon() -> None:
    ids, labels, groups = (torch.arange(4) + 10 * i for i in range(3))
    alone = Batch(torch.zeros(2, 4, 1, 1, 3, dtype=torch.uint8), ids, labels, epoch=0)
    together = replace(alone, group_ids=groups).to("cpu", non_blocking=True)
    for kind, expected in (("nt_xent", (ids, groups)), ("dcl", (ids, groups)), ("supcon", (labels, labels))):
        trainer = Trainer.__new__(Trainer)
        trainer.config = cast("Config", SimpleNamespace(loss=LossConfig(kind=kind)))  # type: ignore[arg-type]
        for batch, wanted in zip((alone, together), expected, strict=True):
            assert torch.equal(trainer._ids_of_loss(batch), wanted)


def folder_of(root: Path, classes: dict[str, int]) -> str:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(root / name / f"{i}.png")
    return str(root)


def test_supcon_without_labels_to_compare_is_refused_before_anything_starts(tmp_path: Path) -> None:
    supcon = LossConfig(kind="supcon")
    sources = {
        "none of the 3 images of .* has one; name labelled images with data.train": {"": 3},
        "all 3 images of .* are of one class": {"cat": 3},
    }
    for at, (message, classes) in enumerate(sources.items()):
        data = DataConfig(train=folder_of(tmp_path / str(at), classes), image_size=8)
        with pytest.raises(DataError, match=f"loss.kind=supcon.*{message}"):
            check_loss_labels(data, supcon)
        assert check_loss_labels(data, LossConfig(kind="dcl")) == ""
    data = DataConfig(train=folder_of(tmp_path / "two", {"cat": 2, "dog": 1}), image_size=8)
    assert check_loss_labels(data, supcon) == ""


def test_the_summary_says_what_a_row_is_compared_with() -> None:
    assert loss_in_words(LossConfig(), 2, 512) == (
        "temperature 0.1, 1,022 negatives a row; guessing gives ln(1,023) = 6.93"
    )
    of_four = loss_in_words(LossConfig(kind="dcl", learn_temperature=True), 4, 64)
    assert of_four == (
        "decoupled, temperature 0.1, learnt between 0.02 and 1, 252 negatives a row; guessing gives ln(252) = 5.53"
    )
    assert "each row against 127 others, those of its class are positives; guessing gives ln(127) = " in loss_in_words(
        LossConfig(kind="supcon"), 2, 64
    )
    across = loss_in_words(LossConfig(kind="dcl", pairs="across"), 2, 64)
    assert across == (
        "decoupled, temperature 0.1, 63 negatives a row, all of the other view; guessing gives ln(63) = 4.14"
    )
    assert math.log(127) == pytest.approx(4.84, abs=5e-3)
