"""How fast this machine is at one device's share of a training: a few real steps, and a few real batches."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_dist.config import AugmentConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, Precision, TrainConfig
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.loss.build import build_loss
from simclr_dist.network.freezing import freeze_matching
from simclr_dist.network.inputs import Inputs
from simclr_dist.network.precision import assumed_precision, autocast
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.parallel.distributed import World

MOST_IMAGES_ON_CPU = 64
"""Where a step of these takes longer than LONG_STEP_S; otherwise all are tried."""
LONG_STEP_S = 1.0
LOADER_S = 3.0


@dataclass(frozen=True)
class MeasuredStep:
    """images: of the batch that was tried. peak_bytes: what the step held at most; None where nobody counts."""

    images: int
    images_per_s: float
    peak_bytes: int | None


def measure_step(
    *,
    augment: AugmentConfig,
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    train: TrainConfig,
    kind: Kind,
    images: int,
    device: torch.device,
    repetitions: int = 3,
) -> MeasuredStep:
    """Steps of one process on `images` random samples: augmentation, network, loss, update. The first only warms up.

    images: on a CPU, fewer may be tried.
    """
    if device.type == "cpu":
        images = min(images, train.images_of_part or images)
    few = min(images, MOST_IMAGES_ON_CPU) if device.type == "cpu" else images
    network = build_model(model).to(device)
    freeze_matching(network, model.freeze)
    if train.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    contrast = build_loss(loss, kind.data.num_views).to(device)
    if contrast.learn_temperature:
        network.add_module("loss", contrast)
    optimizer = build_optimizer(network, optim)
    make_views, _ = kind.views(augment, 0, device, lambda _: None)
    batch = kind.example_batch(few).to(device)

    def loss_of(z: Tensor) -> Tensor:
        return contrast(z.float(), batch.sample_ids)  # for SupCon, each image is a class: as much work

    def step() -> None:
        with autocast(device, assumed_precision(train.precision, device.type)):
            views = make_views(batch)
            micro = train.images_of_part
            if micro and micro < len(batch.sample_ids):
                backward_in_micro_batches(network, views, loss_of, micro_batch_size=micro)
            else:
                loss_of(network(views.flatten(0, 1))[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    step()
    if few < images and seconds() < LONG_STEP_S:
        batch = kind.example_batch(images).to(device)
        step()
    images = len(batch.sample_ids)
    _forget_peak(device)
    times = [seconds() for _ in range(repetitions)]
    return MeasuredStep(images, images / statistics.median(times), _peak(device))


@dataclass(frozen=True)
class ComparedPrecisions:
    """seconds: of a forward and backward of two views of `images` images."""

    images: int
    seconds: dict[Precision, float]


def compare_precisions(
    *, model: ModelConfig, channels_last: bool, inputs: Inputs, images: int, budget_s: float = 2.0
) -> ComparedPrecisions:
    """fp32 and bf16 on this CPU, with this network, on batches that grow to `images` as long as there is time.

    The generators of torch stay as they are. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_model(model).train()
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        began, size = time.perf_counter(), min(images, 2)
        while True:
            views = inputs.example(2 * size)
            seconds: dict[Precision, float] = {
                precision: min(_pass_s(network, views, precision) for _ in range(2)) for precision in ("fp32", "bf16")
            }
            if size == images or time.perf_counter() - began > budget_s / 2:  # the next takes as long as all of these
                return ComparedPrecisions(size, seconds)
            size = min(2 * size, images)


def _pass_s(network: SimCLR, views: Tensor, precision: Precision) -> float:
    start = time.perf_counter()
    with autocast("cpu", precision):
        z = network(views)[1]
    z.float().square().mean().backward()
    return time.perf_counter() - start


def measure_loader(data: DataConfig, augment: AugmentConfig, *, images: int, local_size: int) -> float:
    """Images per second that one of `local_size` processes on this machine decodes and crops, `images` a batch."""
    world = World(local_size=local_size)
    loader = kind_of(data).loader(augment, seed=0, global_batch_size=images, world=world, device="cpu")
    with loader:
        batches = loader.batches(0)
        for _ in range(data.batches_ahead + 1):  # compiles, and fills what is decoded ahead
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < LOADER_S:
            next(batches)
            count += images
        seconds = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]
    return count / seconds


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
