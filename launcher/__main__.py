"""`python -m launcher`: the command line. Each command's work lies in the module of its name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.errors import Exit, LaunchError
from launcher.plan import STOP_SIGNALS

EPILOG = """\
examples:
  python -m launcher local configs/cifar10_demo.yaml                    all GPUs of this machine, or one CPU process
  python -m launcher local configs/cifar10_demo.yaml --nproc 2 seed=1   two processes
  python -m launcher show local configs/cifar10_demo.yaml               what would be started

exit codes: 0 finished, or stopped as asked · 2 wrong command line or configuration, nothing started · 3 a machine is
not fit · 4 training failed · 5 gave up: failures in a row, or no progress · 75 saved and stopped, to be continued
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Starts simclr_dist trainings and looks after them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    add_training_options(add("local", run_local, "train on this machine"))

    show = add("show", run_show, "print what a launch would do, and start nothing")
    show_backends = show.add_subparsers(dest="backend", required=True, metavar="BACKEND")
    add_training_options(show_backends.add_parser("local", help="this machine"))

    # Without `help` a command is not listed: these are for the launcher's own use.
    node = commands.add_parser("node", description="The entry of each node; started by the backends.")
    node.set_defaults(run=run_node)
    node.add_argument("--plan", type=Path, required=True)
    node.add_argument("--node-rank", type=int)
    return top


def add_training_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    command.add_argument("--nproc", type=positive, help="processes on each node (default: its GPUs, or 1)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--port", type=int, default=0, help="rendezvous port (default: a free one)")
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set for the workers; may be repeated"
    )
    command.add_argument("--stop-signal", choices=STOP_SIGNALS, default="USR1", help="asks the workers to save")
    command.add_argument(
        "--max-failures", type=natural, default=0, help="failures in a row that are forgiven (default: %(default)s)"
    )
    command.add_argument("--no-requeue", action="store_true", help="never start again by itself")
    command.add_argument("--save-budget-s", type=seconds, default=60.0, help="time to save before workers are killed")
    command.add_argument("--preflight-s", type=seconds, default=60.0, help="how long to wait for all nodes")
    command.add_argument("--dry-run", action="store_true", help="print what would be done, and start nothing")
    command.add_argument("--json", action="store_true", help="with --dry-run or show: for programs")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds")
    return value


def run_local(args: argparse.Namespace) -> int:
    from launcher import build, local

    plan = build.local_plan(args)
    return run_show(args) if args.dry_run else local.run(plan)


def run_show(args: argparse.Namespace) -> int:
    from launcher import build, local, machine, show

    args.dry_run = True
    plan = build.local_plan(args)
    files = [f"{plan.run_dir}/{name}" for name in ("plan.json", "attempts.jsonl")]
    show.print_shown(show.as_dict(plan, machine.num_cpus(), [local.node_command(plan)], files), args.json)
    return Exit.OK


def run_node(args: argparse.Namespace) -> int:
    from launcher import node

    node.run_node(args.plan, args.node_rank)
    raise AssertionError("execve does not return")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    top = parser()
    # argparse takes positional words only where they first appear: settings after an option are left over.
    args, left = top.parse_known_args(argv)
    strangers = [word for word in left if word.startswith("-") or "=" not in word]
    if strangers or (left and not hasattr(args, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(strangers or left)}")
    if left:
        args.overrides += left
    args.again = list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    from simclr_dist.config import ConfigError

    try:
        return int(args.run(args))
    except LaunchError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return int(error.exit_code)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return int(Exit.USAGE)
    except BrokenPipeError:
        # `launcher … | head` has closed its end: no more words, and none from the interpreter's own flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.FAILED)


if __name__ == "__main__":
    sys.exit(main())
