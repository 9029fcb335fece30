"""`python -m launcher`: calls the module that does a command's work. It is imported only when its command is used."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import simclr_dist
from launcher.arguments import parse
from launcher.errors import Exit, LaunchError
from simclr_dist.errors import ConfigError
from simclr_dist.safe_text import message
from simclr_dist.streams import escaped_output, make_output_safe


def run_backend(args: argparse.Namespace) -> int:
    if args.backend == "slurm":
        from launcher import slurm

        return show_slurm(args) if args.dry_run else slurm.submit(args)
    if args.backend == "hosts":
        from launcher import hosts

        return show_started(args) if args.dry_run else hosts.run(args)
    if args.sweep:
        from launcher import sweep

        return sweep.run(args)
    from launcher import build, local, schedulers

    schedulers.refuse_to_be_alone(os.environ)
    return show_started(args) if args.dry_run else local.run(build.local_plan(args))


def show_started(args: argparse.Namespace) -> int:
    """Prints what `local` and `hosts` would start."""
    from launcher import build, hosts, local, show

    if args.backend == "hosts":
        plan = hosts.plan_for(args)
        start = hosts.commands_for(args)(plan)
    else:
        plan = build.local_plan(args)
        start = [local.node_command(plan)]
    show.print_shown(show.as_dict(plan, start), args.json)
    return Exit.OK


def show_slurm(args: argparse.Namespace) -> int:
    from launcher import show, slurm

    submission = slurm.prepare(args)
    show.print_shown(show.as_dict(slurm.shown_plan(submission), [submission.command]), args.json)
    return Exit.OK


def run_check(args: argparse.Namespace) -> int:
    from launcher import check

    return check.run(args)


def run_plan_check(args: argparse.Namespace) -> int:
    from launcher import check

    return check.plan_check(args)


def run_check_report(args: argparse.Namespace) -> int:
    from launcher import check

    return check.report(args.run_dir)


def run_on_run(args: argparse.Namespace) -> int:
    from launcher import runs

    if args.command == "resume":
        return runs.resume(args, main)
    return {"status": runs.status, "logs": runs.logs, "stop": runs.stop, "cancel": runs.cancel}[args.command](args)


def run_node(args: argparse.Namespace) -> int:
    from launcher import node

    if args.plan is None:
        return node.run_at_rendezvous(args)
    node.run_node(args.plan, args.node_rank)
    raise AssertionError("execve does not return")


def run_init(args: argparse.Namespace) -> int:
    """A folder to work in for those who installed the package and have no checkout.

    launcher/starter/ holds links to the repository's configs/ and slurm/; in a wheel it holds the files themselves.
    """
    folder: Path = args.dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LaunchError(f"{folder}: exists and is not an empty folder; choose another name, nothing was written")
    starter, schema = Path(__file__).with_name("starter"), "config.schema.json"
    for source in sorted([*starter.glob("configs/**/*.yaml"), *starter.glob("slurm/*.sh")]):
        copy = folder / source.relative_to(starter)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8").replace(f"../simclr_dist/{schema}", f"../{schema}"), "utf-8")
        copy.chmod(source.stat().st_mode & 0o777 | 0o600)
    shutil.copyfile(Path(simclr_dist.__file__).parent / schema, folder / schema)
    text = (starter / "README.md").read_text(encoding="utf-8")
    text = text.format(name=folder.resolve().name, version=simclr_dist.__version__, schema=schema)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{folder}: configurations, SLURM scripts, and README.md with the next commands")
    return Exit.OK


def run_job(args: argparse.Namespace) -> int:
    from launcher import slurm_job

    return slurm_job.run(args)


def run_check_job(args: argparse.Namespace) -> int:
    from launcher import check

    return check.run_in_job(args)


def run_plan(args: argparse.Namespace) -> int:
    from launcher import slurm_job

    return slurm_job.plan_here(args)


def run_finish(args: argparse.Namespace) -> int:
    from launcher import slurm_job

    return slurm_job.finish(args.run_dir, args.rc)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    **dict.fromkeys(("local", "slurm", "hosts"), run_backend),
    **dict.fromkeys(("status", "logs", "stop", "cancel", "resume"), run_on_run),
    "init": run_init,
    "check": run_check,
    "node": run_node,
    "job": run_job,
    "check-job": run_check_job,
    "plan": run_plan,
    "finish": run_finish,
    "plan-check": run_plan_check,
    "check-report": run_check_report,
}
TRAINING = ("local", "hosts", "resume", "node", "job", "finish")
"""Commands in which more is at stake than what they print."""


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.command in TRAINING and not getattr(args, "dry_run", False):
            make_output_safe()  # the training dies with this process, and this process must not die of a word
        with escaped_output():
            return int(COMMANDS[args.command](args))
    except LaunchError as error:
        print(f"launcher: {message(error)}", file=sys.stderr)
        return int(error.exit_code)
    except ConfigError as error:
        print(message(error), file=sys.stderr)
        return int(Exit.USAGE)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has ended (`launcher … | head`). The interpreter's last flush must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.FAILED)
    except OSError as error:  # a full or vanished disk, a folder without permission
        print(f"launcher: {message(error)}", file=sys.stderr)
        return int(Exit.FAILED)


if __name__ == "__main__":
    sys.exit(main())
