"""What a run was made with: the commit and versions that can change its result, for its files and its checkpoints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from simclr_dist.atomic import replace_text
from simclr_dist.parallel.environment import found_in
from simclr_dist.run.layout import RunDir, append_record, read_record, read_records
from simclr_dist.run.status import attempt_name


def record(run_dir: Path, seed: int, implementations: Mapping[str, str]) -> None:
    """Adds a line for this start to environment.jsonl. Raises OSError.

    implementations: what computes the parts of a step for which there are several programs, by part.
    """
    facts = {"git": git_id(), "versions": versions(), "seed": seed, "attempt": attempt_name()}
    facts["implementations"] = dict(implementations)
    if spoken_of := {entry.name: entry.shown for entry in found_in(os.environ) if entry.counts}:
        facts["environment"] = spoken_of
    append_record(RunDir(run_dir).environment, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})


def record_settings(run_dir: Path, settings: str) -> None:
    """Writes `settings` to config.yaml. Raises OSError."""
    replace_text(RunDir(run_dir).config, settings)


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    names = ("simclr-dist", "torch", "torchvision", "accelerate", "numpy", "ffcv", "numba", "triton")
    found = {"python": platform.python_version(), "platform": platform.platform(), "dropout": "keyed"}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def drew_from_generator(run_dir: Path) -> bool:
    """Whether the run's last start had dropout masks of torch's generator, as release 0.1 did."""
    starts = read_records(RunDir(run_dir).environment, versions=dict | None)
    return bool(starts) and "dropout" not in (starts[-1].get("versions") or {})


def git_id() -> str | None:
    """The commit of the code, with `-dirty` if files have changed; None outside a checkout.

    Code that was kept for a job says itself which commit it is: git would name that of the folder around it.
    """
    package = Path(__file__).parents[1]
    if (kept := read_record(RunDir.record_of_code(package.parent))) is not None:
        return str(kept["git"]) if kept.get("git") else None
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
