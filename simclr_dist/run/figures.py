"""The figures that runs have recorded, to sort and compare runs by. Imports no torch.

A figure has the name it has in log.jsonl and TensorBoard (`eval/knn_top1`, `train/loss`); `evaluate/linear_top1` is
what `simclr-dist evaluate linear` found, by RUN/evaluations.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.run.layout import NUMBER, RunDir, is_a, is_share, read_records

_OF_EVALUATIONS = "top1", "top5", "spearman", "r1", "r10"


@dataclass(frozen=True)
class Figure:
    """value: the last one recorded, at `step`. highest, lowest: of the run, each with its step."""

    value: float
    step: int
    highest: tuple[float, int]
    lowest: tuple[float, int]

    def best(self, *, lowest: bool) -> tuple[float, int]:
        return self.lowest if lowest else self.highest


def figures_of(run_dir: Path) -> dict[str, Figure]:
    """By name. What cannot be read is left out: a record may come from anybody, or be half written."""
    run = RunDir(run_dir)
    found: dict[str, Figure] = {}
    for record in read_records(run.log):
        _take(found, record, ((name, value) for name, value in record.items() if "/" in name))
    for record in read_records(run.evaluations, method=str):
        _take(found, record, ((f"evaluate/{record['method']}_{key}", record.get(key)) for key in _OF_EVALUATIONS))
    return found


def _take(found: dict[str, Figure], record: Mapping[str, Any], values: Iterable[tuple[str, Any]]) -> None:
    step = record.get("step")
    if not is_a(step, int):
        return
    for name, value in values:
        if not is_a(value, NUMBER) or (_is_accuracy(name) and not is_share(value)):
            continue
        here = (float(value), step)
        past = found.get(name)
        highest = here if past is None or here[0] > past.highest[0] else past.highest
        lowest = here if past is None or here[0] < past.lowest[0] else past.lowest
        found[name] = Figure(*here, highest, lowest)


def _is_accuracy(name: str) -> bool:
    return name.endswith(("_top1", "_top5", "_r1", "_r10"))


def checkpoint_of(run_dir: Path, step: int) -> Path | None:
    """The checkpoint of that step, if it is still there."""
    path = RunDir(run_dir).checkpoint(step)
    return path if path in RunDir(run_dir).list_checkpoints() else None


def is_run(folder: Path) -> bool:
    run = RunDir(folder)
    return any(path.exists() for path in (run.status, run.config, run.checkpoints))


def runs_in(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The runs in a folder and in its folders, as those of a sweep, sorted; nothing inside a run. Raises OSError."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        if is_run(path):
            yield path
        elif depth > 1 and not path.is_symlink():
            try:
                yield from runs_in(path, depth - 1)
            except PermissionError:  # somebody else's
                continue
