"""What can be known before the first step is known before anything is built, and said once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simclr_dist.config import Config, ModelConfig, load_config
from simclr_dist.errors import CheckpointError, ConfigError, OwnershipError
from simclr_dist.network import trial
from simclr_dist.network.inputs import images as images_of
from simclr_dist.network.trial import try_model
from simclr_dist.run.owner import claim
from simclr_dist.training import preflight
from simclr_dist.training.agent import check
from simclr_dist.training.network_facts import network_facts
from simclr_dist.training.preflight import Checked, check_training
from tests import own_encoder_train
from tests.conftest import REPOSITORY
from tests.launcher_checkout import make_real_checkout
from tests.training import TINY, Training

QUICK = ("train.max_steps=2", "checkpoint.every_min=null", "monitor.image_pairs=0")


def configured(images: Path, runs_dir: Path, *overrides: str, name: str = "run") -> Config:
    settings = [*TINY, f"data.train={images}", f"runs_dir={runs_dir}", f"name={name}", *overrides]
    return load_config(REPOSITORY / "configs" / "smoke.yaml", settings)


def test_a_parameter_without_gradient_is_found_and_the_random_state_is_left_alone() -> None:
    assert own_encoder_train  # has registered its encoders
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tried = try_model(ModelConfig(encoder="with_spare"), images_of(32))
    assert tried.unused == ("encoder.spare.weight", "encoder.spare.bias")
    assert "2 of the network's trainable parameters" in tried.remark
    assert try_model(ModelConfig(encoder="resnet_small", head_layers=3), images_of(32)).unused == ()
    with pytest.raises(ConfigError, match=r"broken cannot take images of 32 px; choose another encoder \(RuntimeError"):
        try_model(ModelConfig(encoder="broken"), images_of(32))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_cannot_take_the_images_is_named_with_a_size_that_it_can() -> None:
    with pytest.raises(ConfigError, match=r"alexnet cannot take images of 32 px; it runs with data\.image_size=64"):
        try_model(ModelConfig(encoder="alexnet"), images_of(32))


def test_networks_that_read_values_while_they_are_built_are_tried_too() -> None:
    tried = try_model(ModelConfig(encoder="regnet_y_400mf"), images_of(64))
    assert tried.unused == ()
    assert all(parameter.is_meta for parameter in tried.network.parameters())


def test_a_network_for_one_size_is_evaluated_at_no_other_and_a_setting_without_effect_is_named(
    images: Path, tmp_path: Path
) -> None:
    def at(encoder: str, image_size: int) -> None:
        check_training(configured(images, tmp_path, f"model.encoder={encoder}", f"evaluation.image_size={image_size}"))

    said = check_training(configured(images, tmp_path, "model.head_layers=1", "evaluation.image_size=48")).remarks
    assert said == ("model.head_layers=1: this setting changes nothing with it: model.head_hidden_dim=128",)
    at("regnet_y_400mf", 64)  # which reads values while it is built
    with pytest.raises(ConfigError, match=r"evaluation.image_size: 48, but vit_b_16 is built for images of 32 px"):
        at("vit_b_16", 48)
    pytest.importorskip("timm")
    at("timm/vit_tiny_patch16_224", 32)
    with pytest.raises(ConfigError, match=r"evaluation.image_size: 48, but timm/vit_tiny\S+ is built for images of 32"):
        at("timm/vit_tiny_patch16_224", 48)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unused_parameter_is_named_on_any_number_of_processes_and_trains_on(
    images: Path, tmp_path: Path, world_size: int
) -> None:
    training = Training(
        *(images, tmp_path, "run", *QUICK, "model.encoder=with_spare"),
        world_size=world_size,
        module="tests.own_encoder_train",
    )
    assert training.wait() == [0] * world_size, training.output
    assert "".join(training.output).count("encoder.spare.weight, encoder.spare.bias") == 1


def test_all_problems_are_one_message(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    config = configured(images, tmp_path, "train.global_batch_size=1024")
    with pytest.raises(ConfigError) as caught:
        check_training(config)
    assert "MiB are free" in str(caught.value)
    assert "fewer than one global batch of 1024" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean"):
        check_training(configured(images, tmp_path, "model.encoder=resnet_smal"))
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_is_taken_or_cannot_be_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        check_training(configured(images, tmp_path / "file"))
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    with pytest.raises(OwnershipError, match="already being trained"):
        check_training(configured(images, tmp_path))


def test_settings_that_cannot_go_on_are_refused_without_reading_a_tensor(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", *QUICK)
    assert training.wait() == [0], training.output
    assert check_training(configured(images, tmp_path, *QUICK)) == Checked()
    assert check_training(configured(images, tmp_path, *QUICK, "train.precision=auto")) == Checked()
    for tensors in training.run_dir.glob("checkpoints/*/*.safetensors"):
        tensors.unlink()
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        check_training(configured(images, tmp_path, *QUICK, "seed=1"))
    with pytest.raises(CheckpointError, match="fingerprint"):
        check_training(configured(images, tmp_path, *QUICK, "data.train=synthetic"))
    with pytest.raises(ConfigError, match="nothing is left to train with other settings"):
        check_training(configured(images, tmp_path, *QUICK, "loss.temperature=0.9"))
    with pytest.raises(ConfigError, match="already has checkpoints"):
        check_training(configured(images, tmp_path, *QUICK, "resume=none"))


def test_workers_believe_only_what_was_found_for_their_own_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMCLR_ATTEMPT", "local_1.0-abcdef")
    monkeypatch.delenv(preflight.CHECKED, raising=False)
    assert Checked.from_environment() is None
    monkeypatch.setenv(preflight.CHECKED, "not json")
    assert Checked.from_environment() is None
    found = Checked(("encoder.spare",), ("a remark",))
    found.to_environment()
    assert Checked.from_environment() == found
    monkeypatch.setenv("SIMCLR_ATTEMPT", "local_2.0-abcdef")
    assert Checked.from_environment() is None


def test_two_ranks_say_once_what_is_wrong(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", "model.encoder=resnet99", world_size=2)
    assert training.wait() == [2, 2]
    printed = "".join(training.output)
    assert printed.count("unknown encoder 'resnet99'") == 1
    assert "Traceback" not in printed
    assert not training.run_dir.exists()


def test_the_agent_ends_before_it_starts_anything(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIMCLR_EXPECTED_WORLD_SIZE", "3")
    (tmp_path / "run").mkdir()
    smoke = str(REPOSITORY / "configs" / "smoke.yaml")
    with pytest.raises(SystemExit) as left:
        check(tmp_path / "run", [smoke, f"runs_dir={tmp_path}", "name=run"])
    assert left.value.code == 2
    assert "does not divide over 3 processes" in capsys.readouterr().err
    assert '"config_error"' in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.slow
def test_the_launcher_prints_one_message_and_offers_no_useless_command(tmp_path: Path) -> None:
    checkout = make_real_checkout(tmp_path / "real")
    done = checkout.launch("local", "configs/smoke.yaml", "--nproc", "2", "model.encoder=resnet99")
    assert done.returncode == 2
    assert done.stderr.count("unknown encoder 'resnet99'") == 1
    for words in ("Traceback", "continue with", "resume"):
        assert words not in done.stderr
    assert "starts at step" not in done.stdout
    missing = checkout.launch("local", "configs/smoke.yaml", "--nproc", "2", f"data.train={sys.executable}")
    assert missing.returncode == 4
    assert "Traceback" not in missing.stderr


def test_a_network_is_tried_once_and_its_code_and_settings_count(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tries: list[str] = []
    sound = trial.try_model
    monkeypatch.setattr(trial, "try_model", lambda *args: (tries.append(args[0].encoder), sound(*args))[1])
    small = configured(images, tmp_path)
    first = network_facts(small)
    assert network_facts(small) == first
    assert tries == ["resnet_small"]
    network_facts(configured(images, tmp_path, "model.width=8"))
    assert len(tries) == 2
    for _ in range(2):  # one's own code may change between two starts
        assert network_facts(configured(images, tmp_path, "model.encoder=with_spare")).unused
    assert len(tries) == 4
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text('{"unused": 3}')
    assert network_facts(small) == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert network_facts(small) == first


@pytest.mark.slow
def test_a_known_network_needs_no_import_of_its_library(images: Path, tmp_path: Path) -> None:
    """torchvision takes longer to import than all checks together."""
    code = (
        "import sys\n"
        "from simclr_dist.config import load_config\n"
        f"config = load_config({str(REPOSITORY / 'configs' / 'smoke.yaml')!r}, ['runs_dir={tmp_path}'])\n"
        "from simclr_dist.training.preflight import check_training\n"
        "check_training(config)\n"
        "print('torchvision' in sys.modules)\n"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [done.stdout.strip() for done in said] == ["True", "False"]


@pytest.mark.distributed
@pytest.mark.parametrize("node", [0, 1])
def test_nodes_need_not_all_know_what_was_checked(images: Path, tmp_path: Path, node: int) -> None:
    """Only the first node's agent checks, and tells only its own workers."""
    training = Training(
        *(images, tmp_path, "nodes", "train.max_steps=2"),
        world_size=2,
        module="tests.faulty_train",
        FAULT=f"checked {node} 0",
    )
    assert training.wait(60) == [0, 0], training.output
