"""`simclr-dist`: data in, results out. Training itself is started by `accelerate launch` or `python -m launcher`.

One file for each command; those that share their subject share a file. All import torch only when they run, so that
--help is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from simclr_dist import __version__
from simclr_dist.argument_types import Parser
from simclr_dist.cli import (
    assemble,
    config,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    finetune,
    inspect,
    plan,
    prepare,
    recipe,
    report,
    runs,
    train,
    verdict,
)
from simclr_dist.errors import FailedElsewhereError, StoppedError, UserError
from simclr_dist.safe_text import message
from simclr_dist.streams import escaped_output

EPILOG = """\
examples:
  simclr-dist prepare cifar10-jpeg.tar.xz data/cifar10_train.beton --split train
  simclr-dist config show configs/cifar10_resnet18_100ep.yaml train.epochs=50
  simclr-dist evaluate knn runs/cifar10_demo
  simclr-dist export runs/cifar10_demo --format safetensors

exit codes: 0 done · 1 a fault of the program · 2 bad input, see the message · 75 stopped, to be continued
"""


STOPPED = 75  # saved, to be continued, as the launcher says it (EX_TEMPFAIL)


def main(argv: Sequence[str] | None = None) -> None:
    """`simclr-dist`, with the kinds and encoders that this process has registered. Ends it with an exit code."""
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: its encoding may lack some letters
    try:
        with escaped_output():
            sys.exit(args.run(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except FailedElsewhereError:
        sys.exit(2)
    except StoppedError as error:  # on all ranks together
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except UserError as error:
        print(message(error), file=sys.stderr, flush=True)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """Of all commands. What it parses has `run`, a function of the namespace that returns the exit code."""
    top = Parser(
        prog="simclr-dist",
        description="SimCLR pretraining: prepare images, evaluate and export what was learnt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"simclr-dist {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        prepare,
        assemble,
        inspect,
        evaluate,
        verdict,
        export,
        finetune,
        embed,
        report,
        runs,
        config,
        plan,
        doctor,
        demo,
        recipe,
        train,
    ):
        module.register(commands)
    return top
