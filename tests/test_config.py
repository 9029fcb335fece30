"""Configuration: every mistake is named with file, line and key, all of them at once, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from simclr_dist.config import (
    Config,
    compose_config,
    json_schema,
    load_config,
    render_config,
    render_with_origins,
)
from simclr_dist.errors import ConfigError
from tests.conftest import REPOSITORY

GOOD = """\
name: test
data:
  train: synthetic
  image_size: 32
model:
  encoder: resnet_small
train:
  global_batch_size: 64
  epochs: 20
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return caught.value.problems


SHIPPED = [path for folder in ("", "variants") for path in (REPOSITORY / "configs" / folder).glob("*.yaml")]


@pytest.mark.parametrize("path", sorted(SHIPPED), ids=lambda p: p.stem)
def test_shipped_config_loads_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path, check_data=False, world_size=1)
    assert config.name == path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    for word in ("Hardware:", "ccuracy", "time" if "time" in text else "Time", path.name):
        assert word in text, f"{path.name} should say its {word} at the top"


def test_overrides_win_over_the_file_in_their_order(good: Path) -> None:
    config = load_config(
        good, ["train.epochs=30", "train.epochs=40", "optim.betas=[0.8, 0.9]", "loss={temperature: 0.3}"]
    )
    assert (config.train.epochs, config.optim.betas, config.loss.temperature) == (40, (0.8, 0.9), 0.3)


