"""Starts the process group and DDP by accelerate. What the environment may say about that is in environment.py."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from simclr_dist.parallel.environment import check_environment, wants_cpu, without_ignored


def join_training(timeout_s: float) -> torch.device:
    """Starts a training's process group: one process for each device, and this is the device.

    timeout_s: of every collective. Raises ConfigError for an environment that asks for something else.
    """
    check_environment(os.environ)
    with without_ignored():
        return PartialState(
            cpu=_uses_cpu(), **InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)).to_kwargs()
        ).device


def build_accelerator(mixed_precision: str, *, broadcast_buffers: bool) -> Accelerator:
    """In a process that has joined: of all that accelerate can do, DDP, autocast and fp16's loss scale.

    mixed_precision: no, bf16 or fp16.
    """
    with without_ignored():
        return Accelerator(
            cpu=_uses_cpu(),
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=True)
            ],
        )


def join_process_group() -> torch.device:
    """For commands under `accelerate launch`: starts the process group; the device of this process. Raises as above."""
    check_environment(os.environ)
    with without_ignored():
        return PartialState().device


def _uses_cpu() -> bool:
    return wants_cpu(os.environ) or not torch.cuda.is_available()
