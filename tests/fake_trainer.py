"""Replaces simclr_dist.train in tests of the launcher: the same command line, environment and files, without torch.

fake.json in the working directory says how it behaves:
  steps, step_s          how long it trains
  every                  a checkpoint each so many steps
  import_s               how long it takes before it listens to signals
  end: {restart: [steps, how]}  in that attempt ("*": any other), after so many of its steps:
                         `raise`, `kill` (its own process, without a status) or a reason such as `nan_abort`
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from simclr_dist.run.layout import RunDir, step_of, write_record
from simclr_dist.run.status import write_status

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ATTEMPT = os.environ["SIMCLR_ATTEMPT"]


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    config, *overrides = sys.argv[1:]
    behaviour = json.loads(Path("fake.json").read_text()) if Path("fake.json").exists() else {}
    values = yaml.safe_load(Path(config).read_text()) | dict(word.split("=", 1) for word in overrides)
    run_dir = Path(values.get("runs_dir", "runs")) / values["name"]
    assert int(os.environ["SIMCLR_EXPECTED_WORLD_SIZE"]) == WORLD_SIZE
    (run_dir / "ranks").mkdir(parents=True, exist_ok=True)
    seen = {"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "file": __file__}
    write_record(run_dir / "ranks" / f"{ATTEMPT}-{RANK}.json", seen)
    files = RunDir(run_dir)
    step = max(map(step_of, files.list_checkpoints()), default=0)

    def report(state: str, **why: str) -> None:
        if RANK == 0:
            write_status(run_dir, state, step=step, **why)

    report("running")
    time.sleep(behaviour.get("import_s", 0))
    asked = []
    for name in (os.environ["SIMCLR_STOP_SIGNAL"], "TERM"):
        signal.signal(getattr(signal, f"SIG{name}"), lambda number, frame: asked.append(number))

    def save() -> None:
        if RANK == 0:
            files.checkpoint(step).mkdir(parents=True, exist_ok=True)

    restart = ATTEMPT.rpartition(".")[2].partition("-")[0]
    endings = behaviour.get("end", {})
    end_after, how = endings.get(restart, endings.get("*", (0, "")))
    end_step = step + end_after if how else -1
    while step < behaviour.get("steps", 5):
        time.sleep(behaviour.get("step_s", 0.05))
        step += 1
        if step == end_step and RANK == 0:
            print(f"rank {RANK}: {how} as told", file=sys.stderr, flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            report("failed", reason="crash" if how == "raise" else how, message=f"{how} as told")
            os._exit(1)
        if step % behaviour.get("every", 1) == 0:
            save()
        stopped = files.stop.exists()
        if asked or stopped or files.stop_requests():
            save()
            print(f"rank {RANK} of {WORLD_SIZE}: asked to stop at step {step}", flush=True)
            return report("stopped" if stopped else "preempted")
    save()
    print(f"rank {RANK} of {WORLD_SIZE}: finished at step {step}", flush=True)
    return report("finished")


if __name__ == "__main__":
    main()
