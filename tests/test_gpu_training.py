"""Training on a GPU: every mode takes the CPU's step, no operation that waits for the device, exact resume, export.

The bodies run on the CPU as well, except for what only CUDA has.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.config import load_config
from simclr_dist.export.export import export
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model
from simclr_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.devices import CUDA, needs_cuda, on_every_device, unwritten_memory_is_nan
from tests.distributed.spawn import run_ranks
from tests.training import Training, write_images

SMALL = (
    "data.test=null",
    "evaluation.knn_every_epochs=null",
    "monitor.image_pairs=0",
    "monitor.log_every_steps=1",
    "optim.warmup_epochs=0.0",
    "optim.base_lr=0.01",
)
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTrainer]:
    """A trainer of configs/smoke.yaml in this process. accelerate's settings are global: each starts afresh."""

    def make(device: str, name: str, *overrides: str) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true" if device == "cpu" else "false")
        overrides = (*SMALL, f"name={name}", f"runs_dir={tmp_path}", *overrides)
        trainer = Trainer(load_config(REPOSITORY / "configs" / "smoke.yaml", overrides))
        assert trainer.parts.device.type == device
        assert trainer.parts.implementations["augment"] == {"cpu": "numba", "cuda": "triton"}[device]
        assert trainer.parts.implementations["loss"] == {"cpu": "tiled", "cuda": "triton"}[device]
        return trainer

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def first_step(trainer: Trainer) -> tuple[float, Tensor]:
    """Loss, and how the first update moved the parameters."""
    before = torch.cat([p.detach().flatten() for p in trainer.parts.network.parameters()]).cpu()
    with trainer.parts.loader, trainer.parts.monitor:
        batches = trainer.parts.loader.batches(0)
        loss = trainer.train_step(next(batches)).loss
        batches.close()
    after = torch.cat([p.detach().flatten() for p in trainer.parts.network.parameters()]).cpu()
    return float(loss), after - before


# mode -> (overrides, devices, tolerance of the loss, of the update: relative, by norm)
MODES = {
    "fp32": ((), "both", 1e-4, 2e-2),
    "bf16": (("train.precision=bf16",), "both", 2e-2, 0.25),
    "fp16": (("train.precision=fp16",), "cuda", 5e-3, 0.1),
    "contiguous": (("train.channels_last=false",), "both", 1e-4, 2e-2),
    "compiled": (("train.compile=true",), "cuda", 1e-3, 2e-2),
    "compiled bf16": (("train.compile=true", "train.precision=bf16"), "cuda", 2e-2, 0.25),
}
CASES = [
    pytest.param(device, mode, marks=needs_cuda if device == "cuda" else [], id=f"{device}-{mode}")
    for mode, (_, devices, _, _) in MODES.items()
    for device in ("cpu", "cuda")
    if devices in ("both", device) and (device, mode) != ("cpu", "fp32")
]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # both are of torch.compile
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(("device", "mode"), CASES)
def test_every_mode_takes_nearly_the_step_of_float32_on_a_cpu(
    device: str, mode: str, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for TF32, with which torch computes float32 convolutions: on an H200 an update was 5 % off."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    overrides, _, of_loss, of_update = MODES[mode]
    expected_loss, expected = first_step(make_trainer("cpu", "expected"))
    loss, update = first_step(make_trainer(device, "found", *overrides))
    assert loss == pytest.approx(expected_loss, rel=of_loss)
    assert float((update - expected).norm()) <= of_update * float(expected.norm())


@pytest.mark.parametrize("device", [CUDA])
def test_no_operation_of_a_step_waits_for_the_device(device: str, make_trainer: MakeTrainer) -> None:
    """The loss alone waits, for an event, which torch does not report: tests/test_gpu_rehearsal.py counts that."""
    trainer = make_trainer(device, "waits", "train.precision=bf16")
    with trainer.parts.loader, trainer.parts.monitor:
        batches = trainer.parts.loader.batches(0)
        for _ in range(3):
            trainer.train_step(next(batches))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                trainer.train_step(next(batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        batches.close()
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    assert waits == []


@on_every_device
def test_resume_with_deterministic_algorithms_is_bit_identical_and_exports(
    device: str, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    steps = ("train.precision=bf16", "optim.optimizer=lars")
    with unwritten_memory_is_nan():
        assert make_trainer(device, "whole", *steps, "train.max_steps=6").fit() == "finished"
        make_trainer(device, "halves", *steps, "train.max_steps=3").fit()
        second = make_trainer(device, "halves", *steps, "train.max_steps=6")
        assert second.state.step == 3
        second.fit()
    whole, halves = (find_checkpoint(str(tmp_path / name), print).path for name in ("whole", "halves"))
    assert whole.name == halves.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / file).read_bytes() == (halves / file).read_bytes()

    exported = export(tmp_path / "whole", tmp_path / "encoder.safetensors", format="safetensors")
    encoder = build_model(second.config.model).encoder
    encoder.load_state_dict(load_file(exported.path))
    images = torch.randn(4, 3, 32, 32)
    trained = copy.deepcopy(second.parts.encoder).cpu().float().eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(images), trained(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", [CUDA])
def test_the_smoke_run_finishes_from_the_command_line(device: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "noise.beton")
    training = Training(images, tmp_path, "smoke", "train.precision=bf16", ACCELERATE_USE_CPU="false")
    assert training.wait() == [0], training.output
    assert training.status()["state"] == "finished"
    assert f"1 x {torch.cuda.get_device_name()}, bf16" in training.output[0]


# ---------------------------------------------------------------------------------------------------------------------
# Global BatchNorm: two processes share the device (gloo)


def _norm_and_gradients(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, x.shape[1], device=x.device, dtype=x.dtype)[:, None, None]).square().sum().backward()
    assert x.grad is not None
    return [t.detach().cpu().double() for t in (y, x.grad, norm.running_mean, norm.running_var)]  # type: ignore[arg-type]


def _on_rank(rank: int, world_size: int, device: str, x: Tensor) -> list[Tensor]:
    norm = convert_to_global_batch_norm(nn.BatchNorm2d(x.shape[1]).to(device))
    own = x.chunk(world_size)[rank].to(device).to(memory_format=torch.channels_last)
    return _norm_and_gradients(norm, own)


@pytest.mark.distributed
@on_every_device
@pytest.mark.parametrize("world_size", [1, 2])
def test_global_batch_norm_on_one_device_is_that_of_one_process(device: str, world_size: int) -> None:
    x = torch.randn(8, 6, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 3
    expected = _norm_and_gradients(nn.BatchNorm2d(6).double(), x.double())
    ranks = run_ranks(world_size, _on_rank, device, x, timeout_s=120)
    for i in range(2):
        torch.testing.assert_close(torch.cat([rank[i] for rank in ranks]), expected[i], atol=1e-4, rtol=1e-4)
    for rank in ranks:
        torch.testing.assert_close(rank[2], expected[2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rank[3], expected[3], atol=1e-5, rtol=1e-5)