def test_rendered_config_reads_back_equal(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["optim.weight_decay=1.0e-6", "optim.base_lr=3.0e+2"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(render_config(config))
    assert load_config(copy) == config


def test_config_is_frozen(good: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(good).train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "replacement", "expected"),
    [
        ("  epochs: 20", "  epoch: 20", ":9: train.epoch: unknown key; did you mean `epochs`?"),
        ("  epochs: 20", "  epochs: '20'", ':9: train.epochs: input should be a valid integer, found "20"'),
        ("  epochs: 20", "  epochs: 2.5", ":9: train.epochs: input should be a valid integer"),
        ("  epochs: 20", "  epochs: 0", ":9: train.epochs: input should be greater than or equal to 1, found 0"),
        ("  epochs: 20", "  epochs: 20\n  epochs: 30", ":10: train.epochs: written twice"),
        (
            "  epochs: 20",
            "  epochs: 20\noptim: {base_lr: 1e-3}",
            "YAML reads 1e-3 as text, not as a number; write 1.0e-3",
        ),
        (
            "  epochs: 20",
            "  epochs: 20\noptim: {lr_scaling: no}",
            "optim.lr_scaling: input should be 'linear', 'sqrt' or",
        ),
        (
            "  epochs: 20",
            "  epochs: 20\nloss: {temperature: 0}",
            ":10: loss.temperature: input should be greater than 0",
        ),
        ("  epochs: 20", "  epochs: 20\nloss: {temperature: -0.1}", "loss.temperature: input should be greater than 0"),
        ("  epochs: 20", "  epochs: 20\nloss: {temperature: .nan}", "loss.temperature"),
        ("  epochs: 20", "  epochs: 012", "train.epochs: input should be a valid integer"),
        ("  encoder: resnet_small", "  []", "model: input should be a valid dictionary or instance"),
        ("  encoder: resnet_small", "  width: 8", "model.encoder: is missing and has no default"),
        ("  train: synthetic", "  train: nowhere.beton", ":3: data.train: nowhere.beton does not exist; make it with"),
        ("name: test", "name: ../test", ":1: name: string should match pattern"),
        ("  epochs: 20", "  epochs: 20\nevaluation: {knn_every_epochs: 1}", "knn_every_epochs needs data.test"),
        ("  epochs: 20", "  epochs: 10", "optim.warmup_epochs (10) must be shorter than train.epochs (10)"),
        ("name: test", "name: {", "not valid YAML"),
        ("name: test", "name: !!python/object/apply:os.system ['true']", "os.system is not allowed"),
    ],
)
def test_mistake_is_named_with_file_line_and_key(good: Path, line: str, replacement: str, expected: str) -> None:
    assert line in GOOD
    good.write_text(GOOD.replace(line, replacement))
    found = problems(good)
    assert any(expected in problem for problem in found), found


def test_all_mistakes_are_told_at_once(good: Path) -> None:
    good.write_text(GOOD.replace("epochs: 20", "epochs: x\n  foo: 1").replace("synthetic", "gone.beton"))
    found = problems(good, "train.global_batch_size=63", "novalue", "optim.bse_lr=1.0", world_size=2)
    for part in (
        "train.epochs",
        "train.foo",
        "gone.beton",
        "63 does not divide",
        "`novalue`",
        "did you mean `base_lr`",
    ):
        assert any(part in problem for problem in found), (part, found)


def test_override_is_blamed_on_the_command_line(good: Path) -> None:
    assert problems(good, "train.epochs=many")[0].startswith("command line `train.epochs=many`: train.epochs:")


@pytest.mark.parametrize(("world_size", "near"), [(5, "60 or 65"), (3, "63 or 66"), (128, "use 128")])
def test_batch_that_does_not_divide_is_refused_with_those_that_do(good: Path, world_size: int, near: str) -> None:
    assert near in problems(good, world_size=world_size)[0]


def test_micro_batch_must_divide_the_share_of_a_process(good: Path) -> None:
    assert "does not divide the 32 images" in problems(good, "train.micro_batch_size=10", world_size=2)[0]


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.yaml") == [f"{tmp_path}/no.yaml: no such file"]


def test_shipped_schema_is_that_of_the_code() -> None:
    shipped = (REPOSITORY / "simclr_dist" / "config.schema.json").read_text()
    assert shipped == json_schema(), "renew it: simclr-dist config schema > simclr_dist/config.schema.json"
    schema = json.loads(shipped)
    assert schema["properties"].keys() == {*Config.model_fields, "_base_"}
    # An editor asks for every key of a whole file, and for none of one that begins from another.
    assert "required" not in schema
    assert not [part for part in schema["$defs"].values() if "required" in part]
    assert schema["if"] == {"required": ["_base_"]}
    assert schema["else"]["required"] == [name for name, f in Config.model_fields.items() if f.is_required()]
    sections = {name: part["required"] for name, part in schema["else"]["properties"].items()}
    assert schema["else"]["properties"]["data"]["then"] == {"required": ["image_size"]}  # where they are images
    assert sections == {
        "data": ["train"],
        "model": ["encoder"],
        "train": ["global_batch_size", "epochs"],
    }


def test_training_refuses_a_bad_config_with_exit_code_2_and_no_traceback(good: Path) -> None:
    command = [sys.executable, "-m", "simclr_dist.train", str(good), "train.epochz=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 2
    assert "did you mean `epochs`?" in done.stderr
    assert "Traceback" not in done.stderr


def test_home_and_variables_in_paths_are_expanded(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("NOWHERE", raising=False)
    paths = ("data.train=~/x.beton", "data.test=${SCRATCH}/$USER/y.beton", "runs_dir=$SCRATCH/runs")
    config = load_config(good, paths, check_data=False)
    assert (config.data.train, config.data.test) == ("/home/me/x.beton", "/scratch/me/y.beton")
    assert config.runs_dir == "/scratch/runs"
    (problem,) = problems(good, "runs_dir=$NOWHERE/runs")
    assert problem.endswith("runs_dir: $NOWHERE/runs: the environment variable NOWHERE is not set")
    (problem,) = problems(good, "runs_dir=~nobody_of_this_name/runs")
    assert "there is no user 'nobody_of_this_name'" in problem
    odd = load_config(good, ["runs_dir='it is $HOME, 100%x~'"])
    assert odd.runs_dir == "it is $HOME, 100%x~"  # a dollar inside of a name is a dollar
    assert load_config(good, ["name=a"]).runs_dir == "runs"


def test_merged_sections_are_read_and_own_keys_win(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(GOOD + "optim: &o {base_lr: 0.5, momentum: 0.8}\n")
    both = tmp_path / "both.yaml"
    both.write_text(path.read_text() + "timeout: {<<: [{step_s: 7.0}, {step_s: 8.0, save_s: 9.0}], save_s: 10.0}\n")
    config = load_config(both)
    assert (config.timeout.step_s, config.timeout.save_s) == (7.0, 10.0)
    path.write_text(GOOD + "optim: &o {base_lr: 0.5}\nloss: {<<: *o}\n")
    (problem,) = problems(path)
    assert "loss.base_lr: unknown key" in problem
    path.write_text(GOOD + "loss: {<<: 3}\n")
    assert "<<: takes a section" in problems(path)[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("loss: &a {temperature: *a}\n", "an alias of itself"),
        ("loss: &a\n  <<: *a\n", "an alias of itself"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(
                f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
                for before, name in zip("abcde", "bcdef", strict=True)
            ),
            "more than 10,000 values",
        ),
        ("loss: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply"),
    ],
    ids=["itself", "merged into itself", "a billion", "deep"],
)
def test_a_file_that_would_never_end_is_a_problem_like_any_other(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "endless.yaml"
    path.write_text(GOOD + text)
    assert complaint in problems(path)[-1]


def test_a_configuration_comes_through_a_pipe_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=(GOOD,)).start()
    assert load_config(pipe).name == "test"
    threading.Thread(target=pipe.write_text, args=("",)).start()
    (problem,) = problems(pipe)
    assert "a pipe can be read only once" in problem


@pytest.mark.parametrize("setting", ["optim.momentum=1.0", "optim.betas=[1.0, 0.999]", "optim.betas=[0.9, 1.0]"])
def test_an_average_that_never_moves_is_refused(good: Path, setting: str) -> None:
    assert "less than 1" in problems(good, setting)[0]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A configuration that begins from two others, of which the second begins from a third."""
    (tmp_path / "own").mkdir()
    (tmp_path / "shared.yaml").write_text(GOOD + "optim: {base_lr: 0.5, betas: [0.5, 0.6]}\n")
    (tmp_path / "colours.yaml").write_text("augment: {preset: simclr_cifar, flip_p: 0.2}\noptim: {momentum: 0.7}\n")
    (tmp_path / "long.yaml").write_text("_base_: shared.yaml\ntrain: {epochs: 90}\naugment: {flip_p: 0.1}\n")
    path = tmp_path / "own" / "mine.yaml"
    path.write_text(
        "_base_: [../colours.yaml, $UP/long.yaml]\nname: mine\noptim:\n  betas: [0.7]\n  max_grad_norm: 1.0\n"
        "augment: {flip_p: null}\n"
    )
    path.write_text(path.read_text().replace("[0.7]", "[0.7, 0.8]"))
    return path


def test_a_file_begins_from_others_and_the_nearest_word_counts(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP", "..")
    config = load_config(family, ["train.global_batch_size=32", "optim={base_lr: 0.4}"])
    assert (config.name, config.model.encoder) == ("mine", "resnet_small")
    assert (config.train.epochs, config.train.global_batch_size) == (90, 32)
    assert (config.optim.base_lr, config.optim.momentum) == (0.4, 0.7)  # sections are merged, on command lines too
    assert (config.optim.betas, config.optim.max_grad_norm) == ((0.7, 0.8), 1.0)  # a list is replaced
    assert (config.augment.preset, config.augment.flip_p) == ("simclr_cifar", None)  # null is a value
    assert load_config({"_base_": str(family), "name": "of_python"}, {"train": {"epochs": 70}}).train.epochs == 70
    shared = family.parent.parent / "shared.yaml"
    both = load_config({"_base_": [str(shared), str(family)], "name": "both"})  # the same file by two ways is no circle
    assert both.optim == load_config(family).optim


def test_the_place_of_each_value_is_shown_and_blamed(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP", "..")
    up = f"{family.parent}/.."
    shown = render_with_origins(family, ["seed=3"])
    for line in (
        f"name: mine  # {family}:2",
        "seed: 3  # command line",
        f"  epochs: 90  # {up}/long.yaml:2",
        f"  encoder: resnet_small  # {up}/shared.yaml:6",
        f"  flip_p: null  # {family}:6",
        f"  momentum: 0.7  # {up}/colours.yaml:2",
        f"  betas:  # {family}:4",
        "  schedule: cosine",  # a default comes from no file
    ):
        assert line in shown.splitlines()
    copy = family.with_name("copy.yaml")
    copy.write_text(shown)
    assert load_config(copy) == load_config(family, ["seed=3"])
    (family.parent.parent / "shared.yaml").write_text(GOOD.replace("epochs: 20", "epoch: 20"))
    family.write_text(family.read_text() + "loss: {temperature: -1}\n")
    found = problems(family)
    assert found[1].startswith(f"{up}/shared.yaml:9: train.epoch: unknown key; did you mean `epochs`?")
    assert found[0].startswith(f"{family}:7: loss.temperature: ")


def test_what_is_kept_for_a_job_is_one_file(family: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP", "..")
    family.write_text(family.read_text() + "runs_dir: $SCRATCH/runs\nresume: '1.5e3'\n")
    kept = compose_config(family)
    assert kept is not None
    assert compose_config(good) is None  # stands for itself, with its comments
    copy = family.with_name("kept.yaml")
    copy.write_text(kept)
    monkeypatch.setenv("SCRATCH", "/here")
    before = load_config(family)
    for name in ("shared", "long", "colours"):
        (family.parent.parent / f"{name}.yaml").unlink()
    assert load_config(copy) == before
    assert before.resume == "1.5e3"  # text stays text
    monkeypatch.setenv("SCRATCH", "/there")
    assert load_config(copy).runs_dir == "/there/runs"  # a variable is that of the place where the job runs


def test_a_base_that_cannot_be_is_refused_by_name(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "child.yaml"

    def complaint(text: str, *overrides: str) -> str:
        path.write_text(text)
        (problem,) = problems(path, *overrides)
        return problem

    gone = complaint("name: x\n_base_: gone.yaml\n")
    assert gone.startswith(f"{path}:2: _base_: {tmp_path}/gone.yaml does not exist")
    other = tmp_path / "other.yaml"
    other.write_text("_base_: child.yaml\n")
    circle = complaint("_base_: [good.yaml, other.yaml]\n")
    assert circle == f"{other}:1: _base_: a file cannot begin from itself: {path} -> {other} -> {path}"
    assert "cannot begin from itself" in complaint("_base_: child.yaml\n")
    for number in range(12):
        (tmp_path / f"{number}.yaml").write_text(f"_base_: {number + 1}.yaml\n")
    assert "more than 8 files in a row" in complaint("_base_: 0.yaml\n")
    for number in range(7):  # two ways at each of seven: 10**7 files
        names = ", ".join(f"w{number + 1}.yaml" for _ in range(10))
        (tmp_path / f"w{number}.yaml").write_text(f"_base_: [{names}]\n")
    (tmp_path / "w7.yaml").write_text("optim: {momentum: 0.5}\n")
    assert "more than 64 files" in complaint("_base_: w0.yaml\n")
    for wrong in ("3", "[]", "[good.yaml, 3]", "null", "{a: b}"):
        assert complaint(f"_base_: {wrong}\n").endswith("expected the name of a file, or a list of them")
    assert "NOWHERE_AT_ALL is not set" in complaint("_base_: $NOWHERE_AT_ALL/x.yaml\n")
    assert "cannot be read" in complaint("_base_: ./\n")
    inner = complaint("_base_: good.yaml\nloss: {_base_: good.yaml}\n")
    assert inner == f"{path}:2: loss._base_: can only stand at the top of a file"
    assert "can only stand in a file" in complaint("_base_: good.yaml\n", "_base_=good.yaml")
