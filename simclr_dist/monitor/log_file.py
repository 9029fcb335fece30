"""RUN/log.jsonl: one JSON object for each point of the curves."""

from __future__ import annotations

import time
from pathlib import Path

from simclr_dist.monitor.events import Event, Figures, Sink
from simclr_dist.run.layout import RecordFile, is_a, rewrite_records


class LogFile(Sink):
    """Appends to `path`. Lines after `samples_seen` are removed: a resumed run repeats those steps."""

    def __init__(self, path: Path, samples_seen: int) -> None:
        self.name = path.name
        self.remark: str | None = None
        """What the records of an earlier start were not whole in."""
        if path.exists():
            self.remark = rewrite_records(
                path, lambda line: is_a(seen := line.get("samples_seen"), int) and seen <= samples_seen
            )
        self._file = RecordFile(path)

    def show(self, event: Event) -> None:
        if isinstance(event, Figures):
            place = {"step": event.step, "samples_seen": event.samples_seen, "time": round(time.time(), 3)}
            self._file.append({**place, **event.values})

    def close(self) -> None:
        self._file.close()
