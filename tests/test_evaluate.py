"""The commands evaluate and export on a small run with real files; the feature cache. pytest tests/test_evaluate.py"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_dist import cli
from simclr_dist.checkpoint.files import take_snapshot, write_checkpoint
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.config import Config, parse_config
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import ConfigError, DataError, ExportError, UserError
from simclr_dist.evaluation.cache import cache_key, read_features, write_features
from simclr_dist.evaluation.features import Features, digest
from simclr_dist.evaluation.offline import Score, evaluate, features_of
from simclr_dist.few_labels.classifier import load_classifier
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.run.layout import read_records
from simclr_dist.run.state import TrainState
from tests.distributed.spawn import run_ranks

CLASSES = ("blue", "green", "red")


def save_images(folder: Path, per_class: int, seed: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """Noisy images of one colour each."""
    generator = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(per_class):
            pixels = generator.integers(0, 120, (16, 16, 3))
            pixels[..., i % 3] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j:03}.png")
    return folder


def save_checkpoint(config: Config, model: SimCLR) -> Path:
    """The checkpoint of step 7 in the run of `config`; returns the run's folder."""
    snapshot = take_snapshot(
        config=config,
        state=TrainState(7, 56),
        fingerprint="f00d",
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        grad_scaler={},
        versions={},
    )
    write_checkpoint(config.run_dir / "checkpoints", snapshot, attempt="test")
    return config.run_dir


