"""Trainings and commands that begin with weights from elsewhere. pytest tests/test_starting.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simclr_dist.checkpoint.files import read_facts
from simclr_dist.cli import main
from simclr_dist.config import ModelConfig, load_config
from simclr_dist.errors import UserError
from simclr_dist.evaluation.drift import DriftGuard, Likeness, neighbours_kept
from simclr_dist.network.encoders import build_encoder
from simclr_dist.training.preflight import check_training
from tests.conftest import REPOSITORY
from tests.training import Training

KNN = ("evaluation.knn_every_epochs=1", "evaluation.knn_k=5")


def write_mocos(path: Path, width: int = 16, seed: int = 5) -> dict[str, torch.Tensor]:
    """A file of MoCo's of a `resnet_small`; its encoder."""
    torch.manual_seed(seed)
    encoder, _ = build_encoder(ModelConfig(encoder="resnet_small", width=width))
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    state = encoder.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.encoder_q.{name}": x for name, x in state.items()}}, path)
    return state


def test_all_ranks_start_from_the_weights_and_a_resume_goes_on_from_its_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    given = write_mocos(tmp_path / "moco.pth")
    settings = [f"model.weights={tmp_path / 'moco.pth'}", f"data.test={images}", *KNN, "monitor.terminal=plain"]
    frozen = ("conv1.", "bn1.", "layer1.")
    patterns = ",".join(f"encoder.{name}*" for name in frozen)
    first = Training(images, tmp_path, "a", *settings, f"model.freeze=[{patterns}]", "train.max_steps=10", world_size=2)
    assert first.wait() == [0, 0], first.output
    said = first.output[0]
    assert "100 % of the encoder, 54 tensors; prefix state_dict.module.encoder_q.; nothing is new" in said
    assert "5,136 of 87,920 parameters (model.freeze); 3 frozen BatchNorms keep their statistics" in said

    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000010"
    trained = load_file(checkpoint / "model.safetensors")
    for name, tensor in given.items():
        assert torch.equal(trained[f"encoder.{name}"], tensor) == name.startswith(frozen), name
    origin = read_facts(checkpoint).started_from
    assert origin is not None
    assert origin["weights"] == str(tmp_path / "moco.pth")
    assert origin["share"] == 1
    evaluations = [json.loads(line) for line in (tmp_path / "a" / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluations] == [0, 8]
    assert origin["knn_top1"] == evaluations[0]["top1"]
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    kept = {line["step"]: line["drift/neighbours_kept"] for line in log if "drift/neighbours_kept" in line}
    assert kept[0] == 1
    assert 0 < kept[8] <= 1

    (tmp_path / "moco.pth").unlink()  # nobody looks for it any more
    second = Training(images, tmp_path, "a", *settings, "train.max_steps=16")
    assert second.wait() == [0], second.output
    assert "those of the checkpoint: model.weights counts at step 0 only; the run began with" in second.output[0]
    assert "changed since step 10: model.freeze" in second.output[0]
    last = load_file(tmp_path / "a" / "checkpoints" / "step_00000016" / "model.safetensors")
    assert not torch.equal(last["encoder.conv1.weight"], given["conv1.weight"])  # it is trained from now on
    assert read_facts(tmp_path / "a" / "checkpoints" / "step_00000016").started_from == origin
    starts = [json.loads(line) for line in (tmp_path / "a" / "lineage.jsonl").read_text().splitlines()]
    assert [bool(line.get("weights")) for line in starts if line["event"] == "start"] == [True, False]


def test_what_is_wrong_with_weights_and_patterns_is_known_before_a_start(tmp_path: Path) -> None:
    def problems(*overrides: str) -> str:
        config = load_config(REPOSITORY / "configs" / "smoke.yaml", [f"runs_dir={tmp_path}", *overrides])
        with pytest.raises(UserError) as found:
            check_training(config)
        return str(found.value)

    assert "none.pth: no such file or directory" in problems(f"model.weights={tmp_path / 'none.pth'}")
    assert "matches no parameter; did you mean encoder.layer1.*" in problems("model.freeze=[layer1.*]")
    write_mocos(tmp_path / "wide.pth", width=16)
    too_wide = problems(f"model.weights={tmp_path / 'wide.pth'}", "model.freeze=[]")
    assert "resnet_small" in too_wide
    assert "model.weights_partial=true" in too_wide
    assert "nobody publishes weights of resnet_small" in problems("model.weights=pretrained")
    write_mocos(tmp_path / "moco.pth", width=8)
    good = load_config(
        REPOSITORY / "configs" / "smoke.yaml", [f"runs_dir={tmp_path}", f"model.weights={tmp_path / 'moco.pth'}"]
    )
    assert check_training(good).remarks == ()


def write_pictures(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(24):
        level = (60, 190)[i % 2]
        pixels = generator.normal(level, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["simclr-dist", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_every_command_takes_weights_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write_mocos(tmp_path / "moco.pth", width=32)
    pictures = write_pictures(tmp_path / "pictures")
    of = ("--encoder", "resnet_small", "--image-size", 32)
    images = ("--train", pictures, "--test", pictures)
    file = tmp_path / "moco.pth"

    assert run(monkeypatch, "inspect", file) == 0
    assert "state_dict.module.encoder_q: 54" in capsys.readouterr().out
    assert run(monkeypatch, "evaluate", "knn", file, *of, *images, "--k", 3, "--json") == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out)["top1"] == 1.0
    assert "100 % of the encoder" in heard.err
    assert "images normalised with ImageNet's mean and deviation" in heard.err
    assert not (tmp_path / "evaluations.jsonl").exists()
    assert not list(tmp_path.parent.glob("evaluations.jsonl"))

    assert run(monkeypatch, "embed", file, *of, pictures, tmp_path / "e.npz") == 0
    query = pictures / "class0" / "0.png"
    assert run(monkeypatch, "neighbours", tmp_path / "e.npz", query, *of, "--k", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["class_name"] == "class0"

    out = tmp_path / "out.safetensors"
    assert run(monkeypatch, "export", file, *of, "--format", "safetensors") == 2
    assert "name the file to write with --out" in capsys.readouterr().err
    assert run(monkeypatch, "export", file, *of, "--format", "safetensors", "--out", out) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(out).items())
    card = out.with_name("out.safetensors.md").read_text()
    assert "others have trained" in card
    assert "Trained on" not in card
    assert "moco.pth (sha256 " in card
    assert run(monkeypatch, "evaluate", "knn", out, *images, "--k", 3) == 0  # an export of ours says what it is of

    tuned = ("--epochs", 1, "--out", tmp_path / "tuned")
    assert run(monkeypatch, "finetune", file, *of, *images, *tuned) == 0
    assert (tmp_path / "tuned" / "classifier.safetensors").exists()
    assert run(monkeypatch, "finetune", file, *of, *images, "--from", "head", "--out", tmp_path / "no") == 2
    assert "no projection head of ours" in capsys.readouterr().err
    assert run(monkeypatch, "evaluate", "knn", file, *of) == 2
    assert "name labelled images with --train and --test" in capsys.readouterr().err
    assert run(monkeypatch, "evaluate", "knn", file, *images) == 2
    assert "of which encoder? Name it with --encoder" in capsys.readouterr().err


def test_a_report_shows_weights_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    write_mocos(tmp_path / "moco.pth", width=32)
    pictures, page = write_pictures(tmp_path / "pictures"), tmp_path / "page.html"
    of = ("--encoder", "resnet_small", "--image-size", 32, "--train", pictures, "--test", pictures)
    assert run(monkeypatch, "report", tmp_path / "moco.pth", *of, "--images", 24, "--out", page) == 0
    text = page.read_text()
    assert "moco.pth" in text
    assert "there is no projection head" in text


# ---------------------------------------------------------------------------------------------------------------------
# The drift guard


def like(rankme: float, *neighbours: tuple[int, ...], images: str = "f") -> Likeness:
    return Likeness(images, rankme, -1.0, neighbours)


def test_a_training_that_makes_given_weights_worse_says_by_how_much() -> None:
    origin: dict[str, Any] = {}
    guard = DriftGuard(origin)
    guard.begin_knn(0.50)
    record = {"test_images": 10_000}
    assert guard.compare_knn(0.495, record) == ""  # one standard error is half a point: chance
    assert "worse than the 50.00% of the weights that the run began with, by 8.00 points" in guard.compare_knn(
        0.42, record
    )
    assert guard.compare_knn(0.41, record) == ""  # once an episode
    assert guard.compare_knn(0.60, record) == ""
    assert "by 10.00 points" in guard.compare_knn(0.40, record)
    assert DriftGuard({}).compare_knn(0.1, record) == ""  # a run whose start nobody has measured


def test_drift_without_labels_is_measured_against_the_start_also_after_a_resume() -> None:
    origin: dict[str, Any] = {}
    start = like(40.0, (0, 1, 2), (5, 6, 7))
    assert DriftGuard(origin).begin(start)["drift/h_rankme"] == 40.0
    resumed = DriftGuard(json.loads(json.dumps(origin)))
    figures, warning = resumed.compare(like(30.0, (0, 1, 9), (5, 6, 7)))
    assert figures["drift/neighbours_kept"] == 0.75
    assert warning == ""
    figures, warning = resumed.compare(like(12.0, (0, 8, 9), (5, 8, 9)))
    assert "uses 12.0 dimensions (effective rank), at the start 40.0; 0% of nearest neighbours" in warning
    assert "drift/neighbours_kept" not in resumed.compare(like(12.0, (0, 1, 2), images="others"))[0]
    assert neighbours_kept(start, like(1.0, (3, 4))) is None
    for damaged in (None, {}, {"images": "f", "rankme": "x", "uniformity": 0, "neighbours": []}, {"neighbours": 3}):
        assert Likeness.from_record(damaged) is None
