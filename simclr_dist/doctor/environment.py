"""Environment variables that change what a training does, most of them set by somebody else long ago."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from simclr_dist.doctor.finding import Finding, Level
from simclr_dist.parallel.environment import Found, Treatment, Variables, look_up

SET_BY_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PET_.*|ACCELERATE_.*"
)

# Beside the table that training itself follows (parallel/environment.py): what a shell should not hold, and what
# reaches other libraries. (names, level, what it does and what to do). The first that matches counts.
INHERITED: tuple[tuple[str, Level, str], ...] = (
    ("NUMBA_DISABLE_JIT", "problem", "the loader's kernels cannot run uncompiled: unset it"),
    ("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)", "warning",
     "left by another launcher: a training started by hand would wait for ranks that do not exist: unset it"),
    ("PET_.*|TORCHELASTIC_.*", "warning", "overrides torchrun's and accelerate's options: unset it"),
    ("(OMP|GOMP|KMP)_(PROC_BIND|PLACES|CPU_AFFINITY|AFFINITY)", "warning",
     "ties threads to CPUs, of all processes to the same ones: unset it"),
    ("NUMBA_(NUM_THREADS|THREADING_LAYER.*)", "ok", "has no effect: the loader's threads are its own"),
    ("NUMBA_CACHE_DIR", "ok", "compiled code is kept there: on a cluster, on a local disk"),
    ("TORCH_SHOW_CPP_STACKTRACES|NCCL_DEBUG", "warning", "meant for finding faults, and wordy: unset it afterwards"),
    ("NCCL_(P2P|SHM|IB|NVLS|NET_GDR)_?(DISABLE|LEVEL|ENABLE)", "warning",
     "switches off a way between GPUs; collectives may be many times slower: unset it unless you know why it is there"),
    ("(NCCL|GLOO)_SOCKET_IFNAME", "ok", "must name the interface that leads to the other nodes, on every node"),
    ("PYTHONPATH", "ok", "modules there come before installed ones"),
    ("PYTHONHOME|PYTHONOPTIMIZE|PYTHONSTARTUP|PYTHONINSPECT", "warning", "changes how Python runs: unset it"),
    ("LD_PRELOAD", "warning", "is loaded into every process: unset it unless you mean it"),
    ("LD_LIBRARY_PATH", "ok", "libraries there come before those that torch brings: unset it if CUDA does not load"),
    ("SIMCLR_(EXPECTED_WORLD_SIZE|ATTEMPT|STOP_SIGNAL|CHECKED)", "warning",
     "set by our launcher for its workers: unset it"),
    ("SLURM_JOB_ID", "ok", "this shell is inside a job: `python -m launcher check slurm` looks at its nodes"),
)  # fmt: skip
LATER: tuple[tuple[str, Level, str], ...] = (
    ("NCCL_.*|GLOO_.*", "ok", "reaches NCCL or gloo as it is"),
    ("SIMCLR_\\w+", "ok", "read by this project"),
)
ADVICE: dict[Treatment, tuple[Level, str]] = {
    "used": ("ok", ""),
    "refused": ("problem", "a training refuses it: unset it"),
    "ignored": ("warning", "a training ignores it"),
    "said": ("warning", "unset it unless you mean it"),
}


def examine_environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that change what a training does, most of them set by somebody else long ago."""
    rows = [finding for name in sorted(environ) if (finding := _examine(name, environ[name])) is not None]
    yield from rows or [Finding("ok", "environment", "no variable is set that changes how training behaves")]


def _examine(name: str, value: str) -> Finding | None:
    shown = (value if len(value) <= 60 else value[:57] + "...") or "(empty)"
    if found := _first(INHERITED, name):
        return Finding(found[0], name, shown, found[1])
    if row := look_up(name):
        level, advice = treated(Found(name, value, row))
        return Finding(level, name, shown, advice)
    if found := _first(LATER, name):
        return Finding(found[0], name, shown, found[1])
    return None


def treated(found: Found) -> tuple[Level, str]:
    """How the doctor shows what training does with a variable, or with a key of accelerate's configuration."""
    row: Variables = found.row
    level, advice = ADVICE[row.treatment] if found.counts else ("ok", "")
    return level, f"{row.meaning}: {advice}" if advice else row.meaning


def _first(rows: tuple[tuple[str, Level, str], ...], name: str) -> tuple[Level, str] | None:
    return next(((level, meaning) for names, level, meaning in rows if re.fullmatch(names, name)), None)
