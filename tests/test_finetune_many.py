"""Fine-tuning and distillation on several ranks, and after a stop: the same result. pytest tests/test_finetune_many.py

Letters: W ranks.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.cli import finetune as command
from simclr_dist.cli import main
from simclr_dist.config import Config
from simclr_dist.errors import CheckpointError, ConfigError, StoppedError, UserError
from simclr_dist.few_labels import finetune, unfinished
from simclr_dist.few_labels.classifier import Classifier
from simclr_dist.few_labels.finetune import Training, fine_tune
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.few_labels.train import Settings, distill_classifier, finetune_checkpoint
from simclr_dist.network.inputs import images as images_of
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.run.stop_signals import SIGNALS
from tests.distributed.spawn import run_ranks
from tests.test_evaluate import make_run, save_checkpoint, save_images

CPU = torch.device("cpu")
TOO_SMALL = "a batch of 2 image(s) has none for some of 3 processes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    make_run(folder)
    return folder


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "classifier.safetensors")


def assert_same_bytes(one: Path, other: Path) -> None:
    """Of the weights: safetensors writes its metadata in any order."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def settings(**changes: Any) -> Settings:
    return Settings(CPU, **{"epochs": 3, "base_lr": 0.4, "batch_size": 10, **changes})


def tune(folder: Path, out: Path, *, say: Any = print, **options: Any) -> dict[str, Any]:
    """60 images in batches of 10."""
    changes = {key: options.pop(key) for key in list(options) if key in Settings.__dataclass_fields__}
    return finetune_checkpoint(folder / "runs" / "tiny", out, settings(**changes), say=say, **options)


def distil_with_labels(folder: Path, out: Path, teacher: Path, **options: Any) -> dict[str, Any]:
    return distill_classifier(
        teacher / "classifier.safetensors",
        out,
        settings(**options),
        student={"width": 6},
        alpha=0.5,
        subset_file=teacher / "subset.json",
        temperature=2.0,
        say=print,
    )


