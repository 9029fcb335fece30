"""`simclr-dist runs`: what there is, the history of a run, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.checkpoint.lineage import find_checkpoint
from tests.conftest import REPOSITORY
from tests.training import Training

SETTINGS = ("checkpoint.every_steps=4", "checkpoint.keep=9", "checkpoint.milestone_epochs=1")


def runs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simclr_dist.cli", "runs", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)


def words(text: str) -> str:
    return re.sub(r"[^\S\n]+", " ", text.replace("│", " "))


@pytest.mark.distributed
def test_a_run_is_shown_rewound_and_goes_on_from_there(images: Path, tmp_path: Path) -> None:
    measured = (
        f"data.test={images}",
        "evaluation.knn_every_epochs=1",
        "evaluation.knn_k=5",
        "checkpoint.keep_best=true",
    )
    first = Training(images, tmp_path, "one", *SETTINGS, *measured, "train.max_steps=16")
    assert first.wait() == [0], first.output
    shown = words(runs("show", first.run_dir).stdout)
    assert re.search(r"step_00000008 \S+ \S+ \d+\.\d MiB .*milestone", shown)
    assert "best kNN, " in shown
    assert re.search(r"step_00000016 .* newest", shown)
    assert "started at step 0, processes: 1" in shown
    assert "finished at step 16" in shown

    back = runs("rewind", first.run_dir, 8)
    assert back.returncode == 0, back.stderr
    assert [line.rpartition("/")[2] for line in back.stdout.splitlines()[:-1]] == [
        "step_00000012.superseded-1",
        "step_00000016.superseded-1",
    ]
    assert find_checkpoint(first.run_dir).step == 8
    assert not (first.run_dir / "owner.json").exists()
    on = Training(images, tmp_path, "one", *SETTINGS, *measured, "train.max_steps=12", "loss.temperature=0.7")
    assert on.wait() == [0], on.output
    assert "resumes at step 8" in on.output[0]
    shown = words(runs("show", first.run_dir).stdout)
    assert "set aside by rewind 1" in shown
    assert "rewind 1 set aside step_00000012, step_00000016" in shown
    assert "changed: loss.temperature: 0.5 → 0.7" in shown

    listed = words(runs("list", tmp_path).stdout)
    assert re.search(r"one finished 12 3 \d+\.\d\d % \d+\.\d MiB 20", listed), listed
    refused = Training(images, tmp_path, "one", *SETTINGS, *measured, "train.max_steps=12")
    assert refused.wait() == [2]
    assert "nothing is left to train" in refused.output[0]
    assert "finished (last start refused)" in words(runs("list", tmp_path).stdout)


@pytest.mark.distributed
def test_a_run_that_is_training_is_not_rewound(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "one", *SETTINGS, "train.epochs=2000")
    training.wait_until(lambda: (training.run_dir / "checkpoints" / "step_00000008").exists())
    refused = runs("rewind", training.run_dir, 4)
    training.kill()
    assert refused.returncode == 2
    assert "already being trained" in refused.stderr
    assert not list((training.run_dir / "checkpoints").glob("*superseded*"))


@pytest.mark.distributed
def test_no_way_leads_back_to_what_is_not_there_or_damaged(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "one", *SETTINGS, "train.max_steps=8")
    assert training.wait() == [0]
    (training.run_dir / "checkpoints" / "step_00000004" / "state.json").write_text("{}")
    for step, message in ((5, "no checkpoint of step 5; there are: 4, 8"), (4, "state.json: 2 bytes, but")):
        refused = runs("rewind", training.run_dir, step)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    assert find_checkpoint(training.run_dir).step == 8


def test_foreign_folders_and_odd_records_are_shown_or_refused_plainly(tmp_path: Path) -> None:
    nothing = runs("list", tmp_path)
    assert (nothing.returncode, "no runs in it" in nothing.stderr) == (0, True)
    assert runs("list", tmp_path / "nowhere").returncode == 2
    assert "no run there" in runs("show", tmp_path).stderr
    odd = tmp_path / "[red]odd\x1b[2Jname"
    (odd / "checkpoints" / "step_00000003.corrupt").mkdir(parents=True)
    (odd / "status.json").write_text(json.dumps({"state": "\x1b[31mfine", "step": 7, "time": "now"}))
    lines = [{"event": "start", "step": "\x1b[2J", "changed": [1]}, {"event": "rewind", "set_aside": "x"}, {"event": 3}]
    (odd / "lineage.jsonl").write_text('{"half\n[1]\n' + "".join(json.dumps(line) + "\n" for line in lines))
    (odd / "log.jsonl").write_text('{"step": 1, "eval/knn_top1": "best"}\n{"step": 2, "eval/knn_top1": 0.25}\n')
    for done in (runs("list", tmp_path), runs("show", odd)):
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert "[red]odd" in done.stdout
    assert "25.00 %" in runs("list", tmp_path).stdout


def record_run(folder: Path, settings: str, *log: dict[str, object]) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\n{settings}")
    (folder / "log.jsonl").write_text("".join(json.dumps({"samples_seen": 1, **line}) + "\n" for line in log))


@pytest.fixture
def four_runs(tmp_path: Path) -> Path:
    """Two in the folder, one in a sweep's, one that recorded nothing."""
    folder = tmp_path / "runs"
    early = {"step": 4, "eval/knn_top1": 0.5, "train/loss": 2.0}
    record_run(folder / "early", "optim: {base_lr: 0.1, nesterov: true}", early, {"step": 8, "eval/knn_top1": 0.3})
    record_run(folder / "late", "optim: {base_lr: 0.2}", {"step": 4, "eval/knn_top1": 0.4, "train/loss": 1.0})
    record_run(folder / "sweep" / "one", "optim: {base_lr: 0.1}", {"step": 2, "train/loss": 3.0, "eval/knn_top1": None})
    record_run(folder / "nothing", "")
    (folder / "sweep" / "one" / "evaluations.jsonl").write_text('{"method": "linear", "step": 2, "top1": 0.75}\n')
    return folder


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ((), ["early", "late", "nothing", "sweep/one"]),
        (("--sort", "eval/knn_top1"), ["early", "late", "nothing", "sweep/one"]),
        (("--sort", "train/loss"), ["sweep/one", "early", "late", "nothing"]),
        (("--sort", "train/loss", "--lowest"), ["late", "early", "sweep/one", "nothing"]),
        (("--sort", "evaluate/linear_top1"), ["sweep/one", "early", "late", "nothing"]),
    ],
)
def test_runs_are_sorted_by_the_best_value_of_a_figure(
    four_runs: Path, options: tuple[str, ...], order: list[str]
) -> None:
    done = runs("list", four_runs, *options, "--json")
    assert done.returncode == 0, done.stderr
    assert [str(Path(run["run"]).relative_to(four_runs)) for run in json.loads(done.stdout)["runs"]] == order
    table = words(runs("list", four_runs, *options).stdout)
    assert [line.split()[0] for line in table.splitlines() if re.match(rf" ?({'|'.join(order)}) ", line)] == order


