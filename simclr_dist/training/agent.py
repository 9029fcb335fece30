"""What the launcher starts on each node: checks the training, then becomes `accelerate launch` and looks after workers.

    python -m simclr_dist.training.agent RUN [CONFIG key=value …] -- OPTIONS OF accelerate launch

Without CONFIG nothing is checked: another node does it, or an earlier attempt has.

One process does both, so that torch is imported once. What a worker has said already is not said again: accelerate's
own traceback about it is left out.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from simclr_dist.config import load_config
from simclr_dist.errors import UserError
from simclr_dist.run.layout import RunDir, newest_step, write_record
from simclr_dist.run.output import Recorder
from simclr_dist.run.owner import refuse_if_owned
from simclr_dist.run.status import attempt_name, read_status, write_status
from simclr_dist.safe_text import message
from simclr_dist.streams import make_output_safe

ACCELERATE = "accelerate.commands.launch"


def main(argv: list[str]) -> NoReturn:
    make_output_safe()
    at = argv.index("--")
    run_dir, *training = argv[:at]
    if training:
        check(Path(run_dir), training)
    sys.exit(launch(Path(run_dir), argv[at + 1 :]))


def check(run_dir: Path, training: list[str]) -> None:
    """Ends this process where the training of that command line cannot work."""
    try:
        if run_dir.is_dir():
            refuse_if_owned(run_dir)  # first: a run of another training gets no status of ours
        world_size = int(os.environ["SIMCLR_EXPECTED_WORLD_SIZE"])
        config = load_config(training[0], training[1:], world_size=world_size)
        from simclr_dist.training.preflight import check_training

        check_training(config).to_environment()
    except UserError as error:
        if error.reason is not None:
            step = newest_step(run_dir)
            write_status(run_dir, "failed", step=step, reason=error.reason, message=str(error))
        print(message(error), file=sys.stderr, flush=True)
        sys.exit(2)


def launch(run_dir: Path, argv: list[str]) -> int:
    """Runs `accelerate launch` in this process; its exit code."""
    from simclr_dist.parallel.distributed import run_agent

    sys.argv = [ACCELERATE, *argv]

    def run() -> None:
        with Recorder(run_dir, attempt_name()):
            runpy.run_module(ACCELERATE, run_name="__main__", alter_sys=True)

    end = run_agent(run)
    if end.failed_rank is not None:
        say_unless_known(run_dir, end.how)
        failure = {"rank": end.failed_rank, "how": end.how, "time": time.time()}
        with suppress(OSError):
            write_record(RunDir(run_dir).rank_failure(attempt_name(), end.failed_rank), failure)
    return end.code


def say_unless_known(run_dir: Path, how: str) -> None:
    """Unless a worker has written down, and so has printed, why this attempt fails."""
    status = read_status(run_dir)
    if status is None or status.attempt != attempt_name() or status.state != "failed":
        print(message(how), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
