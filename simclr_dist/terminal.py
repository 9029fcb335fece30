"""What the command lines of this package share: arguments, the device, messages and tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SOURCE_HELP = "a run's folder (its newest valid checkpoint) or one of its checkpoints/step_…"


def add_command(
    subparsers: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], **texts: Any
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    parser.set_defaults(run=run)
    return parser


def say(message: str) -> None:
    """News for a person, once for all ranks, apart from the results on stdout."""
    from simclr_dist.parallel import distributed

    if distributed.rank() == 0:
        print(message, file=sys.stderr, flush=True)


def add_compute_arguments(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    default = "evaluation.batch_size of the run" if batch_size is None else batch_size
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help=f"images at once (default: {default})"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the encoder (default: that of the run)"
    )


def choose_device(asked: str | None) -> torch.device:
    """The device to compute on. Under `accelerate launch` the process group is started, one device a rank."""
    import torch

    from simclr_dist.parallel import distributed

    if distributed.world().size > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        return PartialState().device
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        from simclr_dist.errors import ConfigError

        raise ConfigError([f"--device {asked}: torch {torch.__version__} sees no GPU; use --device cpu"])
    return device


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], caption: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {value}")
    return value
