"""Starts the process group by accelerate. What the environment may say about that is in environment.py."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from simclr_dist.parallel.environment import check_environment, wants_cpu, without_ignored


def build_accelerator(mixed_precision: str, *, broadcast_buffers: bool, timeout_s: float) -> Accelerator:
    """Of all that accelerate can do: one process for each device, DDP, autocast, fp16's loss scale.

    mixed_precision: no, bf16 or fp16. timeout_s: of every collective. Raises ConfigError for an environment that asks
    for something else.
    """
    check_environment(os.environ)
    use_cpu = wants_cpu(os.environ) or not torch.cuda.is_available()
    with without_ignored():
        return Accelerator(
            cpu=use_cpu,
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
                DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=True),
            ],
        )


def join_process_group() -> torch.device:
    """For commands under `accelerate launch`: starts the process group; the device of this process. Raises as above."""
    check_environment(os.environ)
    with without_ignored():
        return PartialState().device
