"""docs/guides/extending.md: what examples/own_parts.py shows is right, and trains, resumes, evaluates and exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.own_parts import AlignmentAndUniformity, Occluded
from simclr_dist.config import AugmentConfig, ModelConfig
from simclr_dist.data import Batch
from simclr_dist.errors import ConfigError
from simclr_dist.network import encoders
from simclr_dist.views.augment import Augment
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks
from tests.fork_server import ModuleProcess


def run(*arguments: str) -> str:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = ModuleProcess("examples.own_parts", list(arguments), env)
    assert process.wait(200) == 0, process.output()
    return process.output()


def test_own_encoder_views_and_loss_train_resume_evaluate_and_export(tmp_path: Path) -> None:
    train = ("train", "configs/smoke.yaml", "model.encoder=patches", f"runs_dir={tmp_path}", "name=own")
    run(*train, "train.max_steps=4")
    assert "resumes at step 4" in run(*train, "train.max_steps=6")
    losses = [json.loads(line).get("train/loss") for line in (tmp_path / "own" / "log.jsonl").read_text().splitlines()]
    # Uniformity is at most 0 and alignment small: no NT-Xent of 128 rows is below its own bound.
    assert all(loss < 1 for loss in losses if loss is not None)
    run("evaluate", "knn", str(tmp_path / "own"), "--no-cache")
    assert json.loads((tmp_path / "own" / "evaluations.jsonl").read_text())["method"] == "knn"
    run("export", str(tmp_path / "own"), "--format", "safetensors", "--out", str(tmp_path / "own.safetensors"))
    assert (tmp_path / "own.safetensors").stat().st_size > 1000


def by_the_book(z: Tensor) -> Tensor:
    """Alignment and uniformity of one process with all rows [2G, K], by autograd."""
    z = F.normalize(z, dim=1)
    view0, view1 = z.chunk(2)
    distances = torch.pdist(z).square()
    return (view0 - view1).square().sum(1).mean() + torch.log(torch.exp(-2 * distances).mean())


def value_and_gradient(rank: int, world_size: int, rows: list) -> tuple[float, list]:
    """Of this rank's images, as DDP would have it after its average (the loss hands over W times as much)."""
    mine = torch.tensor(rows, dtype=torch.float64)[:, rank::world_size].flatten(0, 1).requires_grad_()
    loss = AlignmentAndUniformity()(mine, torch.arange(len(mine) // 2))
    loss.backward()
    assert mine.grad is not None
    return float(loss.detach()), (mine.grad / world_size).view(2, -1, mine.shape[1]).tolist()


@pytest.mark.distributed
def test_gradient_of_the_own_loss_is_that_of_one_process() -> None:
    rows = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = rows.flatten(0, 1).requires_grad_()
    expected = by_the_book(z)
    expected.backward()
    assert z.grad is not None
    for rank, (value, gradient) in enumerate(run_ranks(2, value_and_gradient, rows.tolist())):
        assert value == pytest.approx(float(expected.detach()), abs=1e-12)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), z.grad.view(2, 6, 5)[:, rank::2])


def test_own_views_are_the_same_however_a_batch_is_divided() -> None:
    images = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    ids = torch.arange(8) * 7

    def views(part: slice) -> Tensor:
        augment = Occluded(Augment(AugmentConfig(preset="simclr_cifar"), 3, 32), seed=3)
        return augment(Batch(images[:, part], ids[part], ids[part], epoch=1))

    whole = views(slice(0, 8)).clone()
    assert torch.equal(whole[:, 4:], views(slice(4, 8)))
    hidden = (whole == 0).all(dim=2).sum(dim=(2, 3))  # zero is the mean colour; no other pixel is it exactly
    assert np.array_equal(hidden.numpy(), np.full((2, 8), 64))


def test_a_script_written_for_0_1_0_finds_its_imports() -> None:
    """The imports of examples/own_parts.py in that version; the package alone needs no torch."""
    script = """
        import sys
        import simclr_dist
        assert "torch" not in sys.modules
        from simclr_dist import cli, distributed, encoders, train
        from simclr_dist.config import Config, ModelConfig
        from simclr_dist.data import Batch
        from simclr_dist.data.randomness import keys, uniform
        from simclr_dist.trainer import Trainer
        from simclr_dist.encoders import build_encoder  # what model cards of 0.1.0 show
        from simclr_dist.model import build_model  # what its guide shows
        assert not hasattr(simclr_dist, "nothing")
        print(encoders.register.__module__, distributed.all_gather.__module__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["simclr_dist.network.encoders", "simclr_dist.parallel.distributed"]


def test_a_registered_name_is_known_and_a_taken_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_REGISTERED", {})
    with pytest.raises(ConfigError, match="unknown encoder 'mine'"):
        encoders.build_encoder(ModelConfig(encoder="mine"))
    encoders.register("mine", lambda config: (torch.nn.Flatten(), 3 * config.width))
    assert encoders.build_encoder(ModelConfig(encoder="mine", width=5))[1] == 15
    for name in ("resnet50", "timm/mine", "resnet_small"):
        with pytest.raises(ValueError, match="is taken"):
            encoders.register(name, lambda config: (torch.nn.Flatten(), 1))
