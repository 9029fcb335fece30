"""Pretrain: `accelerate launch -m simclr_dist.train CONFIG [key=value …]`; with `python -m`, in one process.

Exit code 0: finished, or stopped on request (Ctrl-C too) with everything saved; 2: bad input; 130: a second Ctrl-C; 1:
anything else. `status.json` in the run directory says which: accelerate and torchrun turn every failure into 1.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from simclr_dist import __version__
from simclr_dist.argument_types import Parser
from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError, FailedElsewhereError, Reason, UserError
from simclr_dist.parallel.environment import check_environment
from simclr_dist.run.stop_signals import SIGNALS
from simclr_dist.safe_text import message, printable
from simclr_dist.streams import make_output_safe

if TYPE_CHECKING:
    from simclr_dist.training.trainer import Trainer

# Messages of gloo and NCCL when another rank's process has ended.
_LOST_RANK_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
)


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="simclr_dist.train", description=__doc__.split("\n\n")[0])
    found.add_argument("config", help="YAML file, see configs/")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=5")
    found.add_argument("--version", action="version", version=f"simclr-dist {__version__}")
    style = found.add_mutually_exclusive_group()
    for name, text in (("quiet", "print warnings and errors only"), ("json", "print JSON lines, for programs")):
        style.add_argument(f"--{name}", dest="terminal", action="store_const", const=name, help=text)
    return found


def main(argv: list[str] | None = None, trainer_class: type[Trainer] | None = None) -> None:
    """`python -m simclr_dist.train`, with your own trainer. argv: CONFIG and key=value; None: of this process."""
    make_output_safe()
    args = parser().parse_intermixed_args(argv)
    if args.terminal:
        args.overrides.append(f"monitor.terminal={args.terminal}")
    with SIGNALS:
        speaks = "LOCAL_RANK"  # each machine has an environment of its own
        try:
            check_environment(os.environ)
            speaks = "RANK"
            config = load_config(args.config, args.overrides, world_size=int(os.environ.get("WORLD_SIZE", 1)))
        except ConfigError as error:
            if os.environ.get(speaks, "0") == "0":
                print(message(error), file=sys.stderr, flush=True)
            sys.exit(2)
        train(config, trainer_class)


def train(config: Config, trainer_class: type[Trainer] | None = None) -> None:
    """Runs to the end. On failure it prints one message and ends the process, with other ranks still waiting.

    trainer_class: one's own subclass of Trainer (docs/guides/extending.md).
    """
    trainer = None
    with SIGNALS:
        try:
            _say_that_it_starts(config)
            from simclr_dist.parallel.distributed import shut_down
            from simclr_dist.training.trainer import Trainer

            _die_with_parent()
            trainer = (trainer_class or Trainer)(config)
            trainer.fit()
            shut_down()
        except FailedElsewhereError:
            _leave(2)
        except UserError as error:
            _report(config, trainer, error.reason, message(error))
            _leave(2)
        except KeyboardInterrupt:
            _report(config, trainer, "crash" if trainer else None, "ended by a second Ctrl-C, without saving")
            _leave(130)
        except BaseException as error:
            _report(config, trainer, "crash", "".join(traceback.format_exception(error)))
            _leave(1)


def _say_that_it_starts(config: Config) -> None:
    """Importing torch takes seconds, in which a person should see a sign of life. The launcher says it by itself."""
    silent = config.monitor.terminal in ("quiet", "json") or "SIMCLR_ATTEMPT" in os.environ
    if os.environ.get("RANK", "0") == "0" and not silent:
        several = int(os.environ.get("WORLD_SIZE", 1))
        processes = f"{several} processes" if several > 1 else "1 process"
        said = f"{config.name}: starting {processes}; importing torch takes some seconds"
        print(printable(said), file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Asks Linux to kill this process when torchrun's agent dies. Otherwise it would go on and hold its GPU."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        agent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != agent:  # it died before the request
            os.kill(os.getpid(), signal.SIGKILL)


def _report(config: Config, trainer: object, reason: Reason | None, text: str) -> None:
    """Prints why this rank fails and writes status.json, unless another rank has failed first: that is the cause."""
    where = f"rank {os.environ.get('RANK', 0)}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    if not record_failure(config, trainer, reason, text):
        text = "ends, because another rank has failed"
    print(printable(f"\n{where}{text}", keep="\n"), file=sys.stderr, flush=True)


def record_failure(config: Config, trainer: object, reason: Reason | None, message: str) -> bool:
    """Writes into status.json why this rank fails; False if another rank has failed first.

    trainer: None if it could not be built.
    """
    from simclr_dist.run.layout import newest_step
    from simclr_dist.run.status import has_failed, write_status

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and trainer is not None:
        if reason == "crash" and any(words in message for words in _LOST_RANK_MESSAGES):
            deadline = time.monotonic() + 2  # its status may be about to be written
            while not has_failed(config.run_dir) and time.monotonic() < deadline:
                time.sleep(0.05)
        if has_failed(config.run_dir):
            return False
    state = getattr(trainer, "state", None)
    step = state.step if state is not None else newest_step(config.run_dir)
    if reason is not None and config.run_dir.is_dir():
        write_status(config.run_dir, "failed", step=step, reason=reason, message=message)
    return True


def _leave(code: int) -> NoReturn:
    """Ends the process without destroying the process group: that would wait for ranks that may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
