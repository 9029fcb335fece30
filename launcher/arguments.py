"""The command line: commands, their options, and the values that options accept."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.launch_plan import STOP_SIGNALS, one_line
from simclr_dist import __version__
from simclr_dist.argument_types import Parser, non_negative_int, positive_float, positive_int

EPILOG = """\
examples:
  python -m launcher local configs/cifar10_demo.yaml                    all GPUs of this machine, or one CPU process
  python -m launcher local configs/cifar10_demo.yaml --nproc 2 seed=1   two processes
  python -m launcher slurm configs/imagenet_resnet50_100ep.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
  python -m launcher hosts configs/imagenet_resnet50_100ep.yaml --hostfile hosts.txt
  python -m launcher show slurm configs/smoke.yaml --nodes 2            what would be submitted
  python -m launcher status runs/smoke

exit codes: 0 finished, or stopped as asked · 2 wrong command line or configuration, nothing started · 3 a machine is
not fit · 4 training failed · 5 gave up: failures in a row, or no progress · 75 saved and stopped, to be continued
"""
SBATCH_OPTIONS = (
    *("nodes", "time", "partition", "account", "qos"),
    *("gpus-per-node", "cpus-per-task", "mem", "constraint", "exclude"),
)
"""Options of `launcher slurm` that are passed on to sbatch as they are."""
SIGNAL_LEAD_S = 180
"""As in slurm/train.sh."""
BACKENDS = {
    "local": "train on this machine",
    "slurm": "submit to SLURM (what `sbatch slurm/train.sh` does, with the checks before the queue)",
    "hosts": "train on machines that ssh reaches",
}


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m launcher",
        description="Starts simclr_dist trainings and looks after them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"launcher of simclr-dist {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for backend, text in BACKENDS.items():
        # An abbreviation of ours may be another option of sbatch: --gpus is not --gpus-per-node.
        add_backend(commands.add_parser(backend, help=text, description=text, allow_abbrev=False), backend)
    show = commands.add_parser("show", help="print what a launch would do, and start nothing")
    show_backends = show.add_subparsers(dest="command", required=True, metavar="BACKEND")
    for backend, text in BACKENDS.items():
        command = show_backends.add_parser(backend, help=text, allow_abbrev=False)
        add_backend(command, backend)
        command.set_defaults(dry_run=True)

    check = commands.add_parser("check", help="is this machine, or are these nodes, fit for a training?")
    check.add_argument("backend", nargs="?", choices=("local", "slurm"), default="local")
    check.add_argument("--deep", action="store_true", help="start processes that connect and gather tensors")
    check.add_argument("--nodes", type=positive_int, default=2, help="with slurm --deep: nodes to ask for")
    check.add_argument("--partition", help="with slurm --deep")
    check.add_argument("--json", action="store_true")
    add_check_options(check)

    for name, text in (
        ("status", "how a run stands, and its attempts"),
        ("logs", "the newest log of a run"),
        ("stop", "ask a run to save and stop"),
        ("cancel", "end a run now"),
        ("resume", "continue a run as it was started"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run_dir", metavar="RUN", help="the run's directory, such as runs/smoke")
        if name == "logs":
            command.add_argument("-n", "--lines", type=non_negative_int, default=50)
            command.add_argument("-f", "--follow", action="store_true")
            command.add_argument(
                "--rank", type=non_negative_int, help="what this rank of the newest attempt has printed"
            )
        if name == "resume":
            command.add_argument(
                "--new-code", action="store_true", help="with code and configuration of now instead of the kept ones"
            )
            command.add_argument("--dry-run", action="store_true", help="print what would be done")

    text = "write a folder to work in: configurations, SLURM scripts, the next commands"
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument("dir", metavar="DIR", type=Path, help="new, or empty")

    text = "train as one of several nodes that another scheduler has started (Kubernetes, PBS, LSF, Flux, mpiexec)"
    node = commands.add_parser("node", help=text, description=f"{text}. Say what the environment does not.")
    add_training_options(node, max_failures=0, needs_config=False)
    node.add_argument("--rendezvous", metavar="HOST[:PORT]", help="node 0, and a port of it that the others can reach")
    node.add_argument("--node-rank", type=non_negative_int, metavar="R", help="which node this is, from 0")
    node.add_argument("--nodes", type=positive_int, metavar="N", help="how many there are")
    node.add_argument("--plan", type=Path, help="the launch plan of another backend, which starts this command itself")
    node.set_defaults(dry_run=False, preflight_s=600.0)

    # Commands without `help` are not listed: the scripts in slurm/ call them.
    for name, text in (
        ("job", "Inside a SLURM job: train on its nodes, and decide what follows."),
        ("plan", "For scripts of release 0.1: write the launch plan."),
    ):
        command = commands.add_parser(name, description=text)
        add_training_options(command, max_failures=3)
        add_signal_lead(command)
        add_job_options(command)
        command.add_argument("--sweep")
        command.add_argument("--submitted", action="append", default=[])
        command.set_defaults(dry_run=False)
    finish = commands.add_parser("finish", description="For scripts of release 0.1: decide what follows.")
    finish.add_argument("--run-dir", type=Path, required=True)
    finish.add_argument("--rc", type=int, required=True)
    for name, text in (
        ("check-job", "Inside a SLURM job: are its nodes fit?"),
        ("plan-check", "For scripts of release 0.1: write the launch plan of a check."),
    ):
        command = commands.add_parser(name, description=text)
        command.set_defaults(backend="slurm")
        add_check_options(command)
    report = commands.add_parser("check-report", description="For scripts of release 0.1: the result for each node.")
    report.add_argument("--run-dir", type=Path, required=True)
    return top


def add_backend(command: argparse.ArgumentParser, backend: str) -> None:
    add_training_options(command, max_failures=3 if backend == "slurm" else 0)
    command.set_defaults(backend=backend)
    command.add_argument("--dry-run", action="store_true", help="print what would be done, and start nothing")
    sweeps = ", or the table of a sweep" if backend == "local" else ""
    command.add_argument("--json", action="store_true", help=f"what --dry-run and show print{sweeps}, for programs")
    if backend in ("local", "slurm"):
        command.add_argument("--sweep", metavar="FILE", help="many runs: `grid:` or `list:` of settings in a YAML file")
    if backend == "local":
        command.add_argument("--jobs", type=positive_int, default=1, help="with --sweep: runs side by side")
    if backend == "hosts":
        command.add_argument("--hostfile", required=True, help="lines of `[user@]host [slots=N] [port=N] [addr=IP]`")
        command.add_argument("--ssh-cmd", default="ssh", help="for example 'ssh -p 2222' (default: %(default)s)")
    if backend == "slurm":
        for name in SBATCH_OPTIONS:
            kind, text = (node_counts, "as for sbatch: N or MIN-MAX") if name == "nodes" else (str, "as for sbatch")
            command.add_argument(f"--{name}", type=kind, help=text)
        command.add_argument(
            "--sbatch-arg", action="append", default=[], metavar="--OPTION=VALUE", help="may be repeated"
        )
        add_signal_lead(command)
        command.add_argument("--script", help="instead of slurm/train.sh")
        command.add_argument(
            "--no-snapshot", action="store_true", help="the job reads code and CONFIG when it starts, as they are then"
        )
        add_job_options(command)


def add_job_options(command: argparse.ArgumentParser) -> None:
    """What `launcher slurm` passes on to the job."""
    add_surroundings(command)
    command.add_argument("--code", help=argparse.SUPPRESS)  # a folder in RUN/code
    command.add_argument(
        "--shared", action="store_true", help="not whole nodes: --gpus-per-node, --cpus-per-task and --mem of them"
    )


def add_surroundings(command: argparse.ArgumentParser) -> None:
    """What a node has around Python."""
    for option, kind, metavar, text in (
        ("--setup", "setup_commands", "LINE", "shell text that each node runs before Python; may be repeated"),
        ("--setup-file", "setup_file", "FILE", "with such lines"),
        ("--kept-setup", "kept_setup", "JSON", argparse.SUPPRESS),
    ):  # all add to one list, in the order of the command line
        command.add_argument(
            option, dest="setup", action="extend", default=[], type=in_node_script(kind), metavar=metavar, help=text
        )
    command.add_argument(
        "--container",
        type=in_node_script("container"),
        metavar="IMAGE",
        help="FILE.sif, apptainer:FILE or pyxis:IMAGE: Python runs inside",
    )
    command.add_argument(
        "--bind",
        action="append",
        default=[],
        type=in_node_script("bind"),
        metavar="FOLDER[:INSIDE]",
        help="for the container",
    )
    command.add_argument(
        "--node-python", "--container-python", help="interpreter on the nodes (default: this one; container: python3)"
    )


def node_counts(text: str) -> str:
    """N or MIN-MAX, as sbatch takes it."""
    low, _, high = text.partition("-")
    if not 1 <= int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"expected N or MIN-MAX, at least 1, not {text}")
    return text


def in_node_script(name: str) -> Callable[[str], Any]:
    """A type of arguments whose module --help should not load."""
    return lambda text: getattr(import_module("launcher.node_script"), name)(text)


def add_signal_lead(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--signal-lead-s", type=positive_int, default=SIGNAL_LEAD_S, help="ask to save so long before the limit"
    )


def add_training_options(command: argparse.ArgumentParser, max_failures: int, needs_config: bool = True) -> None:
    nargs = None if needs_config else "?"
    command.add_argument("config", nargs=nargs, metavar="CONFIG", help="a YAML file, see configs/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    add_node_options(command)
    command.add_argument("--stop-signal", choices=STOP_SIGNALS, default="USR1", help="asks the workers to save")
    command.add_argument(
        "--max-failures",
        type=non_negative_int,
        default=max_failures,
        help="failures in a row that are forgiven while each attempt makes progress (default: %(default)s)",
    )
    command.add_argument("--no-requeue", action="store_true", help="never start again by itself")
    command.add_argument(
        "--save-budget-s", type=positive_float, default=60.0, help="time to save before workers are killed"
    )


def add_node_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nproc", type=positive_int, help="processes on each node (default: its GPUs, or 1)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--port", type=int, help="rendezvous port (default: a free one)")
    command.add_argument("--head-addr", help="IP address of the first node (default: found)")
    command.add_argument("--ifname", help="network interface (default: the one that leads to the first node)")
    command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the workers; repeatable")
    command.add_argument("--preflight-s", type=positive_float, default=60.0, help="how long to wait for all nodes")


def add_check_options(command: argparse.ArgumentParser) -> None:
    add_node_options(command)
    add_surroundings(command)
    command.add_argument("--runs-dir", default="runs", help="where runs are kept, on a disk that all nodes share")


def as_words(args: argparse.Namespace, *names: str) -> list[str]:
    """The options `names` of a parsed command line, as words of another one. Unset ones and `auto` are left out."""
    words = []
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, "auto") and value is not False:
            values = value if isinstance(value, list) else [f"{value:g}" if isinstance(value, float) else str(value)]
            words += [f"--{name}={one_line(f'--{name}', each)}" for each in values]
    return words


SHORT = {
    "-N": "--nodes",
    "-t": "--time",
    "-p": "--partition",
    "-A": "--account",
    "-q": "--qos",
    "-c": "--cpus-per-task",
    "-C": "--constraint",
    "-x": "--exclude",
    "-G": "--gpus",
    "-w": "--nodelist",
    "-a": "--array",
    "-n": "--ntasks",
    "-d": "--dependency",
}
"""What sbatch's short options are called in full."""
NOT_BY_HAND = {
    "--array": "use --sweep",
    "--export": "use --env NAME=VALUE",
    "--ntasks": "there is one task on each node, which starts its processes itself: use --nproc",
    "--ntasks-per-node": "there is one task on each node, which starts its processes itself: use --nproc",
    "--output": "logs go to the run directory",
    "--signal": "use --stop-signal and --signal-lead-s",
    "--wrap": "the script is slurm/train.sh",
}
"""Options of sbatch that the launcher decides, and what to write instead."""


