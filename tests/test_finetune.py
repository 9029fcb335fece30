"""Few labels, fine-tuning, the paper's linear protocol, distillation. pytest tests/test_finetune.py"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from simclr_dist.config import Config, ModelConfig, parse_config
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import DatasetInfo, describe
from simclr_dist.errors import CheckpointError, ConfigError, DataError
from simclr_dist.evaluation.features import digest
from simclr_dist.few_labels.classifier import Classifier, accuracy, load_classifier, save_classifier
from simclr_dist.few_labels.distill import distil, distillation_loss
from simclr_dist.few_labels.finetune import Training, default_epochs, fine_tune, linear_protocol
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.few_labels.subsets import Subset, draw_subset, load_subset, save_subset, shortfall
from simclr_dist.few_labels.train import Settings, distill_classifier
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.views.augment import normalize
from tests.test_evaluate import save_images


def make_config(head_layers: int = 3) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "data": {"train": "synthetic", "image_size": 16},
            "model": {"encoder": "resnet_small", "width": 4, "head_layers": head_layers, "head_hidden_dim": 24},
            "optim": {"warmup_epochs": 0.0},
            "train": {"global_batch_size": 8, "epochs": 1},
        }
    )


def make_model(head_layers: int = 3) -> SimCLR:
    torch.manual_seed(0)
    model = build_model(make_config(head_layers).model)
    model(torch.randn(16, 3, 16, 16))  # running statistics that are not 0 and 1
    return model.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_images(tmp_path_factory.mktemp("images") / "train", 12, seed=0))


def crops(source: str, batch_size: int = 12, seed: int = 0) -> RandomCrops:
    info = describe(source)
    return RandomCrops(
        source, np.arange(info.num_samples), image_size=16, batch_size=batch_size, seed=seed, num_threads=1
    )


# ---------------------------------------------------------------------------------------------------------------------
# Subsets


def info_with(labels: list[int], num_classes: int) -> DatasetInfo:
    names = tuple(f"class{i}" for i in range(num_classes))
    return DatasetInfo(len(labels), names, "f00d", lambda: "c0ffee", np.array(labels), None)


def test_subsets_are_class_balanced_and_seeded() -> None:
    info = info_with([0] * 400 + [1] * 400 + [2] * 200 + [-1] * 50, 3)
    subset = draw_subset(info, 0.03, seed=1)
    assert np.bincount(info.labels[subset.id_array]).tolist() == [10, 10, 10]
    assert subset == draw_subset(info, 0.03, seed=1)
    assert subset != draw_subset(info, 0.03, seed=2)
    assert list(subset.ids) == sorted(set(subset.ids))


def test_a_tiny_share_keeps_one_image_a_class_and_the_whole_share_every_label() -> None:
    info = info_with([0] * 40 + [1] * 3 + [-1] * 5, 2)
    assert np.bincount(info.labels[draw_subset(info, 0.001, seed=0).id_array]).tolist() == [1, 1]
    assert np.bincount(info.labels[draw_subset(info, 0.5, seed=0).id_array]).tolist() == [11, 3]
    assert draw_subset(info, 1.0, seed=0).ids == tuple(range(43))


def digest_of(subset: Subset) -> str:
    return hashlib.sha256(subset.id_array.tobytes()).hexdigest()[:16]


def test_a_seed_draws_what_it_drew_in_release_0_1() -> None:
    generator = np.random.default_rng(0)
    info = info_with(generator.integers(-1, 7, 3000).tolist(), 7)
    drawn = {(share, seed): digest_of(draw_subset(info, share, seed)) for share, seed in ((0.01, 0), (0.37, 2**40))}
    assert drawn == {(0.01, 0): "7334a6553f0e02f5", (0.37, 2**40): "76d1f218926b570e"}
    geometric = info_with(np.minimum(generator.geometric(0.3, 3000) - 1, 8).tolist(), 9)
    subset = draw_subset(geometric, 0.2, 5)
    assert (len(subset.ids), digest_of(subset)) == (603, "ca7346304c0f3297")


def test_a_draw_takes_one_pass_however_many_classes_there_are() -> None:
    labels = CountsPasses(np.arange(20_000) % 5_000)
    draw_subset(replace(info_with([0], 5_000), num_samples=20_000, labels=labels), 0.5, seed=0)
    assert CountsPasses.comparisons < 10


class CountsPasses(np.ndarray):
    """An array that counts how often it is compared as a whole."""

    comparisons = 0

    def __new__(cls, values: np.ndarray) -> CountsPasses:
        return values.view(cls)

    def __eq__(self, other: object) -> Any:
        CountsPasses.comparisons += 1
        return super().__eq__(other)


@pytest.mark.parametrize(
    ("labels", "share", "said"),
    [
        ([0] * 90 + [1] * 3 + [2] * 7, 0.3, r"0.3 of 100 labels are 30; drawn are 20, because 2 class\(es\) have fewer "
         r"than 10 images: class1, class2"),
        ([0, 1, 2] * 100, 0.001, "0.001 of 300 labels are 0; drawn are 3, one of each class"),
        ([0] * 97 + [1, 2, -1], 0.5, r"0.5 of 99 labels are 50; drawn are 18, because 2 class\(es\)"),
        ([0, 1, 2] * 100, 0.07, ""),
        ([0, 1, 2] * 100, 1.0, ""),
    ],
)  # fmt: skip
def test_a_draw_that_is_not_the_share_asked_for_says_so(labels: list[int], share: float, said: str) -> None:
    info = info_with(labels, 3)
    sentence = shortfall(draw_subset(info, share, seed=0), info)
    assert re.match(said, sentence) if said else sentence == ""


def test_an_empty_class_is_named() -> None:
    with pytest.raises(DataError, match=r"1 class\(es\) have no image to choose from: class1"):
        draw_subset(info_with([0, 0, 2], 3), 0.5, seed=0)
    with pytest.raises(DataError, match="no labels"):
        draw_subset(info_with([-1, -1], 3), 0.5, seed=0)
    with pytest.raises(DataError, match="above 0 and at most 1, not 10"):
        draw_subset(info_with([0, 1], 2), 10, seed=0)


def test_a_subset_file_is_read_back_or_refused(tmp_path: Path) -> None:
    info = info_with([0, 1] * 50, 2)
    subset = draw_subset(info, 0.1, seed=3)
    path = tmp_path / "subsets" / "10percent.json"
    save_subset(path, subset)
    assert load_subset(path, info) == subset
    with pytest.raises(DataError, match="was drawn from a dataset with fingerprint c0ffee"):
        load_subset(path, replace(info, fingerprint="beef", digest=lambda: "beef"))
    one_class = json.loads(path.read_text()) | {"ids": [0, 2, 4]}
    path.write_text(json.dumps(one_class))
    with pytest.raises(DataError, match=r"has no image of the class\(es\) class1"):
        load_subset(path, info)
    path.write_text(json.dumps(one_class | {"ids": [0, 1, 100]}))
    with pytest.raises(DataError, match="names samples that the dataset does not have"):
        load_subset(path, info)
    path.write_text("{")
    with pytest.raises(DataError, match="is no subset file"):
        load_subset(path, info)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": [0, 1, 1, 2]}, "sample 1 is named more than once"),
        ({"ids": [0, 1, 4, 5, 9]}, r"2 of its 5 samples have no label \(first: 4\)"),
        ({"ids": [0, 1.5, 2]}, "ids must be a list of whole numbers"),
        ({"ids": [0, True, 2]}, "ids must be a list of whole numbers"),
        ({"ids": "012"}, "ids must be a list of whole numbers"),
        ({"ids": {"0": 1}}, "ids must be a list of whole numbers"),
        ({"ids": [0, 1, 2, 10**30]}, "names samples that the dataset does not have"),
        ({"ids": [-1, 1, 2]}, "names samples that the dataset does not have"),
        ({"ids": []}, "names samples that the dataset does not have"),
        ({"share": float("nan")}, "share must be above 0 and at most 1, .*; found nan"),
        ({"share": float("inf")}, "found inf"),
        ({"share": 0}, "found 0"),
        ({"share": 7}, "found 7"),
        ({"share": "0.1"}, "found '0.1'"),
        ({"seed": 1.5}, "seed a whole number; found .*1.5"),
        ({"seed": None}, "seed a whole number; found .*None"),
    ],
)
def test_a_subset_file_that_cannot_be_meant_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    info = info_with([0, 1, 2, 0, -1, -1, 1, 2, 0, 1], 3)
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"ids": [0, 1, 2], "fingerprint": "c0ffee", "share": 0.5, "seed": 0, **change}))
    with pytest.raises(DataError, match=said):
        load_subset(path, info)


def test_a_subset_file_written_by_hand_may_be_in_any_order_and_must_not_be_deep(tmp_path: Path) -> None:
    info, path = info_with([0, 1, 2, 0, 1, 2], 3), tmp_path / "subset.json"
    path.write_text(json.dumps({"ids": [5, 0, 1], "fingerprint": "f00d", "share": 1, "seed": 0}))
    assert load_subset(path, info) == Subset((0, 1, 5), "f00d", 1.0, 0)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is no subset file"):
        load_subset(path, info)


# ---------------------------------------------------------------------------------------------------------------------
# Crops


def test_an_epoch_shows_every_sample_once_in_a_new_order_with_new_crops(images: str) -> None:
    with crops(images) as data:
        first, again, second = list(data.epoch(0)), list(data.epoch(0)), list(data.epoch(1))
    ids = torch.cat([batch[2] for batch in first])
    assert sorted(ids.tolist()) == list(range(36))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(ids, torch.cat([batch[2] for batch in second]))
    assert not torch.equal(torch.cat([b[0] for b in first])[ids.argsort()][0], second[0][0][0])
    labels = torch.from_numpy(describe(images).labels)
    assert all(torch.equal(batch[1], labels[batch[2]]) for batch in first)


def test_batches_are_whole_and_a_small_set_is_one_batch(images: str) -> None:
    with crops(images, batch_size=10) as data:
        assert [len(batch[0]) for batch in data.epoch(0)] == [10, 10, 10]
    with crops(images, batch_size=100) as data:
        assert [len(batch[0]) for batch in data.epoch(0)] == [36]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_fine_tuning_learns_and_changes_the_encoder(images: str, tmp_path: Path) -> None:
    model = make_model()
    before = digest(model.encoder)
    test = str(save_images(tmp_path / "test", 8, seed=9))
    losses: list[float] = []
    classifier = Classifier(model, 3)
    with crops(images) as data:
        fine_tune(classifier, data, Training(8, 2.0, on_epoch=lambda epoch, loss: losses.append(loss)))
    assert losses[-1] < 0.7 * losses[0]
    assert digest(model.encoder) != before
    assert not classifier.training
    result = accuracy(classifier, load_images(test, 16, batch_size=8), device="cpu", normalize=normalize)
    assert result.top1 > 0.6
    assert result.top5 == 1.0


def test_the_first_step_is_that_of_torchs_sgd_by_hand(images: str) -> None:
    """One epoch of one batch: fc moves from zero by lr x (1 + momentum) x gradient (Nesterov)."""
    model = make_model()
    with crops(images, batch_size=100) as data:
        batch = next(data.epoch(0))
        classifier = Classifier(copy.deepcopy(model), 3)
        classifier.train()
        F.cross_entropy(classifier(normalize(batch[0])), batch[1]).backward()
        expected = -0.05 * 36 / 256 * 1.9 * classifier.fc.weight.grad  # type: ignore[operator]
        trained = Classifier(copy.deepcopy(model), 3)
        fine_tune(trained, data, Training(1))
    torch.testing.assert_close(trained.fc.weight.detach(), expected)


def test_the_linear_protocol_leaves_the_encoder_alone(images: str) -> None:
    model = make_model()
    before = digest(model.encoder)
    classifier = Classifier(model, 3)
    losses: list[float] = []
    with crops(images) as data:
        linear_protocol(classifier, data, Training(6, 2.0, on_epoch=lambda epoch, loss: losses.append(loss)))
    assert digest(model.encoder) == before
    assert losses[-1] < losses[0]
    assert classifier.fc.weight.abs().max() > 0


def test_divergence_is_said(images: str) -> None:
    with crops(images) as data, pytest.raises(FloatingPointError, match="lower the learning rate"):
        fine_tune(Classifier(make_model(), 3), data, Training(3, 1e20))


@pytest.mark.parametrize("head_layers", [2, 3])
def test_starting_from_the_head_keeps_its_first_layer(head_layers: int) -> None:
    model = make_model(head_layers)
    classifier = Classifier(model, 3, "head").eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        head = model.projection_head
        expected = head.relu1(head.bn1(head.linear1(model.encoder(x))))  # type: ignore[operator]
        torch.testing.assert_close(classifier.backbone(x), expected)
    assert classifier.fc.in_features == 24


def test_a_linear_head_has_no_layer_to_start_from() -> None:
    with pytest.raises(ConfigError, match=r"a head of one layer \(model.head_layers: 1\) gives z.*from the encoder"):
        Classifier(make_model(head_layers=1), 3, "head")
    assert Classifier(make_model(head_layers=1), 3).fc.in_features == 16


def test_epochs_follow_the_paper() -> None:
    assert (default_epochs(0.01), default_epochs(0.1)) == (60, 30)


@pytest.mark.parametrize("start", ["encoder", "head"])
def test_a_saved_classifier_comes_back(tmp_path: Path, start: str) -> None:
    classifier = Classifier(make_model(), 3, start).eval()
    torch.nn.init.normal_(classifier.fc.weight)
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier, ("a", "b", "c"), make_config().model_dump_json(), {"share": 0.1})
    found = load_classifier(path)
    assert parse_config(found.config_json) == make_config()
    assert found.class_names == ("a", "b", "c")
    assert digest(found.network) == digest(classifier)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is no classifier"):
        load_classifier(path)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_loss_equals_the_paper_by_hand(temperature: float, alpha: float) -> None:
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([2, -1, 0, -1, 3, -1])
    soft = hard = 0.0
    for i in range(6):
        p_teacher = (teacher[i] / temperature).exp() / (teacher[i] / temperature).exp().sum()
        p_student = (student[i] / temperature).exp() / (student[i] / temperature).exp().sum()
        soft -= sum(float(p_teacher[c] * p_student[c].log()) for c in range(4)) / 6
        if labels[i] >= 0:
            hard -= float((student[i, labels[i]].exp() / student[i].exp().sum()).log()) / 3
    found = distillation_loss(student, teacher, temperature, labels, alpha)
    assert float(found) == pytest.approx(alpha * soft + (1 - alpha) * hard)


def test_a_batch_without_labels_has_no_labelled_term() -> None:
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    mixed = distillation_loss(student, teacher, 1.0, torch.full((6,), -1), 0.25)
    assert float(mixed) == pytest.approx(0.25 * float(distillation_loss(student, teacher, 1.0)))


def test_the_student_learns_from_the_teacher_without_labels(images: str) -> None:
    teacher = Classifier(make_model(), 3)
    with crops(images) as data:
        fine_tune(teacher, data, Training(8, 2.0))
        before = digest(teacher)
        torch.manual_seed(3)
        small = ModelConfig.model_validate({"encoder": "resnet_small", "width": 3})
        student = Classifier(build_model(small), 3)
        distil(teacher, student, data, Training(8, 2.0))
    assert digest(teacher) == before
    logits = {}
    for name, network in (("teacher", teacher), ("student", student)):
        x = torch.cat([normalize(batch[0]) for batch in load_images(images, 16, batch_size=36)])
        with torch.no_grad():
            logits[name] = network(x).argmax(dim=1)
    assert (logits["teacher"] == logits["student"]).float().mean() > 0.6


def test_a_student_of_other_classes_is_refused(tmp_path: Path) -> None:
    teacher = tmp_path / "classifier.safetensors"
    save_classifier(teacher, Classifier(make_model(), 2), ("cat", "dog"), make_config().model_dump_json(), {})
    train, test = (str(save_images(tmp_path / name, 4, seed=0)) for name in ("train", "test"))
    settings = Settings(torch.device("cpu"), epochs=1)
    with pytest.raises(DataError, match="does not have the classes of the teacher"):
        distill_classifier(teacher, tmp_path / "out", settings, unlabelled=train, test=test, say=print)
    assert not (tmp_path / "out" / "classifier.safetensors").exists()


def test_a_subset_without_a_class_is_refused_by_name(tmp_path: Path) -> None:
    info = info_with([0, 0, 1, 1, 2], 3)
    save_subset(tmp_path / "subset.json", Subset((0, 2), info.fingerprint, 0.4, 0))
    with pytest.raises(DataError, match=r"has no image of the class\(es\) class2"):
        load_subset(tmp_path / "subset.json", info)
