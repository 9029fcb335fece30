"""SimCLR v2 in one command: what it does, how it goes on, what it refuses. pytest tests/test_recipe.py"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simclr_dist.cli import main
from simclr_dist.cli import recipe as command
from simclr_dist.cli.recipe import read_recipe, run_recipe
from simclr_dist.errors import ConfigError
from simclr_dist.few_labels import recipe as recipes
from simclr_dist.few_labels.classifier import load_classifier
from tests.conftest import REPOSITORY
from tests.test_evaluate import save_images

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    "pretrain": {"config": "tiny.yaml", "overrides": ["train.epochs=2"]},
    "labels": [0.25, 1.0],
    "finetune": {"start": "head", "epochs": 1, "batch_size": 8},
    "distill": [{"epochs": 1, "batch_size": 8, "width": 4, "alpha": 0.5}],
}


def write(folder: Path, recipe: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return path


def write_config(folder: Path, **data: Any) -> None:
    config = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {"image_size": 16, **data},
        "model": {"encoder": "resnet_small", "width": 8, "head_layers": 3, "head_hidden_dim": 24, "head_out_dim": 8},
        "optim": {"warmup_epochs": 0.0},
        "train": {"global_batch_size": 8, "epochs": 1, "precision": "fp32"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the recipe has been done by the command line, pretraining on one process."""
    folder = tmp_path_factory.mktemp("recipe")
    train, test = (str(save_images(folder / name, 8, seed=seed)) for seed, name in enumerate(("train", "test")))
    write_config(folder, train=train, test=test)
    words = [sys.executable, "-m", "simclr_dist.cli", "recipe", str(write(folder, RECIPE)), "--nproc", "1"]
    done = subprocess.run(
        [*words, "--device", "cpu"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "distilled into width 4" in done.stdout
    return folder


def refuses_to_train(*_: object, **__: object) -> None:
    raise AssertionError("there was nothing left to train")


def test_it_leaves_a_table_of_every_stage(finished: Path) -> None:
    root = finished / "runs" / "tiny" / "recipe"
    table = json.loads((root / "results.json").read_text())
    found = [(row["result"], row["labels"]) for row in table["rows"]]
    expected = [("linear probe", 1.0)]
    for share in (0.25, 1.0):
        expected += [("fine-tuned from the head", share), ("distilled into width 4", share)]
    assert found == expected
    for row in table["rows"][1:]:
        classifier = load_classifier(Path(row["folder"]) / "classifier.safetensors").network
        assert row["num_parameters"] == sum(p.numel() for p in classifier.parameters())
        assert row["top1"] == json.loads((Path(row["folder"]) / "result.json").read_text())["top1"]
    student = json.loads((root / "labels_0.25" / "student_1" / "result.json").read_text())
    assert student["teacher"] == str(root / "labels_0.25" / "classifier.safetensors")
    subset = json.loads((root / "labels_0.25" / "subset.json").read_text())
    assert len(subset["ids"]) < len(json.loads((root / "labels_1" / "subset.json").read_text())["ids"])
    assert (root / "results.md").read_text().count("\n|") == 7


def test_a_second_start_trains_nothing_and_gives_the_same_table(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("finetune_checkpoint", "distill_classifier", "evaluate"):
        monkeypatch.setattr(recipes, name, refuses_to_train)
    root = finished / "runs" / "tiny"
    before = (root / "recipe" / "results.json").read_bytes()
    (root / "recipe" / "results.json").unlink()
    assert run_recipe(finished / "recipe.yaml", [], CPU, run=root) == 0
    assert (root / "recipe" / "results.json").read_bytes() == before


def test_a_stage_that_was_cut_off_is_done_anew_to_the_same_result(finished: Path) -> None:
    root = finished / "runs" / "tiny"
    folder = root / "recipe" / "labels_0.25"
    before, weights = (folder / "result.json").read_bytes(), load_file(folder / "classifier.safetensors")
    (folder / "result.json").unlink()  # killed between the classifier and its result
    assert run_recipe(finished / "recipe.yaml", [], CPU, run=root) == 0
    assert (folder / "result.json").read_bytes() == before
    again = load_file(folder / "classifier.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    recipe = json.loads(json.dumps(RECIPE))
    change(recipe)
    return recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["finetune"].update(epochs=2), "epochs: 1 then, 2 now"),
        (lambda r: r["distill"][0].update(temperature=2.0), "temperature: 1.0 then, 2.0 now"),
        (lambda r: r["finetune"].update(start="encoder"), "start: head then, encoder now"),
    ],
)
def test_other_words_for_a_finished_stage_are_refused(
    finished: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    (tmp_path / "tiny.yaml").write_bytes((finished / "tiny.yaml").read_bytes())
    with pytest.raises(ConfigError, match=said) as caught:
        run_recipe(write(tmp_path, changed(change)), [], CPU, run=finished / "runs" / "tiny")
    assert "remove the folder" in str(caught.value)


def test_results_of_a_run_that_was_trained_anew_are_refused(finished: Path) -> None:
    root = finished / "runs" / "tiny" / "recipe" / "linear"
    asked = json.loads((root / "asked.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", asked["weights"])
    (root / "asked.json").write_text(json.dumps({**asked, "weights": "0" * 16}))
    with pytest.raises(ConfigError, match=f"weights: 0000000000000000 then, {asked['weights']} now"):
        run_recipe(finished / "recipe.yaml", [], CPU, run=finished / "runs" / "tiny")
    (root / "asked.json").write_text(json.dumps(asked))


def test_a_damaged_result_is_named(finished: Path) -> None:
    path = finished / "runs" / "tiny" / "recipe" / "linear" / "asked.json"
    before = path.read_bytes()
    path.write_text("[1")
    with pytest.raises(ConfigError, match=r"asked\.json: cannot be read"):
        run_recipe(finished / "recipe.yaml", [], CPU, run=finished / "runs" / "tiny")
    path.write_bytes(before)


@pytest.mark.parametrize("code", [75, 4])
def test_the_exit_code_of_pretraining_is_passed_on(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, train="synthetic", test="synthetic")
    monkeypatch.setattr(command, "pretrain", lambda *_: code)
    assert run_recipe(write(tmp_path, RECIPE), [], CPU) == code
    assert "the same command continues from there" in capsys.readouterr().err


BAD = {
    "nothing in it": ("", "expected `key: value` lines"),
    "unknown key": ({**RECIPE, "label": [0.1]}, "label: unknown key; did you mean `labels`?"),
    "unknown key of a student": (
        changed(lambda r: r["distill"][0].update(temprature=2.0)),
        "distill.0.temprature: unknown key; did you mean `temperature`?",
    ),
    "a share above 1": ({**RECIPE, "labels": [10.0]}, "labels.0: input should be less than or equal to 1, found 10.0"),
    "a share twice": ({**RECIPE, "labels": [0.1, 0.1]}, "names a share twice"),
    "no shares": ({**RECIPE, "labels": []}, "labels: "),
    "no such configuration": ({**RECIPE, "pretrain": {"config": "no.yaml"}}, "no.yaml: no such file"),
    "a linear head to start from": (
        {**RECIPE, "pretrain": {"config": "tiny.yaml", "overrides": ["model.head_layers=1"]}},
        "finetune.start: start from the head: a head of one layer",
    ),
    "an override that is none": (
        {**RECIPE, "pretrain": {"config": "tiny.yaml", "overrides": ["model.widht=8"]}},
        "model.widht: unknown key; did you mean `width`?",
    ),
    "no test images": (
        {**RECIPE, "pretrain": {"config": "tiny.yaml", "overrides": ["data.test=null"]}},
        "accuracy is measured on data.test",
    ),
    "a student that cannot be built": (
        changed(lambda r: r["distill"][0].update(encoder="resnet81")),
        "distill.0: model.encoder.*resnet81",
    ),
    "a start that is none": (changed(lambda r: r["finetune"].update(start="middle")), 'finetune.start: .*"middle"'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_cannot_be_meant_is_refused_before_anything_is_done(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, said = BAD[case]
    write_config(tmp_path, train="synthetic", test="synthetic")
    monkeypatch.setattr(command, "pretrain", refuses_to_train)
    with pytest.raises(SystemExit) as caught:
        main(["recipe", str(write(tmp_path, recipe)), "--device", "cpu"])
    assert caught.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_student_that_reads_values_while_it_is_built_is_one(tmp_path: Path) -> None:
    write_config(tmp_path, train="synthetic", test="synthetic")
    recipe, _ = read_recipe(write(tmp_path, changed(lambda r: r["distill"][0].update(encoder="regnet_y_400mf"))))
    assert recipe.distill[0].encoder == "regnet_y_400mf"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_whole_and_plan_every_stage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, config = read_recipe(path)
    assert config.model.head_layers == 3
    with pytest.raises(SystemExit) as caught:
        main(["recipe", str(path), "--device", "cpu", "--dry-run", "--run", "runs/elsewhere"])
    assert caught.value.code == 0
    stages = 1 + len(recipe.labels) * (1 + len(recipe.distill))
    assert len(capsys.readouterr().out.splitlines()) == 1 + stages