def test_a_figure_that_no_run_has_is_refused_with_those_there_are(four_runs: Path) -> None:
    refused = runs("list", four_runs, "--sort", "eval/accuracy")
    assert refused.returncode == 2
    assert "no run has recorded it; there are: eval/knn_top1, evaluate/linear_top1, train/loss" in refused.stderr


def test_runs_are_compared_by_what_differs_and_the_best_checkpoint_is_named(four_runs: Path) -> None:
    checkpoint = four_runs / "early" / "checkpoints" / "step_00000004"
    checkpoint.mkdir()
    pair = [four_runs / "late", four_runs / "early"]
    shown = words(runs("compare", *pair).stdout)
    assert re.search(r"optim.base_lr 0.1 0.2 ", shown)
    assert re.search(r"optim.nesterov True - ", shown)
    assert re.search(r"eval/knn_top1 30.00 % 40.00 % ", shown)
    assert f"{pair[1]}: best eval/knn_top1 50.00 % at step 4 ({checkpoint})" in shown
    assert f"{pair[0]}: best eval/knn_top1 40.00 % at step 4 (no checkpoint of that step)" in shown
    found = json.loads(runs("compare", *pair, "--sort", "train/loss", "--lowest", "--json").stdout)["runs"]
    assert [run["best"]["value"] for run in found] == [1.0, 2.0]
    assert found[0]["settings"] == {"optim.base_lr": 0.2, "optim.nesterov": None}
    assert "no run there" in runs("compare", four_runs).stderr


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"run{i}").mkdir()
        (tmp_path / f"run{i}" / "status.json").write_text('{"state": "finished", "step": 1}')
    program = "import sys; sys.argv[1:] = ['runs', 'list', sys.argv[1]]; from simclr_dist.cli import main\n"
    program += "try: main()\nexcept SystemExit as error: assert not error.code\nassert 'torch' not in sys.modules"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=True, capture_output=True)
    assert time.monotonic() - began < 60
