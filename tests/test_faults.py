"""What a cluster does to a training, done to a real one: who is named, what status says, and that nobody is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.checkpoint.lineage import find_checkpoint
from tests.conftest import REPOSITORY
from tests.training import STEPS, TINY, Training

FAULTY = "tests.faulty_train"
pytestmark = [pytest.mark.distributed, pytest.mark.timed]


def steps(training: Training) -> list[int]:
    return [json.loads(line)["step"] for line in (training.run_dir / "log.jsonl").read_text().splitlines()]


def test_a_second_training_is_refused_and_disturbs_nothing(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "one", "train.epochs=2000")
    first.wait_until(lambda: first.has_logged(2))
    second = Training(images, tmp_path, "one", "train.epochs=2000", world_size=2)
    assert second.wait() == [2, 2]
    holder = f"already being trained by process {first.ranks[0].pid}"
    assert sum(holder in output for output in second.output) == 1
    assert not any("Traceback" in output for output in second.output)
    status = first.status()
    assert status["state"] == "running"
    for wrong in ("model.encoder=resnet_smal", "train.global_batch_size=1024"):
        assert Training(images, tmp_path, "one", wrong).wait() == [2]
        assert first.status() == status  # nothing is said in the name of a run that is another's
    first.ranks[0].send_signal(signal.SIGTERM)
    assert first.wait() == [0], first.output
    assert not (first.run_dir / "owner.json").exists()


def test_a_killed_owner_is_followed_at_once(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "one", "checkpoint.every_epochs=1")
    first.wait_until(lambda: first.has_logged(9))
    first.kill()
    assert (first.run_dir / "owner.json").exists()
    second = Training(images, tmp_path, "one", "checkpoint.every_epochs=1")
    assert second.wait() == [0], second.output
    assert second.status()["state"] == "finished"


def test_one_that_was_taken_over_writes_no_more(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "one", "train.epochs=2000")
    first.wait_until(lambda: first.has_logged(2))
    owner = json.loads((first.run_dir / "owner.json").read_text())
    (first.run_dir / "owner.json").write_text(json.dumps({**owner, "session": "0" * 12, "attempt": "812.1-bbbbbb"}))
    status = (first.run_dir / "status.json").read_bytes()
    (first.run_dir / "SAVE").touch()
    assert first.wait() == [2]
    assert "taken over by" in first.output[0]
    assert list((first.run_dir / "checkpoints").glob("step_*")) == []
    assert (first.run_dir / "status.json").read_bytes() == status


def test_one_that_is_taken_over_while_it_writes_a_checkpoint_does_not_commit_it(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "one", "checkpoint.every_steps=2", module=FAULTY, FAULT="takeover 0 0")
    assert training.wait() == [2]
    assert "taken over by" in training.output[0]
    assert list((training.run_dir / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "doing", "limit"), [("save", "saving", "save_s"), ("evaluation", "", "evaluation_s")]
)
def test_work_between_two_steps_has_a_time_limit_of_its_own(
    images: Path, tmp_path: Path, fault: str, doing: str, limit: str
) -> None:
    overrides = (f"timeout.{limit}=2", "timeout.step_s=600", f"data.test={images}", "evaluation.knn_every_epochs=1")
    training = Training(images, tmp_path, "one", *overrides, module=FAULTY, FAULT=f"{fault} 0 0")
    assert training.wait() == [1]
    assert training.status()["reason"] == "hang"
    assert f"no progress for 2 s (timeout.{limit}): step" in str(training.status()["message"])
    assert doing in str(training.status()["message"])


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ("slow_save", ("checkpoint.in_background=false", "checkpoint.every_steps=8")),
        ("slow_save", ("checkpoint.every_steps=8",)),
        ("slow_evaluation", ("evaluation.knn_every_epochs=1", "evaluation.knn_k=5")),
    ],
)
def test_what_is_done_between_two_steps_may_take_longer_than_a_step(
    images: Path, tmp_path: Path, fault: str, settings: tuple[str, ...]
) -> None:
    """Longer, too, than a step and the second by which the process group's own limit lies behind it here."""
    settings = (*settings, "train.max_steps=9", "timeout.step_s=2", f"data.test={images}", "checkpoint.keep=9")
    training = Training(images, tmp_path, "slow", *settings, world_size=2, module=FAULTY, FAULT=f"{fault} 0 6")
    assert training.wait() == [0, 0], training.output
    steps = {int(path.name[5:]) for path in (training.run_dir / "checkpoints").iterdir()}
    assert steps == ({9} if fault == "slow_evaluation" else {8, 9})


