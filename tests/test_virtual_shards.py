"""`train.virtual_shards`: the same bytes on any number of processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training import Training

SHARDED = (
    *("train.virtual_shards=4", "model.batch_norm=per_shard", "train.precision=fp32", "train.global_batch_size=16"),
    *("data.image_size=16", "model.width=8", "model.head_hidden_dim=32"),
)
CASES = {
    "resnet, lars": ("optim.optimizer=lars", "optim.base_lr=3"),
    "dropout, adamw, learnt temperature": (
        *("model.encoder=mixed", "model.head_batch_norm=none", "optim.optimizer=adamw"),
        "loss.learn_temperature=true",
    ),
}
MODULE = "tests.random_layers_train"


@pytest.mark.distributed
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_one_two_and_four_processes_end_with_the_same_bytes_changes_and_kills_included(
    images: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    settings = (*SHARDED, *settings, "train.epochs=20", "train.max_steps=200")
    whole = {}
    for world_size in (1, 2, 4):
        whole[world_size] = Training(
            images, tmp_path, f"on{world_size}", *settings, world_size=world_size, module=MODULE
        )
        assert whole[world_size].wait() == [0] * world_size, whole[world_size].output
    alone = whole[1].final_bytes(), whole[1].losses()
    assert len(alone[1]) == 200
    assert (whole[2].final_bytes(), whole[2].losses()) == alone
    assert (whole[4].final_bytes(), whole[4].losses()) == alone