def sbatch_hint(word: str, argv: Sequence[str]) -> str:
    """What to type instead of an option that `launcher slurm` does not know."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):  # -N2, -N 2
        name, equals, value = SHORT.get(word[:2], f"--{word[1:2]}"), word[2:], word[2:]
    at = argv.index(word)
    if not equals and at + 1 < len(argv) and not argv[at + 1].startswith("-") and argv[at + 1].count("=") == 0:
        equals, value = "=", argv[at + 1]
    meant = f"{name}={value}" if equals else name
    if name in NOT_BY_HAND:
        return f"{word}: {NOT_BY_HAND[name]}"
    if name.removeprefix("--") in SBATCH_OPTIONS:
        return f"{word}: write {meant}"
    return f"{word}: if it is meant for sbatch, write --sbatch-arg={meant}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    top = parser()
    # argparse reads positional arguments only where they first appear: settings after an option are left over.
    args, left = top.parse_known_args(argv)
    unknown = [word for word in left if word.startswith("-") or "=" not in word]
    if unknown and hasattr(args, "sbatch_arg") and unknown[0].startswith("-"):
        own = [f"--{name.replace('_', '-')}" for name in vars(args)]
        if not difflib.get_close_matches(unknown[0].partition("=")[0], own, cutoff=0.85):
            raise LaunchError(sbatch_hint(unknown[0], argv))
    if unknown or (left and not hasattr(args, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(unknown or left)}")
    if left:
        args.overrides += left
    if args.command == "node" and (args.plan is None) == (args.config is None):
        top.error("node: give either CONFIG or --plan")
    args.argv = tuple(argv)
    return args
