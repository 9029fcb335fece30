"""Interrupted anywhere, by anything: the same bytes. With other numbers of processes: the same curve.

Each case has what could spoil it: layer-wise rates and global statistics, random depth and bf16. Micro-batches with
AdamW: tests/test_online_probe.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training import STEPS, Training

LAYERS_WITH_MUON = (
    *("optim.optimizer=muon", "optim.muon_ns_steps=3", "optim.lr_scaling=none", "optim.base_lr=0.003"),
    *("optim.adamw_base_lr=0.001", "optim.layer_decay=0.8", "optim.encoder_lr_scale=0.5"),
)
CASES = [
    pytest.param(
        2,
        ((4, signal.SIGTERM), (10, signal.SIGKILL), (16, signal.SIGUSR1)),
        ("optim.optimizer=lars", "optim.base_lr=0.2"),
        id="lars, global BatchNorm",
    ),
    pytest.param(
        1,
        ((11, signal.SIGKILL),),
        ("train.precision=fp16", *LAYERS_WITH_MUON),
        id="fp16's loss scale, muon, rates by layer",
    ),
    pytest.param(  # efficientnet_b0 drops whole layers at random
        1,
        ((5, signal.SIGKILL),),
        (
            *("model.encoder=efficientnet_b0", "model.stem=imagenet", "train.precision=bf16"),
            *("train.global_batch_size=8", "train.max_steps=8"),
        ),
        id="stochastic depth, bf16",
        marks=pytest.mark.slow,
    ),
]
OFTEN = "checkpoint.every_steps=3"


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "interruptions", "settings"), CASES)
def test_interrupted_by_everything_ends_with_the_same_bytes(
    images: Path, tmp_path: Path, world_size: int, interruptions: tuple, settings: tuple[str, ...]
) -> None:
    undisturbed = Training(images, tmp_path, "undisturbed", *settings, world_size=world_size)
    assert undisturbed.wait() == [0] * world_size, undisturbed.output
    for at_step, number in interruptions:
        part = Training(images, tmp_path, "disturbed", OFTEN, *settings, world_size=world_size)
        part.wait_until(lambda part=part, step=at_step: part.has_logged(step))  # type: ignore[misc]
        part.ranks[-1].send_signal(number)
        codes = part.wait()
        assert (codes == [0] * world_size) == (number != signal.SIGKILL), part.output
    last = Training(images, tmp_path, "disturbed", OFTEN, *settings, world_size=world_size)
    assert last.wait() == [0] * world_size, last.output
    assert "resumes at step" in last.output[0]
    assert last.final_bytes() == undisturbed.final_bytes()
    assert last.losses() == undisturbed.losses()


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [(), LAYERS_WITH_MUON], ids=["sgd", "muon, rates by layer"])
def test_one_two_four_and_one_process_again_have_the_curve_of_one(
    images: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    alone = Training(images, tmp_path, "alone", *settings)
    assert alone.wait() == [0], alone.output
    for end, world_size in ((6, 1), (12, 2), (18, 4), (STEPS, 1)):  # in the middle of epochs of 8 steps
        part = Training(images, tmp_path, "elastic", f"train.max_steps={end}", *settings, world_size=world_size)
        assert part.wait() == [0] * world_size, part.output
    assert part.losses() == pytest.approx(alone.losses(), rel=1e-4)
    assert len(part.losses()) == STEPS
