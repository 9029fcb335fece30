"""Interrupts a training again and again, and compares what it becomes with one that was left alone.

    python tools/punisher.py configs/smoke.yaml train.epochs=60 --faults 30 --seed 0

Two runs of one configuration, each with `--processes` processes through `python -m launcher local`: the first
undisturbed, the second hit by `--faults` random faults (FAULTS) at random steps and started again after each. Some
faults end the processes; others send the run back to an earlier checkpoint, edit settings that train nothing, ask for
another seed, slow the disk or fill it. Both runs must end with the same parameters, buffers and optimiser state, byte
for byte. Prints a line for each fault; exit code 0 if they are the same, 1 if not, 2 if a start fails by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 180
TO_THE_END_S = 3600


class PunisherError(Exception):
    """A start failed by itself, or a process outlived its fault."""


@dataclass
class Run:
    """One run directory and the launcher that trains in it, if one does."""

    config: str
    overrides: list[str]
    runs_dir: Path
    name: str
    processes: int
    launcher: subprocess.Popen[bytes] | None = None
    edits: list[str] = field(default_factory=list)
    """Settings of the next start only."""
    disk: str = ""
    """How the disk behaves in the next start only; see DISKS."""
    old_log: tuple[int, int] | None = None
    """Inode and size of log.jsonl before the start."""

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    def start(self) -> None:
        command = [sys.executable, "-m", "launcher", "local", self.config, "--nproc", str(self.processes)]
        command += [*self.overrides, f"runs_dir={self.runs_dir}", f"name={self.name}", *self.edits]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if self.disk:
            env["PYTHONPATH"] = os.pathsep.join([str(self._disk_module()), env.get("PYTHONPATH", "")])
        self.edits, self.disk = [], ""
        self.old_log = self._log_as_it_is()
        with (self.runs_dir / f"{self.name}.log").open("ab") as log:
            self.launcher = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def _disk_module(self) -> Path:
        """A folder whose sitecustomize.py Python imports first."""
        folder = self.runs_dir / f"disk-{self.disk}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(DISKS[self.disk])
        return folder

    def last_step(self) -> int:
        """Of this start, once it trains; of the run's log before."""
        try:
            lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
        except FileNotFoundError:
            return 0

    def trains(self) -> bool:
        """Whether this start has written to the log: it is cut, where a step is repeated, or grows."""
        return self._log_as_it_is() != self.old_log

    def _log_as_it_is(self) -> tuple[int, int] | None:
        try:
            log = (self.folder / "log.jsonl").stat()
        except FileNotFoundError:
            return None
        return log.st_ino, log.st_size

    def checkpoints(self) -> list[Path]:
        """Those that count, oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("step_*") if path.name[5:].isdigit())

    def saved_step(self) -> int:
        return max((int(path.name[5:]) for path in self.checkpoints()), default=0)

    def state(self) -> str:
        try:
            return str(json.loads((self.folder / "status.json").read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError):
            return ""

    def living(self) -> dict[int, bytes]:
        """Process number and command line of everything that works on this run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"name={self.name}".encode() in command.split(b"\0") and str(self.runs_dir).encode() in command:
                found[int(folder.name)] = command
        return found

    def ranks(self) -> list[int]:
        return sorted(
            pid
            for pid, command in self.living().items()
            if b"simclr_dist.train" in command and b"simclr_dist.training.agent" not in command
        )

    def wait_for_step(self, step: int) -> bool:
        """False if the run came to its end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.trains() or self.last_step() < step:
            if self.launcher is None or self.launcher.poll() is not None:
                if self.state() == "finished":
                    return False
                raise PunisherError(f"a start ended by itself; see {self.runs_dir / self.name}.log")
            if time.monotonic() > deadline:
                raise PunisherError(f"step {step} was not reached in {PATIENCE_S} s")
            time.sleep(0.02)
        return True

    def wait_for_end(self, patience_s: float = PATIENCE_S) -> None:
        """Until no process of the run is left."""
        deadline = time.monotonic() + patience_s
        while self.living() or (self.launcher is not None and self.launcher.poll() is None):
            if time.monotonic() > deadline:
                raise PunisherError(f"still alive after {patience_s} s: processes {sorted(self.living())}")
            time.sleep(0.05)

    def kill_all(self) -> None:
        for pid in self.living():
            kill(pid, signal.SIGKILL)

    def digest(self) -> str:
        newest = self.checkpoints()[-1]
        files = [newest / name for name in ("model.safetensors", "optimizer.safetensors")]
        return newest.name + " " + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---------------------------------------------------------------------------------------------------------------------
# What can happen. Each is given the run and a source of chance.


def signal_to_launcher(run: Run, chance: random.Random) -> None:
    assert run.launcher is not None
    run.launcher.send_signal(signal.SIGTERM)


def signal_to_a_rank(number: signal.Signals) -> Callable[[Run, random.Random], None]:
    def fault(run: Run, chance: random.Random) -> None:
        kill(chance.choice(run.ranks()), number)

    return fault


def kill_launcher(run: Run, chance: random.Random) -> None:
    assert run.launcher is not None
    run.launcher.kill()


def kill_everything(run: Run, chance: random.Random) -> None:
    run.kill_all()


def save_then_kill(run: Run, chance: random.Random) -> None:
    (run.folder / "SAVE").touch()
    time.sleep(chance.uniform(0.0, 3.0))
    run.kill_all()


def stop_file(run: Run, chance: random.Random) -> None:
    (run.folder / "STOP").touch()


def damage_newest(how: Callable[[Path, random.Random], None]) -> Callable[[Run, random.Random], None]:
    def fault(run: Run, chance: random.Random) -> None:
        run.kill_all()
        run.wait_for_end()
        saved = run.checkpoints()
        if len(saved) > 1:  # with none left the run rightly refuses to go on
            how(saved[-1] / chance.choice(["model.safetensors", "optimizer.safetensors", "state.json"]), chance)

    return fault


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip_a_bit(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def leave_half_a_save(run: Run, chance: random.Random) -> None:
    run.kill_all()
    run.wait_for_end()
    half = run.folder / "checkpoints" / f".tmp-step_99999999-{chance.randrange(10**6)}"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")


def go_back(run: Run, chance: random.Random) -> None:
    """By the command, or by the next start."""
    run.kill_all()
    run.wait_for_end()
    if not (saved := run.checkpoints()):
        return
    to = chance.choice(saved)
    if chance.random() < 0.5:
        run.edits = [f"resume={to}"]
        return
    command = [sys.executable, "-m", "simclr_dist.cli", "runs", "rewind", str(run.folder), str(int(to.name[5:]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PunisherError(f"the way back to {to} was refused: {done.stderr}")


def edit_settings(run: Run, chance: random.Random) -> None:
    """Those that say how a run is watched and saved."""
    run.kill_all()
    run.wait_for_end()
    run.edits = chance.sample(
        [
            *("checkpoint.keep=7", "checkpoint.every_steps=3", "checkpoint.in_background=false"),
            *("monitor.health_every_steps=4", "timeout.save_s=300", "checkpoint.milestone_epochs=1"),
        ],
        3,
    )


def ask_for_another_seed(run: Run, chance: random.Random) -> None:
    """Refused; the run is as it was."""
    run.kill_all()
    run.wait_for_end()
    if not run.checkpoints():
        return
    before = run.digest()
    run.edits = ["seed=123456"]
    run.start()
    run.wait_for_end()
    if run.state() != "failed" or run.digest() != before:
        raise PunisherError("another seed was not refused, or left a trace")


def disk(kind: str) -> Callable[[Run, random.Random], None]:
    def fault(run: Run, chance: random.Random) -> None:
        run.kill_all()
        run.wait_for_end()
        run.disk = kind

    return fault


DISKS = {
    "slow": """
