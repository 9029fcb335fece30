"""Configuration: every mistake is named with file, line and key, all of them at once, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from simclr_dist.config import Config, json_schema, load_config, render_config
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
    assert json.loads(shipped)["properties"].keys() == Config.model_fields.keys()


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