def make_run(folder: Path) -> Path:
    """A run with one checkpoint of a network that has not been trained, beside its images."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "runs_dir": str(folder / "runs"),
            "data": {
                "train": str(save_images(folder / "train", 20, seed=0)),
                "test": str(save_images(folder / "test", 10, seed=1)),
                "image_size": 16,
                "num_threads": 1,
            },
            "model": {"encoder": "resnet_small", "width": 4},
            "optim": {"warmup_epochs": 0.0},
            "train": {"global_batch_size": 8, "epochs": 1, "precision": "fp32"},
            "evaluation": {"knn_k": 5, "batch_size": 7},
        }
    )
    torch.manual_seed(5)
    return save_checkpoint(config, build_model(config.model))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def call(*arguments: object) -> int:
    args = cli.parser().parse_args([str(argument) for argument in arguments])
    return args.run(args)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_evaluate_scores_trained_untrained_and_pixels(
    run: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", method, run, "--baselines", "--json", "--device", "cpu") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["scores"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert result["scores"]["raw pixels"]["top1"] > 0.9  # the colours are easy
    assert result["top1"] == result["scores"]["trained encoder"]["top1"]
    assert result["step"] == 7
    recorded = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [record["top1"] for record in recorded] == [result["top1"]]


def test_the_untrained_encoder_may_be_scored_with_fewer_images_the_others_as_before(run: Path) -> None:
    said: list[str] = []

    def score(untrained_train: int | None) -> dict[str, Score]:
        scores, _ = evaluate(
            run,
            method="knn",
            k=5,
            baselines=True,
            untrained_train=untrained_train,
            device=torch.device("cpu"),
            say=said.append,
        )
        return {found.name: found for found in scores}

    every = score(None)
    said.clear()
    few = score(30)
    assert list(few) == ["raw pixels", "untrained encoder, 30 training images", "trained encoder"]
    assert [few[name] for name in ("raw pixels", "trained encoder")] == [
        every[name] for name in ("raw pixels", "trained encoder")
    ]
    assert any(" 30 images" in line for line in said)
    assert list(score(10**6)) == list(every)
    assert cache_key("e", "f", {}, "fp32", ids=np.arange(3)) != cache_key("e", "f", {}, "fp32", ids=np.arange(4))


def test_second_evaluation_takes_the_features_from_the_cache(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("evaluate", "knn", run, "--device", "cpu")
    first = capsys.readouterr()
    assert "images/s" in first.err
    call("evaluate", "knn", run, "--device", "cpu")
    second = capsys.readouterr()
    assert "images/s" not in second.err
    assert second.out == first.out


def test_a_damaged_cache_is_named(run: Path) -> None:
    call("evaluate", "knn", run, "--device", "cpu")
    file = next((run / "features").glob("*/h.npy"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"h.npy: its content has changed .*remove {file.parent} and run again"):
        call("evaluate", "knn", run, "--device", "cpu")


def test_transfer_to_other_images_and_classes_that_differ(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = save_images(tmp_path / "other", 6, seed=2, classes=("cyan", "pink"))
    test = save_images(tmp_path / "other_test", 4, seed=3, classes=("cyan", "pink"))
    assert call("evaluate", "knn", run, "--train", train, "--test", test, "--k", 3, "--json", "--no-cache") == 0
    assert json.loads(capsys.readouterr().out)["k"] == 3
    assert not (run / "features").exists()
    with pytest.raises(
        DataError, match=r"images of classes that .* does not have: blue, green, red; .* has cyan, pink"
    ):
        call("evaluate", "knn", run, "--train", train)


def test_k_larger_than_the_training_set_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="k=61 needs at least 61 training images, there are 60"):
        call("evaluate", "knn", run, "--k", 61, "--device", "cpu")


def test_a_gpu_that_is_not_there_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device cuda: torch .* sees no GPU"):
        call("evaluate", "knn", run, "--device", "cuda")


def test_export_puts_measured_accuracy_on_the_card(run: Path) -> None:
    call("evaluate", "knn", run, "--device", "cpu")
    assert call("export", run, "--format", "safetensors", "--license", "mit") == 0
    card = (run / "export" / "encoder.safetensors.md").read_text()
    assert "| knn (k=5) top1 on " in card
    with pytest.raises(ExportError, match=r"encoder.safetensors exists; .* --overwrite"):
        call("export", run, "--format", "safetensors")


def test_lines_that_a_killed_process_left_unfinished_are_passed_over(run: Path) -> None:
    for end in ('{"step": 7, "method": "knn", "to', '[7]\n{"step": 7}\n{"step": 7, "method": "linear", "top1": "x"}\n'):
        with (run / "evaluations.jsonl").open("a") as file:
            file.write(end)
        call("evaluate", "knn", run, "--device", "cpu")
        assert call("export", run, "--format", "safetensors", "--overwrite") == 0
        assert (run / "export" / "encoder.safetensors.md").read_text().count("| knn (k=5) top1 on ") == 1
    assert len(read_records(run / "evaluations.jsonl")) == 4


def features_with_a_cache_for_each_rank(rank: int, world_size: int, run: Path, caches: Path) -> str:
    model, checkpoint = load_pretrained(run)
    data = checkpoint.config.data
    assert data.test is not None
    try:
        found = features_of(
            model.encoder,
            data.test,
            describe(data.test),
            data,
            device=torch.device("cpu"),
            precision="fp32",
            batch_size=7,
            cache=caches / str(rank),
            say=lambda text: None,
        )
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return f"{len(found)} images"


@pytest.mark.distributed
@pytest.mark.parametrize("there_on", ["both", "one"])
def test_a_cache_that_is_damaged_on_one_rank_ends_all(run: Path, tmp_path: Path, there_on: str) -> None:
    call("evaluate", "knn", run, "--device", "cpu")
    for rank in (0, 1) if there_on == "both" else (1,):
        shutil.copytree(run / "features", tmp_path / "caches" / str(rank))
    for file in (tmp_path / "caches" / "1").glob("*/h.npy"):
        file.write_bytes(file.read_bytes()[:-3])
    first, second = run_ranks(2, features_with_a_cache_for_each_rank, run, tmp_path / "caches")
    assert first == "FailedElsewhereError: rank 1 has failed; see its own message"
    assert re.match(r"DataError: .*/h.npy: its content has changed .*remove", second)
    shutil.rmtree(tmp_path / "caches" / "1")
    assert run_ranks(2, features_with_a_cache_for_each_rank, run, tmp_path / "caches") == ["30 images"] * 2


def test_the_figure_of_a_command_stands_beside_its_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("evaluate", "knn", run, "--device", "cpu", "--max-train", 12)
    out = " ".join(capsys.readouterr().out.split())
    assert "k 5, temperature 0.1, train images 12, test images 30, image size 16, precision fp32" in out
    with pytest.raises(DataError, match=r"k=5 needs at least 5 training images, there are 4; .*--k 4 at most"):
        call("evaluate", "knn", run, "--device", "cpu", "--max-train", 4)
    with pytest.raises(ConfigError, match=r"--max-train: 2 images cannot hold one of each of 3 classes"):
        call("evaluate", "knn", run, "--device", "cpu", "--max-train", 2, "--k", 1)


def other_size(run: Path, image_size: int) -> Path:
    """The same run, whose evaluations see images of another side than its views are of."""
    model, checkpoint = load_pretrained(run)
    settings = checkpoint.config.model_dump()
    settings |= {"name": "other", "evaluation": settings["evaluation"] | {"image_size": image_size}}
    return save_checkpoint(Config.model_validate(settings), model)


def test_every_evaluation_sees_images_of_its_own_side(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the configuration or --image-size names it; the record says it, and what was asked without it stays."""

    def scored(*arguments: object) -> dict:
        assert call(*arguments, "--json", "--device", "cpu") == 0
        return json.loads(capsys.readouterr().out)

    plain, other = scored("evaluate", "knn", run), other_size(run, 24)
    by_config, asked = scored("evaluate", "knn", other), scored("evaluate", "knn", run, "--image-size", 24)
    assert (plain["image_size"], by_config["image_size"], asked["image_size"]) == (16, 24, 24)
    assert by_config["scores"] == asked["scores"]
    _, checkpoint = load_pretrained(run)
    encoder = build_model(checkpoint.config.model).encoder
    encoder.load_state_dict({k[8:]: v for k, v in checkpoint.model_state.items() if k.startswith("encoder.")})
    for side, folder in ((16, run), (24, run), (24, other)):  # each side has its entry
        fingerprint = describe(checkpoint.config.data.train).content_fingerprint
        assert (folder / "features" / cache_key(digest(encoder), fingerprint, {"image_size": side}, "fp32")).is_dir()
    assert len(list((run / "features").iterdir())) == 4

    out = tmp_path / "encoder.safetensors"
    assert call("export", other, "--format", "safetensors", "--out", out) == 0
    card = out.with_name("encoder.safetensors.md").read_text()
    assert all(said in card for said in ("RGB, 24 px", "2 views of 16 px", "CenterCrop(24)", "test images, 24 px"))
    data = checkpoint.config.data
    capsys.readouterr()
    assert scored("evaluate", "knn", out, "--train", data.train, "--test", data.test)["image_size"] == 24
    assert call("export", other, "--format", "safetensors", "--out", out, "--overwrite", "--image-size", 16) == 0
    card = out.with_name("encoder.safetensors.md").read_text()
    capsys.readouterr()
    assert "RGB, 16 px: the shorter side resized to 16, " in card  # these pictures stay whole

    capsys.readouterr()
    assert call("embed", other, data.test, tmp_path / "x.npz", "--device", "cpu") == 0
    assert "seen at 24 px" in capsys.readouterr().out
    picture = sorted(Path(data.test).rglob("*.png"))[3]
    elsewhere = shutil.copy(picture, tmp_path / "picture.png")
    nearest = ("neighbours", tmp_path / "x.npz", elsewhere, "--k", 1)
    assert call(*nearest, "--json", "--checkpoint", run) == 0  # whose own evaluations see 16 px
    (found,) = json.loads(capsys.readouterr().out)
    assert Path(found["name"]).name == picture.name
    assert found["similarity"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match="--image-size: 16, but the embeddings are of images of 24 px"):
        call(*nearest, "--image-size", 16)
    with pytest.raises(ConfigError, match="--image-size: 4 is not between 8 and 1024"):
        call("evaluate", "knn", run, "--image-size", 4)

    tuned = scored("finetune", other, "--freeze", "--epochs", 1, "--out", tmp_path / "tuned")
    assert tuned["image_size"] == 24
    classifier = tmp_path / "tuned" / "classifier.safetensors"
    student = scored("distill", classifier, "--student-width", 8, "--epochs", 1, "--out", tmp_path / "student")
    assert student["image_size"] == 24
    config = parse_config(load_classifier(tmp_path / "student" / "classifier.safetensors").config_json)
    assert (config.data.image_size, config.evaluation_data.image_size, config.model.image_size) == (24, 24, 24)


