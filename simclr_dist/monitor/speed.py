"""Images a second: the one definition, for the terminal, log.jsonl, TensorBoard, the report and the demo.

Time counts from the first step of this start of the run. Left out are evaluations, the gallery and waiting for
checkpoints: they come between steps, and how often is a setting. All else counts: compiling at the first step, waiting
for images, health checks, logging, the turn of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LAST_INTERVAL = "speed/images_per_s"
"""Tag: since the log line before."""
SINCE_START = "speed/images_per_s_since_start"
"""Tag: since this start of the run."""


class Speed:
    """The clock of one start of a run."""

    def __init__(self, samples_seen: int, clock: Callable[[], float] = time.monotonic) -> None:
        """samples_seen: where this start goes on."""
        self.first_sample = samples_seen
        self._clock = clock
        self._began_s = clock()
        self.paused_s = 0.0
        """Of evaluations, galleries and saves, so far."""
        self._last_s, self._last_sample = 0.0, samples_seen

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begin = self._clock()
        try:
            yield
        finally:
            self.paused_s += self._clock() - begin

    def trained_s(self) -> float:
        """The time that counts, since the start."""
        return max(self._clock() - self._began_s - self.paused_s, 1e-9)

    def interval_s(self) -> float:
        """The time that counts, since the last reading."""
        return max(self.trained_s() - self._last_s, 1e-9)

    def since_start(self, samples_seen: int) -> float:
        return (samples_seen - self.first_sample) / self.trained_s()

    def read(self, samples_seen: int) -> dict[str, float]:
        """Both figures by tag; the next interval begins now."""
        figures = {
            LAST_INTERVAL: (samples_seen - self._last_sample) / self.interval_s(),
            SINCE_START: self.since_start(samples_seen),
        }
        self._last_s, self._last_sample = self.trained_s(), samples_seen
        return figures