class Dropping(nn.Module):
    """An encoder that draws: by row, and once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Softplus(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


def with_dropout(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = SimCLR(Dropping(), nn.Linear(8, 4), 8)
    key_draws(model, images_of(16))
    classifier = Classifier(model, 3)
    with RandomCrops(
        str(folder / "train"), np.arange(60), image_size=16, batch_size=10, seed=1, num_threads=1
    ) as crops:
        fine_tune(classifier, crops, Training(2, 0.4))
    return dict(classifier.state_dict())


@contextmanager
def stop_before(step: int, *, heard: bool = True) -> Iterator[None]:
    """A signal is heard before this step of the next training. heard: by this rank."""
    original, steps = finetune._next_together, iter(range(10**9))

    def next_together(*arguments: Any) -> Any:
        if next(steps) == step and heard:
            os.kill(os.getpid(), signal.SIGTERM)
            while not SIGNALS.heard:
                time.sleep(0.001)
        return original(*arguments)

    with mock.patch.object(finetune, "_next_together", next_together):
        yield


def every_kind(folder: Path, root: Path) -> dict[str, Any]:
    """Fine-tunes in three ways and distils; the figures of each."""
    found = {
        "encoder": tune(folder, root / "encoder"),
        "head": tune(folder, root / "head", share=0.5, start="head", weight_decay=1e-3),
        "frozen": tune(folder, root / "frozen", freeze=True),
        "student": distil_with_labels(folder, root / "student", root / "head"),
    }
    return {name: (result["top1"], result["top5"]) for name, result in found.items()}


def on_ranks(rank: int, world_size: int, folder: Path, root: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    figures = every_kind(folder, root)
    again = every_kind(folder, root)  # nothing is left to do
    assert again == figures
    with stop_before(7, heard=rank == 1), pytest.raises(StoppedError, match="stopped after 7 of 18 steps"):
        tune(folder, root / "stopped")
    assert tune(folder, root / "stopped")["top1"] == figures["encoder"][0]
    refused = []
    try:
        tune(folder, root / "few", batch_size=2)
    except UserError as error:
        refused.append(str(error))
    return figures, with_dropout(folder), refused


@pytest.mark.distributed
def test_ranks_give_what_one_process_gives(folder: Path, tmp_path: Path) -> None:
    """Batches of 10 over 3 ranks: 4, 3 and 3 images. Half of the labels are 30, all of them batches of 10."""
    expected, dropping = every_kind(folder, tmp_path / "one"), with_dropout(folder)
    found = run_ranks(3, on_ranks, folder, tmp_path / "three", timeout_s=120)
    for name in expected:
        one, three = weights(tmp_path / "one" / name), weights(tmp_path / "three" / name)
        for key, value in one.items():
            torch.testing.assert_close(three[key], value, atol=1e-4, rtol=1e-4, msg=f"{name}: {key}")
    assert_same_bytes(tmp_path / "three" / "stopped", tmp_path / "three" / "encoder")
    for figures, dropped, _ in found:
        for name, shares in expected.items():
            assert figures[name] == pytest.approx(shares, abs=0.04)  # one test image of 30
        for key, value in dropping.items():
            torch.testing.assert_close(dropped[key], value, atol=1e-4, rtol=1e-4)
    assert found[0][2][0].startswith(TOO_SMALL)
    assert found[1][2] == found[2][2] == ["rank 0 has failed; see its own message"]


# ---------------------------------------------------------------------------------------------------------------------
# Stops and kills


@pytest.mark.parametrize(("kind", "steps"), [("encoder", (0, 4, 6)), ("frozen", (11,)), ("student", (5,))])
def test_a_stopped_training_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, kind: str, steps: tuple[int, ...]
) -> None:
    """6 steps an epoch."""

    def train(out: Path, **options: Any) -> dict[str, Any]:
        if kind == "student":
            return distil_with_labels(folder, out, tmp_path / "teacher", **options)
        return tune(folder, out, freeze=kind == "frozen", **options)

    if kind == "student":
        tune(folder, tmp_path / "teacher", share=0.5, epochs=1)
    expected = train(tmp_path / "whole")
    for step in steps:
        out = tmp_path / f"stopped_{step}"
        with (
            stop_before(step),
            pytest.raises(StoppedError, match=rf"stopped after {step} of 18 steps; the same command goes on"),
        ):
            train(out)
        assert not (out / "result.json").exists()
        assert train(out) == expected
        assert_same_bytes(out, tmp_path / "whole")
        assert not (out / "unfinished.safetensors").exists()


def test_a_killed_training_goes_on_from_what_it_kept_on_the_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tune(folder, tmp_path / "whole")
    original, kept = finetune._State.update, []

    def killed_in_step(number: int) -> Any:
        seen = [0]

        def update(*arguments: Any) -> None:
            seen[0] += 1
            if seen[0] == number:
                raise MemoryError
            original(*arguments)

        return update

    out = tmp_path / "killed"
    for number in (3, 9):
        monkeypatch.setattr(finetune._State, "update", killed_in_step(number))
        with pytest.raises(MemoryError):
            tune(folder, out, save_every_minutes=0)
        kept.append((out / "unfinished.safetensors").stat().st_mtime_ns)
    monkeypatch.setattr(finetune._State, "update", original)
    assert tune(folder, out, save_every_minutes=0) == expected
    assert_same_bytes(out, tmp_path / "whole")
    assert sorted(set(kept)) == kept


def test_half_of_another_training_and_a_damaged_half_are_refused(folder: Path, tmp_path: Path) -> None:
    with stop_before(4), pytest.raises(StoppedError):
        tune(folder, tmp_path)
    for change, said in (
        ({"epochs": 4}, "epochs: 3 then, 4 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"freeze": True}, "method: finetune then, linear now"),
        ({"share": 0.5}, "samples: [0-9a-f]* then"),
        ({"train": str(folder / "test")}, "train_fingerprint: [0-9a-f]* then"),
    ):
        with pytest.raises(ConfigError, match=rf"is half of another training \(.*{said}.*remove .* to begin anew"):
            tune(folder, tmp_path, **change)
    file = tmp_path / "unfinished.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:-5] + b"\x00\x01\x02\x03\x04", b"", b"[" * 5000, (10**12).to_bytes(8, "little")):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"unfinished\.safetensors: .*remove .* to begin anew"):
            tune(folder, tmp_path)


def test_a_training_that_cannot_be_kept_on_the_way_goes_on_with_one_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    monkeypatch.setattr(unfinished, "save_file", full)
    expected = tune(folder, tmp_path / "other", save_every_minutes=0, say=said.append)
    assert sum("cannot be kept" in line for line in said) == 1
    monkeypatch.undo()
    assert tune(folder, tmp_path / "whole") == expected


@pytest.mark.parametrize(("rank", "said"), [("0", "stopped after 3 of 9 steps"), ("1", "")])
def test_the_command_says_once_that_it_is_to_be_continued(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise StoppedError("stopped after 3 of 9 steps")

    monkeypatch.setattr(command, "_run_finetune", stopped)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "runs/x"])
    assert caught.value.code == 75
    assert capsys.readouterr().err.strip() == said


def with_a_damaged_image(rank: int, world_size: int, folder: Path, out: Path) -> str:
    try:
        tune(folder, out, train=str(out / "train"))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.distributed
def test_an_image_that_one_rank_cannot_read_ends_all(folder: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "train", 20, seed=0)
    damaged = images / "blue" / "007.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = run_ranks(2, with_a_damaged_image, folder, tmp_path, timeout_s=120)
    assert sorted(text.split(":")[0] for text in found) == ["DataError", "FailedElsewhereError"], found
    assert "007.png" in "".join(found)


def test_a_student_of_another_image_size_is_refused(folder: Path, tmp_path: Path) -> None:
    tune(folder, tmp_path / "teacher", epochs=1)
    content = find_checkpoint(folder / "runs" / "tiny").config.model_dump(
        mode="json", exclude={"model": {"image_size"}}
    )
    content["runs_dir"], content["data"]["image_size"] = str(tmp_path / "runs"), 24
    config = Config.model_validate(content)
    run = save_checkpoint(config, build_model(config.model))
    with pytest.raises(ConfigError, match=r"--student-from .*: is evaluated on images of 24 px, the teacher on 16 px"):
        distill_classifier(
            tmp_path / "teacher" / "classifier.safetensors", tmp_path / "s", settings(), student_from=run, say=print
        )
    assert not (tmp_path / "s").exists()