def test_finetune_then_distill(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--json", "--device", "cpu", "--batch-size", 15, "--epochs", 6, "--lr", 2.0)
    assert call("finetune", run, "--labels", 0.5, "--from", "head", *common) == 0
    tuned = json.loads(capsys.readouterr().out)
    folder = run / "finetune" / "0.5_head_seed0"
    assert json.loads((folder / "result.json").read_text()) == tuned
    assert tuned["num_labels"] == 30
    assert len(json.loads((folder / "subset.json").read_text())["ids"]) == 30
    assert call("finetune", run, "--labels", 0.5, "--from", "head", *common) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == tuned
    assert "done already" in again.err
    with pytest.raises(ConfigError, match=r"holds another classifier already \(epochs: 6 then, 7 now\)"):
        call("finetune", run, "--labels", 0.5, "--from", "head", *common, "--epochs", 7)

    teacher = folder / "classifier.safetensors"
    labels = ("--alpha", 0.5, "--subset", folder / "subset.json")
    assert call("distill", teacher, "--student", "resnet_small", "--student-width", 3, *labels, *common) == 0
    distilled = json.loads(capsys.readouterr().out)
    assert distilled["top1"] > 0.4  # chance is a third
    found = load_classifier(folder / "distilled_resnet_small" / "classifier.safetensors")
    assert parse_config(found.config_json).model.width == 3
    assert found.class_names == CLASSES
    assert found.network.fc.in_features == 12


def test_the_frozen_protocol_and_a_subset_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--device", "cpu", "--batch-size", 15, "--epochs", 2)
    assert call("finetune", run, "--freeze", "--labels", 0.5, *common) == 0
    subset = run / "finetune" / "0.5_frozen_encoder_seed0" / "subset.json"
    assert call("finetune", run, "--freeze", "--subset", subset, "--json", *common) == 0
    assert '"method": "linear"' in capsys.readouterr().out
    again = run / "finetune" / "subset_frozen_encoder_seed0" / "classifier.safetensors"
    first = subset.with_name("classifier.safetensors")
    assert digest(load_classifier(again).network) == digest(load_classifier(first).network)


def test_a_learning_rate_that_diverges_is_said(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lr: the loss of epoch 1 is .*: lower the learning rate"):
        call("finetune", run, "--device", "cpu", "--batch-size", 15, "--epochs", 3, "--lr", 1e30)


def test_embed_and_neighbours(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("embed", run, tmp_path / "test", tmp_path / "test.npz", "--device", "cpu") == 0
    query = tmp_path / "test" / "red" / "004.png"
    capsys.readouterr()
    assert call("neighbours", tmp_path / "test.npz", query, "--k", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3
    assert found[0]["name"].endswith("red/004.png")
    assert call("neighbours", tmp_path / "test.npz", query) == 0
    assert "red/004.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "knn"),
        ("evaluate", "linear"),
        ("export",),
        ("finetune",),
        ("distill",),
        ("embed",),
        ("neighbours",),
    ],
)
def test_every_command_explains_itself(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(*command, "--help")
    assert stop.value.code == 0
    assert "example" in capsys.readouterr().out


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from simclr_dist import cli; cli.parser().format_help();"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cached_features_are_the_same_and_keys_tell_everything_apart(tmp_path: Path) -> None:
    features = Features(torch.randn(5, 3), torch.arange(5) % 2, torch.arange(5) + 7)
    write_features(tmp_path / "cache", "key", features)
    write_features(tmp_path / "cache", "key", features)  # a second writer does no harm
    found = read_features(tmp_path / "cache", "key")
    assert found is not None
    assert torch.equal(found.h, features.h)
    assert torch.equal(found.labels, features.labels)
    assert torch.equal(found.sample_ids, features.sample_ids)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]
    assert read_features(tmp_path / "cache", "other") is None
    small, large = {"image_size": 32}, {"image_size": 64}
    keys = {
        cache_key(*values)
        for values in [
            ("a", "b", small, "fp32"),
            ("b", "a", small, "fp32"),
            ("a", "b", large, "fp32"),
            ("a", "b", small, "bf16"),
        ]
    }
    assert len(keys) == 4


def test_features_that_another_has_written_at_the_last_moment_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features(torch.randn(5, 3), torch.arange(5) % 2, torch.arange(5) + 7)
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        write_features(tmp_path, "key", features)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    write_features(tmp_path, "key", features)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_several_who_write_the_same_features_at_once_all_succeed(tmp_path: Path) -> None:
    features = Features(torch.randn(5, 3), torch.arange(5) % 2, torch.arange(5) + 7)
    together = threading.Barrier(4)

    def write(_: int) -> None:
        for number in range(25):
            together.wait(60)
            write_features(tmp_path, f"key{number}", features)
            found = read_features(tmp_path, f"key{number}")
            assert found is not None
            assert torch.equal(found.h, features.h)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert {path.name for path in tmp_path.iterdir()} == {f"key{number}" for number in range(25)}


def test_a_cache_without_its_manifest_is_named(tmp_path: Path) -> None:
    write_features(tmp_path, "key", Features(torch.randn(5, 3), torch.arange(5), torch.arange(5)))
    (tmp_path / "key" / "MANIFEST.json").write_text("[]")
    with pytest.raises(DataError, match="the feature cache is damaged; remove"):
        read_features(tmp_path, "key")
