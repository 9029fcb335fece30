"""Classes of two data sets are compared by name: a test set may have fewer, never others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_dist import cli
from simclr_dist.config import ConfigError, DataConfig, EvaluationConfig, load_config
from simclr_dist.data.classes import draw_by_class, match_classes
from simclr_dist.doctor.checks import examine_config
from simclr_dist.doctor.data import examine_labels
from simclr_dist.errors import DataError
from simclr_dist.evaluation.online import OnlineEvaluation
from simclr_dist.few_labels.classifier import load_classifier
from simclr_dist.kinds import kind_of
from simclr_dist.kinds.evaluation_labels import check_evaluation_labels, evaluation_images
from simclr_dist.kinds.labelled_images import open_labelled
from tests.conftest import REPOSITORY
from tests.training import Training

COLOURS = {"ant": (220, 30, 30), "bee": (30, 220, 30), "cow": (30, 30, 220), "dog": (200, 200, 30)}

KNN = ("evaluation.knn_every_epochs=1", "train.global_batch_size=4", "optim.warmup_epochs=0")


def solid(folder: Path, *classes: str, images: int = 4) -> str:
    """Class folders of plain colour, which any encoder tells apart."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (16, 16), COLOURS[name]).save(folder / name / f"{i}.png")
    return str(folder)


