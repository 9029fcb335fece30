"""`simclr-dist train FOLDER`: any folder, settings that fit, one message where it cannot be, and it continues."""

from __future__ import annotations

import argparse
import itertools
import json
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_dist import cli
from simclr_dist.cli.train import _is_begun, _out
from simclr_dist.cli.train_images import images_to_prepare
from simclr_dist.cli.train_settings import choose_for, with_length
from simclr_dist.config import Config, OptimConfig, TrainConfig, load_config
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.plan.defaults import Choice, Situation, choose_by_length, choose_first, choose_rest, epochs_in
from simclr_dist.plan.measure import MeasuredStep
from simclr_dist.run.layout import RunDir, read_records
from simclr_dist.training.precision import Decision


def write(folder: Path, count: int, classes: tuple[str, ...] = ("",), side: int = 24) -> Path:
    """`count` images of unequal shape, in turn in each of the classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side + i % 7, side + 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def parsed(*words: str) -> argparse.Namespace:
    return cli.parser().parse_args(["train", *map(str, words)])


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *map(str, words)])
    return int(end.value.code or 0)


def with_choices(values: dict, chosen: dict[str, Choice], num_processes: int) -> Config:
    """Also puts them into `values`."""
    for key, choice in chosen.items():
        assert choice.why
        section, leaf = key.split(".")
        values.setdefault(section, {})[leaf] = choice.value
    return load_config(values, world_size=num_processes, check_data=False)  # the batch divides


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize(
    ("num_images", "processes"), [(20, (1, 2)), (100, (1, 3, 8)), (5_000, (3, 8)), (2 * 10**6, (8,))]
)
def test_settings_fit_any_number_of_images_on_any_machine(
    is_gpu: bool, num_images: int, processes: tuple[int, ...]
) -> None:
    for side, num_processes in itertools.product((1, 28, 64, 100, 500, 4000), processes):
        at = Situation(num_images, num_images // 10, side, is_gpu, num_processes)
        values: dict = {"name": "x", "data": {"train": "x", "test": "y"}, "train": {"epochs": 20}}
        asked = with_choices(values, choose_first(at), num_processes)
        rest = choose_rest(at, asked.data, asked.model, asked.optim, asked.train.global_batch_size)
        config = with_choices(values, rest, num_processes)
        assert 2 * config.train.global_batch_size <= num_images
        assert config.evaluation.knn_k <= num_images
        assert config.data.image_size <= (config.evaluation.image_size or config.data.image_size) <= max(side, 32)


def test_time_becomes_epochs() -> None:
    assert epochs_in(10, 1000, 45_000) == 10
    assert epochs_in(10, 10, 10**9) == 1  # all images once at least
    assert epochs_in(600, 1e6, 20) == 1000
    with pytest.raises(ValueError, match="3 images to train on"):
        choose_first(Situation(3, 0, 32, False, 1))
    with pytest.raises(ValueError, match="too few for 8 processes"):
        choose_first(Situation(8, 0, 32, False, 8))


def test_few_epochs_take_muon_with_little_momentum() -> None:
    def chosen(optimizer: Literal["adamw", "muon"], epochs: int) -> dict[str, object]:
        at = Situation(50_000, 100, 32, False, 2)
        return {
            key: found.value for key, found in choose_by_length(at, OptimConfig(optimizer=optimizer), epochs).items()
        }

    every_time = {"optim.warmup_epochs": 0.25, "evaluation.knn_every_epochs": 1}
    assert chosen("adamw", 5) == every_time
    assert chosen("muon", 5) == every_time | {"optim.muon_momentum": 0.6, "optim.muon_ns_steps": 3}
    assert chosen("muon", 100) == {"optim.warmup_epochs": 5.0, "evaluation.knn_every_epochs": 10}


def test_speed_is_measured_with_the_threads_the_share_and_the_precision_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measured(*, train: TrainConfig, images: int, **_: object) -> MeasuredStep:
        seen.append((images, torch.get_num_threads(), train.precision))
        return MeasuredStep(images, 100.0, None)

    monkeypatch.setattr("simclr_dist.plan.measure.measure_step", measured)
    monkeypatch.setattr("simclr_dist.training.precision.decide_precision", lambda *_: Decision("bf16"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    args = parsed(str(write(tmp_path / "pics", 600, ("a", "b"))), "--nproc=2", "--minutes=9")
    images = images_to_prepare(args, _out(args))
    before = torch.get_num_threads()
    text, _ = with_length(args, images, choose_for(args, images, _out(args)))
    assert seen == [(128, 3, "bf16")]  # 540 images: batches of 256
    assert "9 minutes at about 160 images/s" in text  # two processes, each with four fifths of its speed alone
    assert torch.get_num_threads() == before


def test_folders_of_every_kind_are_read_and_a_tenth_of_the_labelled_is_held_out(tmp_path: Path) -> None:
    def look(source: Path, *words: str) -> tuple[int, int | None, str]:
        found = images_to_prepare(parsed(str(source), *words), tmp_path / "out")
        assert 24 <= found.side <= 31
        return found.train.num_images, found.test.num_images if found.test else None, found.remark

    flat = write(tmp_path / "flat", 20)
    assert look(flat) == (20, None, "none (fewer than two classes)")
    assert look(write(tmp_path / "one", 60, ("cat/",)), "--layout=classes")[:2] == (60, None)
    labelled = write(tmp_path / "labelled", 62, ("a", "b", "c"))
    assert look(labelled) == (56, 6, "6 images, one in 10 of each class, are held out")
    found = images_to_prepare(parsed(str(labelled)), tmp_path / "out")
    assert found.train.names is not None
    assert found.test is not None
    assert found.test.names is not None
    assert len({*found.train.names, *found.test.names}) == 62
    assert {name[0] for name in found.test.names} == {"a", "b", "c"}
    assert look(write(tmp_path / "small", 30, ("a", "b")))[:2] == (30, None)
    assert look(labelled, f"--test={tmp_path}/small")[:2] == (62, 30)
    both = tmp_path / "both"
    write(both / "train", 30, ("a", "b"))
    write(both / "val", 10, ("a", "b"))
    assert look(both)[:2] == (30, 10)
    assert look(both)[2] == "10 images of the split val"
    beton = tmp_path / "all.beton"
    prepare(labelled, beton, num_workers=1)
    assert look(beton)[:2] == (62, None)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(labelled, "labelled")
    assert look(tmp_path / "all.tar")[:2] == (56, 6)
    listed = tmp_path / "some.txt"
    listed.write_text("0.png\n5.png\n7.png\n9.png\n")
    assert look(flat, f"--files={listed}")[:2] == (4, None)


def test_what_cannot_be_is_said_in_one_message_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "three", 3)
    write(tmp_path / "flat", 20)
    write(tmp_path / "splits" / "train", 6, ("a", "b"))
    write(tmp_path / "splits" / "b", 6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    before = set(tmp_path.rglob("*"))
    for words, complaint in (
        (("gone",), "gone: no such file or folder"),
        (("three",), "three: 3 images to train on: SimCLR tells the images of a batch apart"),
        (("empty",), "empty"),
        (("splits",), "simclr-dist train splits --split train"),
        (("flat", "--out=flat/out"), "its files would be taken for images"),
        (("flat", "--out=taken"), "is not empty, and no `simclr-dist train` has filled it"),
        (("flat", "train.epoch=3"), "did you mean `epochs`?"),
        (("flat", "--test=three"), "need two classes or more in flat"),
        (("flat", "--nproc=16"), "too few for 16 processes"),
        (("flat.beton",), "flat.beton"),
        (("x.yaml", "--minutes=3"), "--minutes: for a folder of images; x.yaml is a configuration"),
        (("x.yaml",), "x.yaml: no such file"),
    ):
        assert run(*words) == 2, words
        said = capsys.readouterr().err
        assert complaint in said, (words, said)
        assert "Traceback" not in said
    assert set(tmp_path.rglob("*")) == before


def test_a_dry_run_writes_nothing_and_settings_of_ones_own_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = write(tmp_path / "my pictures!", 60, ("a", "b"), side=40)
    assert run(labelled, "--dry-run", "--minutes=5", "train.epochs=7", "loss={temperature: 0.3}") == 0
    said = capsys.readouterr().out
    assert "you said so" in said
    assert not (tmp_path / "my pictures!_simclr").exists()
    assert not (tmp_path / "my_pictures_simclr").exists()
    args = parsed(str(labelled), "name=mine")
    chosen = choose_for(args, images_to_prepare(args, _out(args)), _out(args))
    assert (chosen.config.name, chosen.config.data.image_size) == ("mine", 24)


@pytest.mark.parametrize(
    ("said", "learns"),
    [
        ((), ("muon", 0.025, "none", "whitened", True)),  # 54 images: batches of 16
        (("train.global_batch_size=8",), ("muon", 0.018, "none", "whitened", True)),
        (("optim.optimizer=lars",), ("lars", 0.3, "linear", "whitened", True)),
        (("optim={optimizer: adam}",), ("adam", 2.5e-4, "none", "whitened", True)),
        (("optim.optimizer=sgd", "optim.base_lr=0.7"), ("sgd", 0.7, "linear", "whitened", True)),
        (("model.encoder=resnet18",), ("adamw", 2.5e-4, "none", "random", False)),
        (("model.encoder=vit_b_16", "data.image_size=224"), ("adamw", 2.5e-4, "none", "random", True)),
        (("model.weights=old/encoder.safetensors",), ("adamw", 2.5e-4, "none", "random", True)),
        (("model.encoder=resnet18", "model.weights=pretrained"), ("adamw", 2.5e-4, "none", "random", True)),
    ],
    ids=lambda words: " ".join(map(str, words)) or "nothing",
)
def test_what_is_said_changes_what_is_chosen_with_it(
    said: tuple[str, ...], learns: tuple[object, ...], tmp_path: Path
) -> None:
    """A rate that suits AdamW is nothing to LARS, and one for 16 images is not one for 8."""
    args = parsed(str(write(tmp_path / "pics", 60, ("a", "b"))), *said)
    config = choose_for(args, images_to_prepare(args, _out(args)), _out(args)).config
    optim, model = config.optim, config.model
    size = config.data.image_size
    assert (size, config.evaluation.image_size) == ((224, None) if "data.image_size=224" in said else (24, 32))
    assert config.augment.preset == ("simclr_imagenet" if size == 224 else "simclr_cifar")
    assert (
        optim.optimizer,
        optim.base_lr,
        optim.lr_scaling,
        model.first_layer,
        model.zero_init_residual,
    ) == learns


def test_one_command_prepares_trains_evaluates_exports_and_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "pics", 60, ("a", "b"))
    words = (folder, "--nproc=1", "model.width=8", "train.epochs=2", "monitor.image_pairs=0")
    assert run(*words, "train.max_steps=2") == 0  # as if its time had been up in the first epoch
    said = capfd.readouterr()
    out = tmp_path / "pics_simclr"
    for text in ("linear probe", "raw pixels", "simclr-dist embed"):
        assert text in said.out
    assert [describe(str(out / f"{name}.beton")).num_samples for name in ("train", "test")] == [54, 6]
    assert "# you said so" in (out / "config.yaml").read_text()
    first = (out / "encoder.safetensors").read_bytes()
    config = load_config(out / "config.yaml", ["train.max_steps=null"])
    assert (config.model.width, config.train.epochs, config.train.global_batch_size) == (8, 2, 16)
    assert run(*words, "train.max_steps=null") == 0
    said = capfd.readouterr()
    assert f"continues with the settings of {out}/config.yaml" in said.err
    assert "resumes at step 2" in said.out
    assert (out / "encoder.safetensors").read_bytes() != first
    steps = [record["step"] for record in read_records(RunDir(config.run_dir).log) if "train/loss" in record]
    assert max(steps) == 2 * (54 // 16)
    asked = json.loads((out / "train.json").read_text())
    assert asked["source"] == str(folder)
    with pytest.raises(ConfigError, match="was made of other images"):
        _is_begun(out, {**asked, "source": "/elsewhere"})


def test_a_source_that_cannot_be_read_one_way_names_the_command(tmp_path: Path) -> None:
    write(tmp_path / "around" / "only", 6, ("a", "b"))
    with pytest.raises(DataError) as caught:
        images_to_prepare(parsed(str(tmp_path / "around")), tmp_path / "out")
    assert f"simclr-dist train {tmp_path}/around --layout classes" in str(caught.value)
    assert "OUT.beton" not in str(caught.value)
