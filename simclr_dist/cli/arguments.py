"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import positive_int

if TYPE_CHECKING:
    import torch

Commands = argparse._SubParsersAction
SOURCE_HELP = "a run's folder (its newest valid checkpoint) or one of its checkpoints/step_…"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], **texts: Any
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    parser.set_defaults(run=run)
    return parser


def add_compute_arguments(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """--device, --batch-size and --precision. batch_size: the default; None: that of the run."""
    default = "evaluation.batch_size of the run" if batch_size is None else batch_size
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help=f"images at once (default: {default})"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the encoder (default: that of the run)"
    )


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; None: a GPU if there is one. Raises ConfigError where there is no such device.

    Under `accelerate launch` this starts the process group and gives one device to each rank.
    """
    from simclr_dist.parallel.accelerator import choose_device as choose

    return choose(name)
