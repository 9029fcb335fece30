"""`train.virtual_shards`: the same bytes on any number of processes."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError
from simclr_dist.loss import NTXentLoss
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.optim.virtual_shards import TreeSum, VirtualShards
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks
from tests.shards_train import STEPS, VARIANTS
from tests.training import Training

SHARDED = (
    *("train.virtual_shards=4", "model.batch_norm=per_shard", "train.precision=fp32", "train.global_batch_size=16"),
    *("data.image_size=16", "model.width=8", "model.head_hidden_dim=32"),
)


def all_bytes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of all tensors of the newest checkpoint."""
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}


@pytest.mark.distributed
def test_one_two_and_four_processes_end_with_the_same_bytes(images: Path, tmp_path: Path) -> None:
    runs = {}
    for world_size in (1, 2, 4):
        runs[world_size] = Training(
            *(images, tmp_path, f"on{world_size}", *SHARDED, f"train.max_steps={STEPS}"),
            world_size=world_size,
            module="tests.shards_train",
            OMP_NUM_THREADS=str(3 - world_size // 2),  # a setting of the machine that must not matter
        )
        assert runs[world_size].wait() == [0] * world_size, runs[world_size].output
    for at, name in enumerate(VARIANTS):
        found = {}
        for world_size, training in runs.items():
            training.run_dir = tmp_path / f"on{world_size}-{at}"
            found[world_size] = all_bytes(training.run_dir), training.losses()
        assert len(found[1][1]) == STEPS
        assert ("online_probe.safetensors" in found[1][0]) == ("probe" in name)
        assert found[2] == found[1], name
        assert found[4] == found[1], name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        pytest.param(20, ("optim.optimizer=lars", "optim.base_lr=3"), id="lars"),
        pytest.param(200, ("optim.optimizer=lars", "optim.base_lr=3"), id="lars, long", marks=pytest.mark.slow),
        pytest.param(
            200,
            ("optim.optimizer=adamw", "model.encoder=mixed", "model.head_batch_norm=none"),
            id="adamw, dropout, long",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_kill_and_other_numbers_of_processes_in_mid_run_end_with_the_bytes_of_one(
    images: Path, tmp_path: Path, steps: int, settings: tuple[str, ...]
) -> None:
    settings = (*SHARDED, *settings, "train.epochs=20", f"checkpoint.every_steps={steps // 4 - 1}")

    def part(name: str, world_size: int, end: int) -> Training:
        return Training(
            *(images, tmp_path, name, *settings, f"train.max_steps={end}"),
            world_size=world_size,
            module="tests.random_layers_train",
        )

    alone = part("alone", 1, steps)
    assert alone.wait() == [0], alone.output
    for world_size, end in ((2, steps // 4), (4, steps // 2), (1, steps)):
        changing = part("changing", world_size, end)
        if world_size == 4:
            changing.wait_until(lambda: changing.has_logged(steps // 4 + 2))  # noqa: B023
            changing.ranks[-1].send_signal(signal.SIGKILL)
            changing.wait()
            changing = part("changing", 2, end)
        assert changing.wait() == [0] * len(changing.ranks), changing.output
    assert all_bytes(changing.run_dir) == all_bytes(alone.run_dir)
    assert changing.losses() == alone.losses()
    assert "the same bytes on any power of two of processes up to 4" in alone.output[0]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
    )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradient_and_statistics_are_those_of_micro_batches(momentum: float | None) -> None:
    views, ids = torch.randn(2, 8, 3, 6, 6), torch.arange(8) // 2
    ours, theirs = network(momentum), network(momentum)
    nt_xent = NTXentLoss(learn_temperature=True)
    loss = VirtualShards(ours, 4).backward(views, ids, nt_xent, begin_shard=torch.manual_seed)
    expected_temperature, nt_xent.log_temperature.grad = nt_xent.log_temperature.grad, None
    expected = backward_in_micro_batches(theirs, views, lambda z: nt_xent(z, ids), micro_batch_size=2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nt_xent.log_temperature.grad, expected_temperature)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad is not None
        assert a.grad.stride() == a.stride()
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert ours[1].momentum == momentum


def _tree(rank: int, world_size: int) -> list[float]:
    """The sum of eight numbers whose order matters, added up by the ranks together; in several lengths."""
    found = []
    for length in (1, 3, 8):
        total = TreeSum()
        for shard in range(8 // world_size * rank, 8 // world_size * (rank + 1)):
            total.add(_term(shard, length))
        found += total.total().tolist()
    return found


def _term(shard: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(shard)) * 10**shard


@pytest.mark.distributed
def test_a_sum_is_added_along_one_tree_on_any_number_of_ranks() -> None:
    expected = []
    for length in (1, 3, 8):
        a, b, c, d, e, f, g, h = (_term(shard, length) for shard in range(8))
        expected += (((a + b) + (c + d)) + ((e + f) + (g + h))).tolist()
    for world_size in (1, 2, 4):
        for found in run_ranks(world_size, _tree):
            assert found == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def config_with(*settings: str, world_size: int | None = None) -> Config:
    return load_config(REPOSITORY / "configs" / "smoke.yaml", [*SHARDED, *settings], world_size=world_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.virtual_shards=6",), r"train.virtual_shards \(6\) must be a power of two"),
        (("train.virtual_shards=32",), r"train.global_batch_size \(16\) does not divide into 32 train.virtual_shards"),
        (("model.batch_norm=global",), "set model.batch_norm=per_shard, found global"),
        (("model.batch_norm=per_device",), "set model.batch_norm=per_shard, found per_device"),
        (("train.virtual_shards=null",), "model.batch_norm=per_shard needs train.virtual_shards"),
        (("train.micro_batch_size=2",), "shards are micro-batches: leave train.micro_batch_size out"),
        (("train.precision=auto",), "train.precision=auto is decided by a measurement: set fp32, bf16 or fp16"),
    ],
)
def test_settings_that_cannot_be_had_are_refused_by_name(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(*settings)


@pytest.mark.parametrize("world_size", [3, 8])
def test_processes_that_shards_do_not_divide_over_are_refused(images: Path, tmp_path: Path, world_size: int) -> None:
    settings = ("train.global_batch_size=48", "train.virtual_shards=4")
    with pytest.raises(ConfigError, match=f"4 shards do not divide over {world_size} processes; use a power of two"):
        config_with(*settings, world_size=world_size)
    if world_size == 3:
        started = Training(images, tmp_path, "three", *SHARDED, *settings, world_size=3)
        assert started.wait() == [2] * 3
        assert "4 shards do not divide over 3 processes" in "".join(started.output)
        assert "Traceback" not in "".join(started.output)