def labels(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize(
    ("test_names", "test_labels", "expected"),
    [
        (("ant", "bee", "cow"), labels(0, 1, 2), [0, 1, 2]),
        (("ant", "cow"), labels(0, 1), [0, 2]),
        (("bee", "cow"), labels(0, 1, -1), [1, 2, -1]),
        (("cow", "bee", "ant"), labels(0, 1, 2), [2, 1, 0]),
        (("yak", "cow"), labels(1, 1), [2, 2]),  # a class of the list without images
    ],
)
def test_test_classes_get_the_number_of_the_training_class_with_their_name(
    test_names: tuple[str, ...], test_labels: np.ndarray, expected: list[int]
) -> None:
    found = match_classes(("ant", "bee", "cow"), test_names, test_labels, train="TRAIN", test="TEST")
    assert found(test_labels).tolist() == expected
    same = test_names == ("ant", "bee", "cow")
    assert (found.sentence == "") == same


@pytest.mark.parametrize(
    ("test_names", "test_labels", "message"),
    [
        (("ant", "yak"), labels(0, 1), r"TEST: has images of classes that TRAIN does not have: yak"),
        (("Ant",), labels(0), r"does not have: Ant"),
        (("0", "1", "2"), labels(0, 1, 2), r"does not have: 0, 1, 2; TRAIN has ant, bee, cow .* --classes-from TRAIN"),
        (("ant", "ant"), labels(0, 1), r"TEST: two of its classes have the same name: ant"),
        (("ant",), labels(3), r"TEST: has label 3, but names only 1 classes"),
    ],
)
def test_other_classes_are_refused_by_name(test_names: tuple[str, ...], test_labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        match_classes(("ant", "bee", "cow"), test_names, test_labels, train="TRAIN", test="TEST")


class MeanColour(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def evaluate_online(train: str, test: str) -> float:
    data, settings = DataConfig(train=train, test=test, image_size=16), EvaluationConfig(knn_every_epochs=1, knn_k=3)
    images = evaluation_images(data, settings, seed=0)
    assert images is not None
    evaluate = OnlineEvaluation(
        images, kind=kind_of(data), evaluation=settings, precision="fp32", device=torch.device("cpu"), warn_once=print
    )
    return evaluate(MeanColour(), step=1).figures["eval/knn_top1"]


@pytest.mark.parametrize("classes", [("ant", "cow"), ("bee", "cow"), ("cow",), ("ant", "bee", "cow")])
def test_knn_during_training_is_right_for_test_sets_with_fewer_classes(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    train = solid(tmp_path / "train", "ant", "bee", "cow")
    assert evaluate_online(train, solid(tmp_path / "test", *classes)) == 1.0


def test_evaluations_after_training_match_classes_too(tmp_path: Path) -> None:
    train, test = solid(tmp_path / "train", "ant", "bee", "cow"), solid(tmp_path / "test", "bee", "cow")
    images = open_labelled(DataConfig(train=train, test=test, image_size=16))
    assert images.classes(images.test_info.labels).tolist() == [1] * 4 + [2] * 4
    assert "2 of the 3 classes; none of ant" in images.classes.sentence


def check(pretraining: str, test: str | None, **settings: Any) -> str:
    data = DataConfig(train=pretraining, test=test, image_size=16)
    return "; ".join(check_evaluation_labels(data, EvaluationConfig(**{"knn_every_epochs": 1, "knn_k": 2} | settings)))


def test_labels_that_no_evaluation_can_use_are_refused_before_the_first_step(tmp_path: Path) -> None:
    train = solid(tmp_path / "train", "ant", "bee")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16)).save(flat / f"{i}.png")
    with pytest.raises(DataError, match=r"3 of 3 images of data.test .* have no label; .*knn_every_epochs to null"):
        check(train, str(flat))
    with pytest.raises(DataError, match=r"3 of 3 images of data.train "):
        check(str(flat), train)
    with pytest.raises(DataError, match=r"does not have: cow, dog"):
        check(train, solid(tmp_path / "others", "ant", "cow", "dog"))
    with pytest.raises(DataError, match=r"has 1 class, and kNN needs two"):
        check(solid(tmp_path / "one", "ant"), solid(tmp_path / "one_test", "ant"))
    assert "1 of the 2 classes; none of ant" in check(train, solid(tmp_path / "fewer", "bee"))
    assert check(train, solid(tmp_path / "good", "ant", "bee", images=3)) == ""
    for same in (train, solid(tmp_path / "copy", "ant", "bee")):
        assert "the very images of kNN's bank" in check(train, same)


def test_training_and_doctor_refuse_such_labels_before_anything_starts(tmp_path: Path) -> None:
    data = {
        "train": solid(tmp_path / "train", "ant", "bee"),
        "test": solid(tmp_path / "test", "ant", "cow"),
    }
    training = Training(Path(data["train"]), tmp_path, "run", f"data.test={data['test']}", *KNN)
    assert training.wait() == [2]
    assert "does not have: cow" in training.output[0]
    assert "Traceback" not in training.output[0]
    assert training.status()["reason"] == "data_error"
    assert not list(training.run_dir.glob("checkpoints/*"))
    (finding,) = examine_labels(DataConfig(**data, image_size=16), EvaluationConfig(knn_every_epochs=1))
    assert (finding.level, "does not have: cow" in finding.found) == ("problem", True)


def test_a_configuration_without_evaluation_needs_no_labels() -> None:
    data = DataConfig(train="nowhere", test="nowhere", image_size=16)
    assert check_evaluation_labels(data, EvaluationConfig(knn_every_epochs=None)) == []


# ---------------------------------------------------------------------------------------------------------------------
# A part of every class


@pytest.mark.parametrize(("most", "seed"), [(1000, 0), (1003, 1), (5000, 2), (49_999, 3)])
def test_a_bank_has_its_share_of_every_class(most: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rare = np.repeat(np.arange(1000), generator.integers(1, 4, 1000))
    labels = generator.permutation(np.concatenate([rare, generator.integers(0, 1000, 50_000 - len(rare))]))
    bank = draw_by_class(labels, most, seed)
    assert len(bank) == most
    assert (np.diff(bank) > 0).all()
    counts, drawn = np.bincount(labels, minlength=1000), np.bincount(labels[bank], minlength=1000)
    assert drawn.min() >= 1
    assert (drawn <= counts).all()
    fair = 1 + (most - 1000) * (counts - 1) / (50_000 - 1000)
    assert abs(drawn - fair).max() < 1
    assert np.array_equal(bank, draw_by_class(labels.copy(), most, seed))


def test_which_images_are_drawn_depends_on_seed_and_number_alone() -> None:
    labels = np.arange(400) % 4
    first, other = (set(draw_by_class(labels, 40, seed).tolist()) for seed in (0, 1))
    assert first != other
    assert len(first & other) < 20
    # More images of other classes change nothing in a class whose share is the same.
    longer = np.concatenate([labels, np.repeat(np.arange(4, 8), 100)])
    again = set(draw_by_class(longer, 80, 0).tolist())
    assert {i for i in again if i < 400} == first


def test_all_images_are_drawn_where_there_is_no_limit_and_too_few_places_are_refused() -> None:
    labels = np.array([2, 0, 0, 1])
    assert draw_by_class(labels, None, 0).tolist() == draw_by_class(labels, 9, 0).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="2 images cannot hold one of each of 3 classes"):
        draw_by_class(labels, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Known before the first step


def flat(folder: Path, images: int = 8) -> str:
    """Images without classes."""
    folder.mkdir(parents=True)
    for i in range(images):
        Image.new("RGB", (16, 16), (30 * i, 99, 40)).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knn_k": 9}, r"evaluation.knn_k: 9 neighbours, but kNN's bank has 8 images .*set it to 8 or less"),
        ({"knn_k": 3, "knn_max_train": 2}, r"evaluation.knn_k: 3 neighbours, but kNN's bank has 2 images"),
        ({"knn_max_train": 1}, r"evaluation.knn_max_train: a bank of 1 cannot hold .* each of the 2 classes"),
    ],
)
def test_a_bank_that_is_too_small_is_refused_by_name(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    train = solid(tmp_path / "train", "ant", "bee")
    with pytest.raises(ConfigError, match=message):
        check(train, solid(tmp_path / "test", "ant"), **settings)


def test_unlabelled_training_images_ask_for_labelled_ones(tmp_path: Path) -> None:
    train, test = flat(tmp_path / "train"), solid(tmp_path / "test", "ant", "bee")
    with pytest.raises(DataError, match=r"8 of 8 images of data.train .* name labelled images with evaluation.train"):
        check(train, test)
    labelled = solid(tmp_path / "labelled", "bee", "ant", "cow")
    assert "images of 2 of the 3 classes; none of cow" in check(train, test, train=labelled)
    with pytest.raises(DataError, match=r"8 of 8 images of evaluation.train "):
        check(labelled, test, train=train)
    with pytest.raises(DataError, match=r"test: has images of classes that .*/few does not have: bee"):
        check(labelled, test, train=solid(tmp_path / "few", "ant", "cow"))


def test_the_online_probe_needs_the_labels_of_the_training_images(tmp_path: Path) -> None:
    train, labelled = flat(tmp_path / "train"), solid(tmp_path / "labelled", "ant", "bee")
    probe = {"online_probe": True, "train": labelled}
    with pytest.raises(ConfigError, match=r"evaluation.online_probe: the labels of .*/train name 0 classes"):
        check(train, labelled, **probe)
    with pytest.raises(ConfigError, match=r"evaluation.online_probe"):
        check(train, None, **probe, knn_every_epochs=None)
    others = solid(tmp_path / "others", "cow", "dog")
    with pytest.raises(DataError, match=r"evaluation.online_probe: .* does not have: ant, bee.*switch it off"):
        check(others, solid(tmp_path / "test", "ant", "bee"), **probe)


def test_the_probe_has_the_class_numbers_of_the_training_images(tmp_path: Path) -> None:
    """Those of kNN are evaluation.train's."""
    data = DataConfig(
        train=solid(tmp_path / "train", "ant", "bee", "cow"), test=solid(tmp_path / "test", "bee", "cow"), image_size=16
    )
    settings = EvaluationConfig(
        train=solid(tmp_path / "labelled", "bee", "cow"), knn_every_epochs=1, knn_k=2, online_probe=True
    )
    images = evaluation_images(data, settings, seed=0)
    assert images is not None
    assert images.probe_classes is not None
    assert images.labelled.classes(labels(0, 1)).tolist() == [0, 1]
    assert images.probe_classes(labels(0, 1)).tolist() == [1, 2]


def test_a_class_that_is_named_but_has_no_training_image_is_none() -> None:
    with pytest.raises(DataError, match=r"TRAIN does not have: bee \(it names bee, without an image\)"):
        match_classes(("ant", "bee"), ("bee",), labels(0), train="TRAIN", test="TEST", train_labels=labels(0, 0))
    with pytest.raises(DataError, match=r"TRAIN: has label 2, but names only 2 classes"):
        match_classes(("ant", "bee"), ("bee",), labels(0), train="TRAIN", test="TEST", train_labels=labels(0, 2))
    found = match_classes(("x", "ant", "bee"), ("bee",), labels(0), train="A", test="B", train_labels=labels(1, 2))
    assert found.sentence == "B has images of 1 of the 2 classes; none of ant"


@pytest.mark.parametrize("wrong", ["k", "max_train", "unlabelled", "probe"])
def test_the_doctor_and_a_training_say_the_same_before_anything_starts(tmp_path: Path, wrong: str) -> None:
    train, test = solid(tmp_path / "train", "ant", "bee"), solid(tmp_path / "test", "ant", "bee")
    unlabelled = flat(tmp_path / "flat")
    overrides, data = {
        "k": (["evaluation.knn_k=200"], train),
        "max_train": (["evaluation.knn_max_train=1"], train),
        "unlabelled": ([], unlabelled),
        "probe": (["evaluation.online_probe=true", f"evaluation.train={train}"], unlabelled),
    }[wrong]
    overrides = [f"data.test={test}", *KNN, "evaluation.knn_k=2", *overrides]
    training = Training(Path(data), tmp_path, "run", *overrides)
    assert training.wait() == [2]
    assert "Traceback" not in training.output[0]
    smoke = str(REPOSITORY / "configs" / "smoke.yaml")
    found = list(examine_config(smoke, [f"data.train={data}", f"runs_dir={tmp_path}", "name=x", *overrides], {}))
    (problem,) = [finding for finding in found if finding.what == "labels"]
    assert problem.level == "problem"
    assert problem.found in training.output[0]


# ---------------------------------------------------------------------------------------------------------------------
# Labelled images apart from those of pretraining


def command(*arguments: object) -> None:
    args = cli.parser().parse_args([str(argument) for argument in arguments])
    assert args.run(args) == 0


def test_unlabelled_pretraining_is_evaluated_on_labelled_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with STL-10: data.train has no labels, evaluation.train has."""
    train = flat(tmp_path / "train", images=16)
    labelled, test = solid(tmp_path / "labelled", "bee", "ant", "cow"), solid(tmp_path / "test", "cow", "ant")
    settings = ("data.image_size=16", "train.epochs=1", f"evaluation.train={labelled}", "evaluation.knn_k=3")
    training = Training(Path(train), tmp_path, "run", f"data.test={test}", *KNN, *settings, "data.num_threads=1")
    assert training.wait() == [0], training.output
    online = json.loads((training.run_dir / "evaluations.jsonl").read_text())
    assert (online["train"], online["train_images"], online["test_images"]) == (labelled, 12, 8)

    for method in ("knn", "linear"):
        command("evaluate", method, training.run_dir, "--json", "--device", "cpu")
        record = json.loads(capsys.readouterr().out)
        assert (record["train"], record["test"]) == (labelled, test)
        assert method == "linear" or record["top1"] == online["top1"]
    command("finetune", training.run_dir, "--epochs", 1, "--batch-size", 4, "--json", "--device", "cpu")
    tuned = json.loads(capsys.readouterr().out)
    assert (tuned["train"], tuned["num_labels"]) == (labelled, 12)
    teacher = next(training.run_dir.rglob("classifier.safetensors"))
    command("distill", teacher, "--epochs", 1, "--batch-size", 4, "--json", "--device", "cpu")
    student = json.loads(capsys.readouterr().out)
    assert (student["train"], student["test"]) == (train, test)
    assert load_classifier(teacher.parent / "distilled_student" / teacher.name).class_names == ("ant", "bee", "cow")
    other = solid(tmp_path / "other", "cow", "ant", "dog")
    command("evaluate", "knn", training.run_dir, "--train", other, "--json", "--device", "cpu")
    assert json.loads(capsys.readouterr().out)["train"] == other
    with pytest.raises(
        DataError, match=r"none of the 16 images of .*/train has a label; .*--train, or evaluation.train"
    ):
        command("evaluate", "knn", training.run_dir, "--train", train, "--device", "cpu")


def test_evaluation_train_must_exist(tmp_path: Path) -> None:
    smoke = REPOSITORY / "configs" / "smoke.yaml"
    with pytest.raises(ConfigError, match=r"evaluation.train: .*nowhere does not exist; make it with `simclr-dist"):
        load_config(smoke, [f"evaluation.train={tmp_path}/nowhere"])
