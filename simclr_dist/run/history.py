"""What a run keeps of its past: which checkpoints stay, what a rewind sets aside, and the story of its starts.

Checkpoints whose names are step_… and no more form one line: each was trained from the one before it. What has left
the line has a suffix: `.corrupt`, or `.superseded-1` after the first rewind. A mark inside a checkpoint says why it is
kept: `milestone`, or `best.json` with the accuracy it had.

RUN/lineage.jsonl tells the story: a line for each start, with its settings, and for each rewind. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.run.layout import (
    NUMBER,
    RunDir,
    append_record,
    is_a,
    is_checkpoint,
    is_share,
    read_record,
    read_records,
    step_of,
    write_record,
)
from simclr_dist.run.status import attempt_name
from simclr_dist.safe_text import mask


def marks(*, milestone: bool, best_knn_top1: float | None) -> dict[str, str]:
    """Names and contents of the files that mark a checkpoint."""
    found = {RunDir.milestone_mark(Path()).name: ""} if milestone else {}
    if best_knn_top1 is not None:
        found[RunDir.best_mark(Path()).name] = json.dumps({"knn_top1": best_knn_top1}) + "\n"
    return found


def best_so_far(run_dir: Path) -> tuple[Path, float] | None:
    """The checkpoint with the best accuracy among those marked so, and that accuracy; the older one of two equal."""
    best: tuple[Path, float] | None = None
    for path in RunDir(run_dir).list_checkpoints():
        mark = read_record(RunDir.best_mark(path))
        accuracy = mark.get("knn_top1") if mark else None
        if is_share(accuracy) and (best is None or accuracy > best[1]):
            best = path, float(accuracy)
    return best


def prune(run_dir: Path, keep: int) -> list[str]:
    """Removes all but the newest `keep` checkpoints, the milestones and the best, and what a killed save has left.

    Returns a sentence for each thing that could not be removed: a checkpoint too many is no reason to fail.
    """
    problems = _mark_what_release_0_1_kept(run_dir)
    best = best_so_far(run_dir)
    for path in RunDir(run_dir).list_checkpoints()[:-keep]:
        if RunDir.milestone_mark(path).exists() or (best is not None and path == best[0]):
            continue
        try:
            os.rename(path, path.with_name(f".trash-{path.name}-{secrets.token_hex(3)}"))
        except OSError as error:
            problems.append(f"{path} cannot be removed: {error.strerror or error}")
    folder = RunDir(run_dir).checkpoints
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
        if leftover.exists():
            problems.append(f"{leftover} cannot be removed")
    return problems


def _mark_what_release_0_1_kept(run_dir: Path) -> list[str]:
    """Release 0.1 listed what it kept in one file. If that cannot be read, everything there is kept."""
    file, there = RunDir(run_dir).kept_by_release_0_1, RunDir(run_dir).list_checkpoints()
    if not file.exists():
        return []
    kept, problems = read_record(file) or {}, []
    milestones, best, accuracy = (kept.get(key) for key in ("milestones", "best_step", "best_knn_top1"))
    if not (isinstance(milestones, list) and is_a(best, int | None) and is_a(accuracy, NUMBER)):
        problems.append(f"{file} is damaged: all {len(there)} checkpoints beside it are kept as milestones")
        milestones, best = list(map(step_of, there)), None
    try:
        for path in there:
            if step_of(path) in milestones:
                RunDir.milestone_mark(path).touch()
            if step_of(path) == best:
                write_record(RunDir.best_mark(path), {"knn_top1": accuracy})
        os.rename(file, file.with_suffix(".old"))
    except OSError as error:
        problems.append(f"{file} cannot be taken over: {error.strerror or error}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Rewinds


def rewind(run_dir: Path, to: str, after_step: int) -> list[str]:
    """Takes the checkpoints of later steps than `after_step` out of the line, by a suffix; returns their new names.

    to: what the run goes back to, for the record. A rewind that was cut off is completed by `settle`. Raises OSError.
    """
    names = [path.name for path in RunDir(run_dir).list_checkpoints() if step_of(path) > after_step]
    if not names:
        return []
    folder = RunDir(run_dir).checkpoints
    suffixes = (re.search(r"\.superseded-(\d+)$", path.name) for path in folder.glob("step_*"))
    number = 1 + max((int(suffix[1]) for suffix in suffixes if suffix), default=0)
    log = RunDir(run_dir).log
    if log.exists():  # the run's own loses the lines after the step that it goes back to
        shutil.copyfile(log, log.with_name(f"{log.stem}.superseded-{number}{log.suffix}"))
    _record(run_dir, "rewind", to=to, set_aside=names, number=number)
    return _set_aside(run_dir, names, number)


def settle(run_dir: Path) -> list[str]:
    """Completes a rewind that a kill has cut off; returns the new names. Raises OSError."""
    events = [line for line in read_records(RunDir(run_dir).lineage) if line.get("event") in ("rewind", "rewound")]
    if not events or events[-1]["event"] == "rewound":
        return []
    names, number = events[-1].get("set_aside"), events[-1].get("number")
    if not isinstance(names, list) or not is_a(number, int) or not 0 < number < 10**6:
        return []
    return _set_aside(run_dir, [name for name in names if isinstance(name, str) and is_checkpoint(Path(name))], number)


def _set_aside(run_dir: Path, names: list[str], number: int) -> list[str]:
    folder, aside = RunDir(run_dir).checkpoints, []
    for name in names:
        target = f"{name}.superseded-{number}"
        with suppress(FileNotFoundError):  # moved already, before the kill
            os.rename(folder / name, folder / target)
            aside.append(target)
    _record(run_dir, "rewound", number=number)
    return aside


def record_start(run_dir: Path, **facts: Any) -> None:
    """A start of the run: from which step and checkpoint, with which settings. Raises OSError."""
    _record(run_dir, "start", **facts)


def tell(run_dir: Path) -> Iterator[str]:
    """The starts, changes of settings and rewinds in lineage.jsonl, a line of text each. The file may be anybody's."""
    lines = read_records(RunDir(run_dir).lineage)
    for line in lines:
        when, event = str(line.get("time", "")), line.get("event")
        if event == "start":
            origin = f" from {line['from']}" if line.get("from") else ""
            yield f"{when}  started at step {line.get('step')}{origin}, processes: {line.get('world_size')}"
            if isinstance(weights := line.get("weights"), dict):
                yield f"{'':26}from the weights {weights.get('weights')} (sha256 {str(weights.get('sha256'))[:12]})"
            changed = line.get("changed")
            pairs = changed.items() if isinstance(changed, dict) else ()
            known = {str(key): (pair[0], pair[1]) for key, pair in pairs if isinstance(pair, list) and len(pair) == 2}
            yield from (f"{'':26}changed: {text}" for text in describe_changes(known))
        elif event == "end":
            yield f"{when}  {line.get('state')} at step {line.get('step')}"
        elif event == "rewind" and isinstance(line.get("set_aside"), list):
            aside = ", ".join(map(str, line["set_aside"]))
            yield f"{when}  went back to {line.get('to')}; rewind {line.get('number')} set aside {aside}"
    if lines.remark:
        yield lines.remark


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """key: a → b, for each setting by key."""
    return [f"{key}: {_shown(before)} → {_shown(after)}" for key, (before, after) in changed.items()]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else mask(str(value))


def record_end(run_dir: Path, state: str, step: int) -> None:
    """How a start ended that trained. What cannot be written is left out: status.json says it too."""
    with suppress(OSError):
        _record(run_dir, "end", state=state, step=step)


def is_finished(run_dir: Path) -> bool:
    """Whether the last start that trained came to the end of the run; one that was refused since changes nothing."""
    events = [line for line in read_records(RunDir(run_dir).lineage) if line.get("event") in ("start", "end", "rewind")]
    return bool(events) and (events[-1].get("event"), events[-1].get("state")) == ("end", "finished")


def _record(run_dir: Path, event: str, **facts: Any) -> None:
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    append_record(RunDir(run_dir).lineage, {"event": event, "time": when, "attempt": attempt_name(), **facts})
