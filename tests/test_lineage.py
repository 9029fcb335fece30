"""A run's history is true: going back sets aside by name, settings that change are said, nothing is re-labelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simclr_dist.checkpoint.files import read_checkpoint
from simclr_dist.report.record import read_run
from simclr_dist.run.history import is_finished
from tests.training import STEPS, Training

pytestmark = pytest.mark.distributed
OFTEN = ("checkpoint.every_steps=4", "checkpoint.keep=9")


def checkpoints(training: Training) -> dict[str, int]:
    """By name: the step inside."""
    return {path.name: read_checkpoint(path).step for path in (training.run_dir / "checkpoints").iterdir()}


def story(training: Training) -> list[dict]:
    return [json.loads(line) for line in (training.run_dir / "lineage.jsonl").read_text().splitlines()]


def files(run_dir: Path) -> dict[str, bytes]:
    """What a run says of itself, apart from how its last start went."""
    names = ("config.yaml", "lineage.jsonl", "log.jsonl")
    return {name: (run_dir / name).read_bytes() for name in names}


def test_going_back_sets_the_newer_checkpoints_aside_and_ends_with_the_same_bytes(images: Path, tmp_path: Path) -> None:
    world_size = 2
    undisturbed = Training(images, tmp_path, "one", *OFTEN, world_size=world_size)
    assert undisturbed.wait() == [0] * world_size, undisturbed.output
    final, losses = undisturbed.final_bytes(), undisturbed.losses()
    early = tmp_path / "one" / "checkpoints" / "step_00000008"
    back = Training(images, tmp_path, "one", *OFTEN, f"resume={early}", "train.max_steps=18", world_size=world_size)
    assert back.wait() == [0] * world_size, back.output
    aside = [f"step_{step:08d}.superseded-1" for step in (12, 16, 20, 24)]
    assert all(name in back.output[0] for name in aside)
    assert "changed since step 8: train.max_steps: null → 18" in back.output[0]
    assert checkpoints(back) == {
        **{f"step_{step:08d}": step for step in (4, 8, 12, 16, 18)},
        **{f"step_{step:08d}.superseded-1": step for step in (12, 16, 20, 24)},
    }
    assert [line["event"] for line in story(back)] == ["start", "end", "rewind", "rewound", "start", "end"]
    assert story(back)[2]["set_aside"] == [name.partition(".")[0] for name in aside]
    kept_log = (tmp_path / "one" / "log.superseded-1.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in kept_log) == STEPS
    on = Training(images, tmp_path, "one", *OFTEN, world_size=world_size)
    assert on.wait() == [0] * world_size, on.output
    newest = (tmp_path / "one" / "checkpoints" / f"step_{STEPS:08d}") / "model.safetensors"
    assert newest.exists()
    assert on.losses() == losses
    for name in final:
        superseded = tmp_path / "one" / "checkpoints" / f"step_{STEPS:08d}.superseded-1" / name
        assert (newest.parent / name).read_bytes() == superseded.read_bytes()


def test_a_checkpoint_of_another_run_sets_all_of_this_one_aside(images: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert Training(images, tmp_path, name, *OFTEN, "train.max_steps=8").wait() == [0]
    foreign = tmp_path / "other" / "checkpoints" / "step_00000004"
    back = Training(images, tmp_path, "one", *OFTEN, f"resume={foreign}", "train.max_steps=6")
    assert back.wait() == [0], back.output
    assert set(checkpoints(back)) == {"step_00000004.superseded-1", "step_00000008.superseded-1", "step_00000006"}
    assert set(checkpoints(Training(images, tmp_path, "other", "train.max_steps=8"))) >= {"step_00000004"}


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ("loss.temperature=0.9", "loss.temperature: 0.5 → 0.9"),
        ("optim.base_lr=0.5", "optim.base_lr: 0.001 → 0.5"),
        ("augment.blur_p=0.25", "augment.blur_p: null → 0.25"),
        ("train.max_steps=4", "train.max_steps: 8 → 4: that is 4 steps, but"),
    ],
)
def test_a_finished_run_is_not_re_labelled(images: Path, tmp_path: Path, change: str, listed: str) -> None:
    first = Training(images, tmp_path, "one", "train.max_steps=8")
    assert first.wait() == [0]
    before, bytes_before = files(first.run_dir), first.final_bytes()
    again = Training(images, tmp_path, "one", "train.max_steps=8", change)
    assert again.wait() == [2], again.output
    assert listed in again.output[0]
    assert "Traceback" not in again.output[0]
    assert files(first.run_dir) == before
    assert first.final_bytes() == bytes_before
    assert is_finished(first.run_dir)


def test_a_finished_run_may_be_asked_for_again_and_watched_otherwise(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "one", "train.max_steps=4")
    assert first.wait() == [0]
    before = files(first.run_dir)
    for other in ((), ("monitor.log_every_steps=5", "timeout.save_s=77")):
        again = Training(images, tmp_path, "one", "train.max_steps=4", *other)
        assert again.wait() == [0], again.output
        assert files(first.run_dir) == before
    assert again.status()["state"] == "finished"


def test_what_changes_is_said_and_every_configuration_is_kept_with_its_step(images: Path, tmp_path: Path) -> None:
    parts = (
        (8, ()),
        (12, ("loss.temperature=0.9", "augment.blur_p=0.25")),
        (16, ("loss.temperature=0.9", "augment.blur_p=0.25")),
    )
    for end, settings in parts:
        part = Training(images, tmp_path, "one", f"train.max_steps={end}", *settings)
        assert part.wait() == [0], part.output
        if end == 12:
            assert "changed since step 8: loss.temperature: 0.5 → 0.9" in part.output[0]
            assert "changed since step 8: augment.blur_p: " in part.output[0]
    assert "loss.temperature:" not in part.output[0]
    told = read_run(part.run_dir).story
    assert any(line.endswith("changed: loss.temperature: 0.5 → 0.9") for line in told)
    starts = [line for line in story(part) if line["event"] == "start"]
    assert [line["step"] for line in starts] == [0, 8, 12]
    assert [line["settings"]["loss"]["temperature"] for line in starts] == [0.5, 0.9, 0.9]
    assert starts[1]["changed"]["loss.temperature"] == [0.5, 0.9]
    assert yaml.safe_load((part.run_dir / "config.yaml").read_text())["loss"]["temperature"] == 0.9


def test_a_start_that_trains_nothing_does_not_change_what_the_report_says(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "one", "train.max_steps=8")
    assert first.wait() == [0]
    dies = Training(*(images, tmp_path, "one", "loss.temperature=0.9"), module="tests.faulty_train", FAULT="raise 0 8")
    assert dies.wait() == [1]
    assert read_run(first.run_dir).settings["loss.temperature"] == 0.5


def test_one_rank_reads_the_checkpoint_and_nobody_keeps_it(images: Path, tmp_path: Path) -> None:
    settings = ("optim.optimizer=adamw", "evaluation.online_probe=true")
    whole = Training(images, tmp_path, "whole", *settings, "train.max_steps=9", world_size=2)
    assert whole.wait() == [0, 0], whole.output
    for end, fault in ((6, "none 0 0"), (9, "unread 0 0")):
        part = Training(
            *(images, tmp_path, "parts", *settings, f"train.max_steps={end}"),
            world_size=2,
            module="tests.faulty_train",
            FAULT=fault,
        )
        assert part.wait(60) == [0, 0], part.output
    assert "resumes at step 6" in part.output[0]
    assert part.final_bytes() == whole.final_bytes()


def test_torchrun_starting_again_does_not_go_back_again(images: Path, tmp_path: Path) -> None:
    assert Training(images, tmp_path, "one", *OFTEN, "train.max_steps=12").wait() == [0]
    early = tmp_path / "one" / "checkpoints" / "step_00000004"
    again = Training(
        *(images, tmp_path, "one", *OFTEN, f"resume={early}", "train.max_steps=16"), TORCHELASTIC_RESTART_COUNT="1"
    )
    assert again.wait() == [0], again.output
    assert "the newest checkpoint is taken" in again.output[0]
    assert "resumes at step 12" in again.output[0]
    assert not list((tmp_path / "one" / "checkpoints").glob("*superseded*"))
