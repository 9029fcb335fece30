"""What `train.precision: auto` comes to: decided once in the life of a run, by the main process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import Config, Precision, PrecisionSetting, load_config
from simclr_dist.errors import ConfigError
from simclr_dist.kinds import kind_of
from simclr_dist.network.precision import cpu_has_bf16
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.plan.measure import compare_precisions
from simclr_dist.run.layout import RunDir

_ALL: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Decision:
    precision: Precision
    reason: str = ""
    """Why, if it was not written in the configuration; on the main process."""


def decide_precision(config: Config, checkpoint: Checkpoint | None, device: torch.device) -> Decision:
    """On all ranks together. Raises ConfigError for a network that cannot run."""
    if config.train.precision != "auto":
        return Decision(config.train.precision)
    decision = run_on_all_ranks(
        lambda: _decide(config, checkpoint, device) if distributed.rank() == 0 else None, device
    )
    number = torch.tensor([_ALL.index(decision.precision) if decision else 0], device=device)
    agreed = _ALL[int(distributed.broadcast_from_main_(number))]
    return decision or Decision(agreed)


def with_precision(config: Config, precision: Precision) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _decide(config: Config, checkpoint: Checkpoint | None, device: torch.device) -> Decision:
    before = checkpoint.config.train.precision if checkpoint is not None else _of_earlier_start(config)
    if before != "auto":
        return Decision(before, "as when this run began")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision("bf16", "the choice on GPUs")
        return Decision("fp32", "this GPU only emulates bf16; train.precision=fp16 would be faster")
    if not cpu_has_bf16():
        return Decision("fp32", "this CPU only emulates bf16")
    images = config.train.global_batch_size // distributed.world_size()
    found = compare_precisions(
        model=config.model,
        channels_last=config.train.channels_last,
        inputs=kind_of(config.data).inputs,
        images=min(images, config.train.micro_batch_size or images),
    )
    fast, slow = sorted(found.seconds, key=found.seconds.__getitem__)
    ratio = found.seconds[slow] / found.seconds[fast]
    return Decision(fast, f"measured with {found.images} images: {ratio:.2f} times as fast as {slow}")


def _of_earlier_start(config: Config) -> PrecisionSetting:
    """What a start decided that ended before its first checkpoint; "auto" if there was none."""
    try:
        return load_config(RunDir(config.run_dir).config, check_data=False).train.precision
    except ConfigError:
        return "auto"
