"""Whole trainings: the same on one and two processes, exact over stops and kills, clear about what is wrong."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr_dist.config import load_config
from simclr_dist.run.layout import read_records
from tests.training import STEPS, Training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Training:
    training = Training(images, tmp_path_factory.mktemp("runs"), "undisturbed")
    assert training.wait() == [0], training.output
    return training


def test_run_leaves_everything_behind(undisturbed: Training) -> None:
    run = undisturbed.run_dir
    assert undisturbed.status()["state"] == "finished"
    assert load_config(run / "config.yaml").name == "undisturbed"
    assert '"torch"' in (run / "environment.jsonl").read_text()
    assert len(undisturbed.losses()) == STEPS
    assert run.stat().st_mode & 0o007 == 0
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/images_per_s", "speed/data_wait_share"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["data/augmented_pairs"]
    assert [e.step for e in events.Scalars("train/loss")] == [64 * step for step in range(1, STEPS + 1)]


def test_run_says_which_programs_computed_it(undisturbed: Training) -> None:
    """Here the compiled one: a fall-back would stand in both places."""
    [start] = read_records(undisturbed.run_dir / "environment.jsonl")
    assert start["implementations"] == {"augment": "numba", "loss": "tiled"}
    [row] = [line for line in undisturbed.output[0].splitlines() if "computed by" in line]
    assert "augment: numba" in row
    assert "loss: tiled" in row


def test_learning_lowers_the_loss(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "learns", "optim.base_lr=0.1")
    assert training.wait() == [0], training.output
    losses = training.losses()
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.2


@pytest.mark.distributed
def test_two_processes_have_the_loss_curve_of_one(images: Path, undisturbed: Training, tmp_path: Path) -> None:
    two = Training(images, tmp_path, "two", world_size=2)
    assert two.wait() == [0, 0], two.output
    assert two.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)
    assert STEPS >= 20


def test_stop_by_signal_and_resume_are_bit_identical(images: Path, undisturbed: Training, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "stopped")
    first.wait_until(lambda: first.has_logged(3))
    for _ in range(3):  # a second signal during the save does no harm
        first.ranks[0].send_signal(signal.SIGTERM)
    assert first.wait() == [0], first.output
    assert first.status()["state"] == "preempted"
    assert 3 <= int(first.status()["step"]) < STEPS  # type: ignore[call-overload]
    second = Training(images, tmp_path, "stopped")
    assert second.wait() == [0], second.output
    assert "resumes at step" in second.output[0]
    assert second.final_bytes() == undisturbed.final_bytes()
    assert second.losses() == undisturbed.losses()


def test_kill_and_resume_are_bit_identical(images: Path, undisturbed: Training, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "killed", "checkpoint.every_epochs=1")
    first.wait_until(lambda: first.has_logged(10))
    first.kill()
    second = Training(images, tmp_path, "killed", "checkpoint.every_epochs=1")
    assert second.wait() == [0], second.output
    assert "resumes at step 8" in second.output[0] or "resumes at step 16" in second.output[0]
    assert second.final_bytes() == undisturbed.final_bytes()
    assert second.losses() == undisturbed.losses()  # and no step stands twice in the log


@pytest.mark.distributed
def test_a_resume_with_four_processes_is_bit_identical(images: Path, tmp_path: Path) -> None:
    """From three ranks on, the order of a sum over ranks depends on where DDP keeps a gradient."""
    whole = Training(images, tmp_path, "whole", "train.max_steps=4", world_size=4)
    assert whole.wait() == [0] * 4, whole.output
    for max_steps in (2, 4):
        parts = Training(images, tmp_path, "parts", f"train.max_steps={max_steps}", world_size=4)
        assert parts.wait() == [0] * 4, parts.output
    assert "resumes at step 2" in parts.output[0]
    assert parts.losses() == whole.losses()
    assert parts.final_bytes() == whole.final_bytes()


@pytest.mark.distributed
def test_stop_heard_by_one_rank_stops_all_and_goes_on_with_another_number(
    images: Path, undisturbed: Training, tmp_path: Path
) -> None:
    first = Training(images, tmp_path, "elastic", world_size=2)
    first.wait_until(lambda: first.has_logged(4))
    first.ranks[1].send_signal(signal.SIGUSR1)
    assert first.wait() == [0, 0], first.output
    assert first.status()["state"] == "preempted"
    second = Training(images, tmp_path, "elastic")
    assert second.wait() == [0], second.output
    assert second.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)


def test_stop_file_stops_and_save_file_saves(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "files", "train.epochs=2000")
    training.wait_until(lambda: training.has_logged(2))
    (training.run_dir / "SAVE").touch()
    training.wait_until(lambda: list((training.run_dir / "checkpoints").glob("step_*")) != [])
    (training.run_dir / "STOP").touch()
    assert training.wait() == [0], training.output
    assert training.status()["state"] == "stopped"
    assert not (training.run_dir / "STOP").exists()


def test_finished_run_does_nothing_more(images: Path, undisturbed: Training) -> None:
    before = undisturbed.final_bytes()
    again = Training(images, undisturbed.run_dir.parent, "undisturbed")
    assert again.wait() == [0]
    assert "finished at step 24 of 24" in again.output[0]
    assert undisturbed.final_bytes() == before
    assert len(undisturbed.losses()) == STEPS


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("seed=1",), "seed: 0 then, 1 now"),
        (("train.global_batch_size=32",), "train.global_batch_size: 64 then, 32 now"),
        (("optim.optimizer=adamw",), "optim.optimizer: sgd then, adamw now"),
        (("model.width=8",), "the configured model has"),
        (("resume=none",), "already has checkpoints"),
        (("resume=/nowhere",), "/nowhere: no such directory"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    images: Path, undisturbed: Training, overrides: tuple[str, ...], reason: str
) -> None:
    refused = Training(images, undisturbed.run_dir.parent, "undisturbed", *overrides)
    assert refused.wait() == [2]
    assert reason in refused.output[0]
    assert "Traceback" not in refused.output[0]


@pytest.mark.distributed
def test_unreadable_data_is_one_message_from_one_rank(images: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.beton"
    bad.write_bytes(b"not a dataset")
    training = Training(images, tmp_path, "bad", f"data.train={bad}", world_size=2)
    assert training.wait() == [2, 2]
    assert sum("bad.beton" in output for output in training.output) == 1
    assert not any("Traceback" in output for output in training.output)


def test_another_number_of_processes_than_planned_is_refused(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "world", SIMCLR_EXPECTED_WORLD_SIZE="2")
    assert training.wait() == [2]
    assert "2 processes were asked for, but 1 run" in training.output[0]


def test_diverging_run_stops_with_the_reason_and_keeps_no_bad_checkpoint(images: Path, tmp_path: Path) -> None:
    training = Training(
        images, tmp_path, "nan", "optim.base_lr=1.0e+30", "optim.warmup_epochs=0.0", "model.head_batch_norm=none"
    )
    assert training.wait() == [2]
    assert training.status()["reason"] == "nan_abort"
    assert "sample ids are in" in training.output[0]
    assert list(training.run_dir.glob("non_finite_step_*.json"))
    assert not list((training.run_dir / "checkpoints").glob("step_*"))


def test_unwritable_run_directory_is_refused_before_training(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    training = Training(images, tmp_path / "file", "x")
    assert training.wait() == [2]
    assert "Traceback" not in training.output[0]


def test_no_process_is_left_behind() -> None:
    assert multiprocessing.active_children() == []
