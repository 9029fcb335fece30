"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import positive_int

if TYPE_CHECKING:
    import torch

    from simclr_dist.checkpoint.pretrained import ForeignEncoder, Source

Commands = argparse._SubParsersAction
SOURCE_HELP = (
    "a run's folder (its newest valid checkpoint) or one of its checkpoints/step_…; or weights of any origin, then "
    "with --encoder: a file, a folder as model hubs have it, `pretrained`"
)


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], **texts: Any
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    parser.set_defaults(run=run)
    return parser


def add_source_arguments(parser: argparse.ArgumentParser, name: str = "source", **texts: Any) -> None:
    """What is evaluated, and what must be known of weights that no run of ours has made. Read by `source_of`.

    --image-size is for both, and handed on by itself.
    """
    parser.add_argument(name, **{"metavar": "RUN_OR_WEIGHTS", "help": SOURCE_HELP, **texts})
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="S",
        help="side at which the encoder sees images (default: evaluation.image_size of the run, else data.image_size; "
        "of weights from elsewhere theirs, else 224)",
    )
    group = parser.add_argument_group("weights from elsewhere (docs/guides/starting_from_weights.md)")
    group.add_argument("--encoder", metavar="NAME", help="what they are of, as model.encoder names it")
    group.add_argument("--stem", choices=("imagenet", "cifar"), help="of a ResNet (default: imagenet)")
    group.add_argument("--weights-partial", action="store_true", help="also where they are of a part of the encoder")


def source_of(args: argparse.Namespace, name: str = "source") -> Source:
    """What `add_source_arguments` has read; a path as it is where nothing else is said."""
    path = getattr(args, name)
    if not (args.encoder or args.stem or args.weights_partial):
        return str(path)
    return foreign(str(path), args)


def sources_of(args: argparse.Namespace, name: str) -> list[Path | ForeignEncoder]:
    """Of several: the options that describe weights from elsewhere are for those that are no run."""
    return [
        path if path.is_dir() and not (path / "config.json").exists() else foreign(str(path), args)
        for path in getattr(args, name)
    ]


def foreign(path: str, args: argparse.Namespace) -> ForeignEncoder:
    """With what the options say of it."""
    from simclr_dist.checkpoint.pretrained import ForeignEncoder

    return ForeignEncoder(path, args.encoder, args.image_size, args.stem or "imagenet", partial=args.weights_partial)


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
    from simclr_dist.parallel.host_memory import keep_freed_memory

    device = choose(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device