import os, time
_fsync = os.fsync
def slowly(descriptor):
    time.sleep(0.3)
    _fsync(descriptor)
os.fsync = slowly
""",
    # Two of three saves fail: never three in a row, which rightly ends a run.
    "full": """
import os
_rename, _tried = os.rename, [0]
def fails(source, target, **settings):
    if os.path.basename(str(source)).startswith(".tmp-step"):
        _tried[0] += 1
        if _tried[0] % 3:
            raise OSError(28, "No space left on device")
    _rename(source, target, **settings)
os.rename = fails
""",
}

FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "SIGTERM to the launcher": signal_to_launcher,
    "SIGTERM to a rank": signal_to_a_rank(signal.SIGTERM),
    "SIGUSR1 to a rank": signal_to_a_rank(signal.SIGUSR1),
    "kill -9 of a rank": signal_to_a_rank(signal.SIGKILL),
    "a rank freezes": signal_to_a_rank(signal.SIGSTOP),
    "kill -9 of the launcher": kill_launcher,
    "kill -9 of everything": kill_everything,
    "SAVE, then kill -9 of everything": save_then_kill,
    "STOP": stop_file,
    "kill -9, newest checkpoint truncated": damage_newest(truncate),
    "kill -9, a bit flipped in it": damage_newest(flip_a_bit),
    "kill -9, half a save left behind": leave_half_a_save,
    "kill -9, then back to an earlier checkpoint": go_back,
    "kill -9, then other settings of saving": edit_settings,
    "kill -9, then another seed is asked for": ask_for_another_seed,
    "kill -9, then a slow disk": disk("slow"),
    "kill -9, then a disk nearly full": disk("full"),
}


def punish(run: Run, total_steps: int, faults: int, chance: random.Random) -> None:
    """Starts the run until it has met all faults and come to its end."""
    # Every fault at least once, as far as they go; then at random.
    names = chance.sample(list(FAULTS), min(faults, len(FAULTS)))
    names += chance.choices(list(FAULTS), k=faults - len(names))
    chance.shuffle(names)
    for number, name in enumerate(names, 1):
        before = run.saved_step()
        # What is left is divided so that the last fault still finds a run to hit.
        ahead = max(1, (total_steps - before) // (faults - number + 2))
        target = min(total_steps - 1, before + chance.randint(1, ahead))
        run.start()
        if not run.wait_for_step(target):
            raise PunisherError(f"the run ended before fault {number}: give it more steps (train.epochs=…)")
        time.sleep(chance.uniform(0.0, 0.2))
        hit, started = run.last_step(), time.monotonic()
        FAULTS[name](run, chance)
        run.wait_for_end()
        print(f"{number:3}  step {hit:5}  {name:44} over after {time.monotonic() - started:5.1f} s", flush=True)
    run.start()
    run.wait_for_end(TO_THE_END_S)
    if run.state() != "finished":
        raise PunisherError(f"the last start did not finish; see {run.runs_dir / run.name}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="an empty folder for both runs; default: a temporary one")
    args = parser.parse_intermixed_args()
    runs_dir = args.keep or Path(tempfile.mkdtemp(prefix="punisher-"))
    runs_dir.mkdir(exist_ok=True)
    settings = [*args.overrides, "checkpoint.every_steps=5", "monitor.log_every_steps=1", "timeout.step_s=8"]
    undisturbed, punished = (
        Run(args.config, settings, runs_dir.absolute(), name, args.processes) for name in ("undisturbed", "punished")
    )
    try:
        undisturbed.start()
        undisturbed.wait_for_end(TO_THE_END_S)
        if undisturbed.state() != "finished":
            raise PunisherError(f"the undisturbed run failed; see {runs_dir}/undisturbed.log")
        punish(punished, undisturbed.last_step(), args.faults, random.Random(args.seed))
    except PunisherError as error:
        print(f"punisher: {error}", file=sys.stderr)
        return 2
    finally:
        for run in (undisturbed, punished):
            run.kill_all()
    same = undisturbed.digest() == punished.digest()
    print(f"undisturbed  {undisturbed.digest()}\npunished     {punished.digest()}")
    print("the same bytes" if same else "DIFFERENT")
    if args.keep is None and same:
        shutil.rmtree(runs_dir)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