@pytest.mark.parametrize("settings", [(), ("checkpoint.every_steps=2", "train.epochs=2000")])
def test_a_save_that_takes_too_long_is_named_on_whatever_number_of_processes(
    images: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """The last save, which is waited for, and one beside the steps."""
    training = Training(
        images, tmp_path, "slow", *settings, "timeout.save_s=3", world_size=2, module=FAULTY, FAULT="save 0 0"
    )
    assert training.wait() == [1, 1]
    assert training.status()["reason"] == "hang"
    message = str(training.status()["message"])
    assert "no progress for 3 s (timeout.save_s)" in message
    assert "saving" in message


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(images: Path, tmp_path: Path) -> None:
    often = ("checkpoint.every_steps=2", "train.epochs=2000")
    first = Training(images, tmp_path, "killed", *often, module=FAULTY, FAULT="slow_save 0 0.7")
    checkpoints = first.run_dir / "checkpoints"
    first.wait_until(lambda: bool(list(checkpoints.glob("step_*")) and list(checkpoints.glob(".tmp-step_*"))))
    first.kill()
    newest = sorted(checkpoints.glob("step_*"))[-1]
    assert list(checkpoints.glob(".tmp-*"))
    assert find_checkpoint(first.run_dir).path == newest
    second = Training(images, tmp_path, "killed", f"train.max_steps={int(newest.name[5:]) + 1}")
    assert second.wait() == [0], second.output
    assert not list(checkpoints.glob(".tmp-*"))


def test_the_rank_that_fails_first_is_the_one_that_tells(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "raise", world_size=2, module=FAULTY, FAULT="raise 1 3")
    assert training.wait() == [1, 1]
    assert "ArithmeticError: made to fail" in training.output[1]
    assert "Traceback" not in training.output[0]
    assert "another rank has failed" in training.output[0]
    status = training.status()
    assert (status["state"], status["reason"], status["step"]) == ("failed", "crash", 3)
    assert "made to fail" in str(status["message"])


def test_a_killed_rank_is_missed_and_the_run_goes_on_afterwards(images: Path, tmp_path: Path) -> None:
    first = Training(images, tmp_path, "kill", "checkpoint.every_epochs=1", world_size=2)
    first.wait_until(lambda: first.has_logged(9))
    first.ranks[1].kill()
    assert first.wait() == [1, -signal.SIGKILL]
    assert first.status()["state"] == "failed"
    assert first.status()["reason"] == "crash"
    second = Training(images, tmp_path, "kill", "checkpoint.every_epochs=1", world_size=2)
    assert second.wait() == [0, 0], second.output
    assert steps(second)[-1] == STEPS


def test_a_frozen_rank_is_named_with_its_last_step(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "frozen", "train.epochs=2000", "timeout.step_s=4", world_size=2)
    training.wait_until(lambda: training.has_logged(9))
    training.ranks[1].send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while training.ranks[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert training.ranks[0].poll() == 1
    training.kill()
    status = training.status()
    assert (status["state"], status["reason"]) == ("failed", "hang")
    message = str(status["message"])
    assert "rank 1 (" in message
    assert f"process {training.ranks[1].pid}) has given no sign of life" in message
    assert int(status["step"]) >= 9  # type: ignore[call-overload]


def test_a_rank_that_is_stuck_outside_the_collective_stands_out(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "stuck", "timeout.step_s=3", world_size=2, module=FAULTY, FAULT="stuck 1 3")
    assert training.wait() == [1, 1]
    status = training.status()
    assert (status["reason"], status["step"]) == ("hang", 3)
    lines = [line.strip() for line in str(status["message"]).splitlines() if line.startswith("  ")]
    where = {line.partition(":")[0]: line.partition(", in ")[2] for line in lines}
    assert set(where) == {"rank 0", "rank 1"}
    assert where["rank 0"] != where["rank 1"]
    assert all("what its threads are doing" in output for output in training.output)
    assert sum("no progress for 3 s" in output for output in training.output) >= 1


def test_a_stop_signal_ends_a_rank_that_waits_in_a_collective(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "wait", "timeout.stop_s=2", world_size=2, module=FAULTY, FAULT="stuck 1 3")
    training.wait_until(lambda: training.has_logged(3))
    time.sleep(1)
    for process in training.ranks:
        process.send_signal(signal.SIGUSR1)
    assert training.wait(60) == [1, 1]
    assert "2 s after a stop signal" in str(training.status()["message"])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_on_one_rank_stops_all_and_is_written_down(images: Path, tmp_path: Path, kind: str) -> None:
    training = Training(images, tmp_path, kind, world_size=2, module=FAULTY, FAULT=f"{kind} 1 3")
    assert training.wait() == [2, 2]
    assert training.status()["reason"] == "nan_abort"
    for rank in range(2):
        record = json.loads((training.run_dir / f"non_finite_step_00000003_rank_{rank}.json").read_text())
        assert len(record["sample_ids"]) == 32
        assert record["lr"] > 0
    assert not list((training.run_dir / "checkpoints").glob("step_*"))


def test_weights_that_hold_nan_are_not_saved(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "nan", module=FAULTY, FAULT=f"weights 0 {STEPS - 1}")
    assert training.wait() == [2]
    assert training.status()["reason"] == "nan_abort"
    assert "holds NaN or infinity after step 24; nothing was saved" in training.output[0]
    assert list((training.run_dir / "checkpoints").glob("step_*")) == []


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_is_skipped_on_all_ranks_when_so_configured(images: Path, tmp_path: Path, kind: str) -> None:
    training = Training(
        images, tmp_path, kind, "train.on_non_finite=skip", world_size=2, module=FAULTY, FAULT=f"{kind} 1 3"
    )
    assert training.wait() == [0, 0], training.output
    assert "step 3 skipped" in training.output[0]
    lines = [json.loads(line) for line in (training.run_dir / "log.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [i + 1 for i, loss in enumerate(losses) if loss is None] == [4]
    assert len(losses) == STEPS
    assert list((training.run_dir / "checkpoints").glob(f"step_*{STEPS}"))


def test_the_best_and_the_milestones_stay(images: Path, tmp_path: Path) -> None:
    training = Training(
        images,
        tmp_path,
        "kept",
        *(
            "checkpoint.every_steps=2",
            "checkpoint.keep=2",
            "checkpoint.milestone_epochs=2",
            "checkpoint.keep_best=true",
        ),
        *(f"data.test={images}", "evaluation.knn_every_epochs=1", "evaluation.knn_k=5"),
    )
    assert training.wait() == [0], training.output
    checkpoints = training.run_dir / "checkpoints"
    lines = [json.loads(line) for line in (training.run_dir / "log.jsonl").read_text().splitlines()]
    accuracy = {line["step"]: line["eval/knn_top1"] for line in lines if "eval/knn_top1" in line}
    assert [path.parent.name for path in checkpoints.glob("*/milestone")] == ["step_00000016"]
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert json.loads((checkpoints / f"step_{best:08d}" / "best.json").read_text()) == {"knn_top1": accuracy[best]}
    assert {int(path.name[5:]) for path in checkpoints.glob("step_*")} == {16, 22, 24, best}


def test_a_full_disk_skips_saves_and_training_goes_on_until_three_have_failed(images: Path, tmp_path: Path) -> None:
    # No file may grow beyond 60 kB: the log fits, the optimiser's state does not.
    training = Training(
        images, tmp_path, "full", "checkpoint.every_steps=2", module="tests.limited_train", LIMIT_BYTES="60000"
    )
    assert training.wait() == [2]
    assert training.output[0].count("not saved") == 3
    assert "3 save(s) in a row failed" in training.output[0]
    assert "Traceback" not in training.output[0]
    assert training.status()["reason"] == "checkpoint_error"
    assert training.has_logged(6)
    assert list((training.run_dir / "checkpoints").iterdir()) == []


def test_a_vanished_run_directory_ends_the_run_and_is_not_made_anew(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "gone", "train.epochs=2000", "checkpoint.every_steps=2")
    training.wait_until(lambda: training.has_logged(3))
    training.run_dir.rename(tmp_path / "moved")
    assert training.wait() == [2]
    assert "3 save(s) in a row failed" in training.output[0]
    assert "Traceback" not in training.output[0]
    assert not training.run_dir.exists()


def test_ranks_die_with_their_agent(images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "local", str(REPOSITORY / "configs" / "smoke.yaml"), "--nproc", "2"]
    agent = subprocess.Popen(
        [*command, *TINY, f"data.train={images}", f"runs_dir={tmp_path}", "name=orphans", "train.epochs=2000"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        log, deadline = tmp_path / "orphans" / "log.jsonl", time.monotonic() + 100
        while not (log.exists() and '"step": 2,' in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(trainings(tmp_path)) >= 2
    finally:
        agent.kill()
        agent.wait()
    deadline = time.monotonic() + 30
    while trainings(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert trainings(tmp_path) == []


def trainings(runs_dir: Path) -> list[str]:
    """Command lines of living processes that train in `runs_dir`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"runs_dir={runs_dir}" in command and "simclr_dist.train" in command:
            found.append(command)
    return found
