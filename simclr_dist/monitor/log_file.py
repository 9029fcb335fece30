"""RUN/log.jsonl: one JSON object for each point of the curves."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from simclr_dist.monitor.events import Event, Figures, Sink
from simclr_dist.run.layout import read_records


class LogFile(Sink):
    """Appends to `path`. Lines after `samples_seen` are removed: a resumed run repeats those steps."""

    def __init__(self, path: Path, samples_seen: int) -> None:
        self.name = path.name
        if path.exists():
            lines = [line for line in read_records(path) if is_at_most(line.get("samples_seen"), samples_seen)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def show(self, event: Event) -> None:
        if isinstance(event, Figures):
            # JSON has no NaN: a step that was skipped has no loss.
            values = {tag: value if math.isfinite(value) else None for tag, value in event.values.items()}
            line = {"step": event.step, "samples_seen": event.samples_seen, "time": round(time.time(), 3), **values}
            print(json.dumps(line), file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()


def is_at_most(value: object, limit: int) -> bool:
    return isinstance(value, int) and value <= limit
