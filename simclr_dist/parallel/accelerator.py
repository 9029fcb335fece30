"""Starts the process group and DDP by accelerate. What the environment may say about that is in environment.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from simclr_dist.errors import ConfigError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.environment import check_environment, wants_cpu, without_ignored
from simclr_dist.parallel.host_memory import free_as_usual, keep_freed_memory


def join_training(timeout_s: float) -> torch.device:
    """Starts a training's process group: one process for each device, and this is the device.

    timeout_s: of every collective. Raises ConfigError for an environment that asks for something else.
    """
    check_environment(os.environ)
    with without_ignored():
        state = PartialState(
            cpu=_uses_cpu(), **InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)).to_kwargs()
        )
    distributed.meet_neighbours(timeout_s)
    if state.device.type == "cpu":
        keep_freed_memory()
    return state.device


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


@contextmanager
def state_of_one_training() -> Iterator[None]:
    """Around a training in a process that does other things too: accelerate keeps one precision for each process, and
    a training may set torch's threads and what malloc does.

    Afterwards all is as it was before, so that Accelerators of the caller go on. A process group of several processes
    stays: the next training uses it.
    """
    kinds: list[Any] = [AcceleratorState, GradientState]
    if distributed.world().size == 1:
        kinds.append(PartialState)
    before, num_threads = [dict(kind._shared_state) for kind in kinds], torch.get_num_threads()
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)
        torch.set_num_threads(num_threads)
        free_as_usual()


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; None: a GPU if there is one. Raises ConfigError where there is no such device.

    With several processes this starts the process group and gives one device to each rank.
    """
    if distributed.world().size > 1:
        return join_process_group()
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([f"device {name}: torch {torch.__version__} sees no GPU; use cpu"])
    return device


def join_process_group() -> torch.device:
    """For commands under `accelerate launch`: starts the process group; the device of this process. Raises as above."""
    check_environment(os.environ)
    with without_ignored():
        return PartialState(cpu=_uses_cpu()).device  # without `cpu` it would take CPU processes for a single one


def _uses_cpu() -> bool:
    return wants_cpu(os.environ) or not torch.cuda.is_available()
