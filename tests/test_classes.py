"""Classes of two data sets are compared by name: a test set may have fewer, never others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_dist.config import DataConfig, EvaluationConfig
from simclr_dist.data.classes import match_classes
from simclr_dist.data.loading.evaluation_labels import check_evaluation_labels, evaluation_images
from simclr_dist.data.loading.labelled_images import open_labelled
from simclr_dist.doctor.data import examine_labels
from simclr_dist.errors import DataError
from simclr_dist.evaluation.online import OnlineEvaluation
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
        images, data=data, evaluation=settings, precision="fp32", device=torch.device("cpu"), warn_once=print
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


def check(train: str, test: str | None, **settings: Any) -> str:
    data = DataConfig(train=train, test=test, image_size=16)
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
    assert check(train, solid(tmp_path / "same", "ant", "bee")) == ""
    assert "the very images of kNN's bank" in check(train, train)


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
