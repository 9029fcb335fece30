"""The probe beside the encoder: a plain linear classifier, and invisible to pretraining."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.evaluation.online_probe import LEARNING_RATE, OnlineProbe
from tests.distributed.spawn import run_ranks
from tests.training import Training

D, C, STEPS = 12, 7, 6


def batches(num_images: int) -> list[tuple[Tensor, Tensor]]:
    """h [2B, D] and labels [B] of some steps; a third of the images has no label."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(-3, C, (num_images,), generator=generator).clamp_min(-1) for _ in range(STEPS)]
    return [(torch.randn(2 * num_images, D, generator=generator), y) for y in labels]


def trained(steps: list[tuple[Tensor, Tensor]]) -> OnlineProbe:
    probe = OnlineProbe(D, C, "cpu")
    for h, labels in steps:
        probe.update(h, labels)
    return probe


def test_it_is_adam_on_the_mean_cross_entropy_of_labelled_views() -> None:
    probe, linear = OnlineProbe(D, C, "cpu"), nn.Linear(D, C)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    adam = torch.optim.Adam(linear.parameters(), lr=LEARNING_RATE)
    for h, labels in batches(20):
        probe.update(h.requires_grad_(), labels)
        assert h.grad is None
        adam.zero_grad()
        F.cross_entropy(linear(h.detach()), torch.cat([labels, labels]), ignore_index=-1).backward()
        adam.step()
    torch.testing.assert_close(probe.weight, linear.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(probe.bias, linear.bias, rtol=1e-5, atol=1e-7)


def test_accuracy_is_that_of_labelled_views_before_they_are_learnt_from() -> None:
    probe = trained(batches(20))
    probe.recent_accuracy()
    h, labels = batches(50)[0]
    logits, y = (h @ probe.weight.T + probe.bias).detach(), torch.cat([labels, labels])
    rank_of_label = [int((row > row[k]).sum()) for row, k in zip(logits, y.tolist(), strict=True) if k >= 0]
    expected = [sum(r < k for r in rank_of_label) / len(rank_of_label) for k in (1, 5)]
    assert probe.top1(h, y) == pytest.approx(expected[0])
    probe.update(h, labels)
    assert probe.recent_accuracy() == pytest.approx(expected)
    assert all(map(math.isnan, probe.recent_accuracy()))  # nothing since


def test_without_any_label_it_stays_as_it_is() -> None:
    probe = OnlineProbe(D, C, "cpu")
    probe.update(torch.randn(8, D), torch.full((4,), -1))
    assert not probe.weight.any()
    assert math.isnan(probe.recent_accuracy()[0])


def _share_of_rank(rank: int, world_size: int) -> list[bytes]:
    shares = []
    for h, labels in batches(20):
        views = h.unflatten(0, (2, world_size, -1))[:, rank].flatten(0, 1)
        shares.append((views, labels.unflatten(0, (world_size, -1))[rank]))
    probe = trained(shares)
    return [t.numpy().tobytes() for t in (*probe.state_dict().values(), torch.tensor(probe.recent_accuracy()))]


@pytest.mark.distributed
def test_ranks_together_learn_what_one_process_learns() -> None:
    first, second = run_ranks(2, _share_of_rank)
    assert first == second
    alone = trained(batches(20))
    found = torch.frombuffer(bytearray(first[0]), dtype=torch.float32).view(C, D)
    torch.testing.assert_close(found, alone.weight.detach(), rtol=1e-5, atol=1e-7)
    assert torch.frombuffer(bytearray(first[-1]), dtype=torch.float32).tolist() == pytest.approx(
        alone.recent_accuracy()
    )


def test_a_saved_probe_goes_on_with_the_same_bytes() -> None:
    steps = batches(20)
    for at in (0, 3):
        saved = {name: value.clone() for name, value in trained(steps[:at]).state_dict().items()}
        again = OnlineProbe(D, C, "cpu")
        again.load_state_dict(saved)
        for h, labels in steps[at:]:
            again.update(h, labels)
        whole = trained(steps).state_dict()
        assert again.state_dict().keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in again.state_dict().items())


def test_the_state_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of the online probe: expected the shape \(8, 12\), found \(7, 12\)"):
        OnlineProbe(D, C + 1, "cpu").load_state_dict(OnlineProbe(D, C, "cpu").state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# In training


def probe_figures(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    figures: dict[int, dict[str, float]] = {}
    for line in lines:
        if found := {tag: value for tag, value in line.items() if "probe" in tag}:
            figures.setdefault(line["step"], {}).update(found)
    return figures


def probe_bytes(run_dir: Path) -> bytes:
    return (sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "online_probe.safetensors").read_bytes()


@pytest.mark.distributed
def test_it_leaves_pretraining_alone_and_resumes_exactly(images: Path, tmp_path: Path) -> None:
    settings = ("train.micro_batch_size=16", "monitor.log_every_steps=4", f"data.test={images}")
    settings += ("optim.optimizer=adamw", "optim.lr_scaling=none")  # micro-batches and AdamW resume exactly too
    settings += ("evaluation.knn_every_epochs=3", "evaluation.knn_k=5")
    without = Training(images, tmp_path, "without", *settings, world_size=2)
    assert without.wait() == [0, 0], without.output
    whole = Training(images, tmp_path, "whole", "evaluation.online_probe=true", *settings, world_size=2)
    assert whole.wait() == [0, 0], whole.output
    assert whole.final_bytes() == without.final_bytes()

    parts = Training(images, tmp_path, "parts", "evaluation.online_probe=true", *settings, world_size=2)
    parts.wait_until(lambda: parts.has_logged(4))
    parts.ranks[1].send_signal(signal.SIGTERM)
    assert parts.wait() == [0, 0], parts.output
    stopped_at = int(parts.status()["step"])  # type: ignore[call-overload]
    parts = Training(images, tmp_path, "parts", "evaluation.online_probe=true", *settings, world_size=2)
    assert parts.wait() == [0, 0], parts.output
    assert f"resumes at step {stopped_at}" in parts.output[0]
    assert probe_figures(parts.run_dir) == probe_figures(whole.run_dir)
    assert probe_bytes(parts.run_dir) == probe_bytes(whole.run_dir)
    assert parts.final_bytes() == whole.final_bytes()

    figures = probe_figures(whole.run_dir)
    assert list(figures) == [4, 8, 12, 16, 20, 24]
    assert 0 < figures[24]["train/probe_top1"] <= figures[24]["train/probe_top5"] == 1  # of four classes
    assert 0 < figures[24]["eval/probe_top1"] <= 1


def test_it_can_be_switched_on_and_off_between_starts(images: Path, tmp_path: Path) -> None:
    for end, setting in ((8, "false"), (16, "true"), (24, "false")):
        part = Training(images, tmp_path, "changing", f"train.max_steps={end}", f"evaluation.online_probe={setting}")
        assert part.wait() == [0], part.output
    assert min(probe_figures(part.run_dir)) == 9
    assert max(probe_figures(part.run_dir)) == 16


def test_images_without_classes_are_refused(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one_class"
    shutil.copytree(images.with_suffix("") / "class0", folder / "only")
    training = Training(folder, tmp_path, "one", "evaluation.online_probe=true", "data.loader=folder")
    assert training.wait() == [2]
    assert "evaluation.online_probe: the labels of" in training.output[0]
    assert "name 1 classes" in training.output[0]
    assert "Traceback" not in training.output[0]
