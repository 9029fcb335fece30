"""What people watch: TensorBoard, log.jsonl, the terminal, and other loggers by name.

    tensorboard.py   curves, histograms, pictures, the projector, the page's order
    projector.py     the files of TensorBoard's embedding projector
    terminal.py      a live bar, plain lines, JSON lines or silence
    trackers.py      wandb, mlflow and their like, through Accelerate

Only the main process has a `RunMonitor`; the others get a `Monitor`, which does nothing, so the loop asks no ranks.
The axis of every curve is samples seen: it means the same for any batch size and any number of devices.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from simclr_dist.config import MonitorConfig
from simclr_dist.health.figures import Histogram
from simclr_dist.monitor.tensorboard import TensorBoard
from simclr_dist.monitor.terminal import build_terminal
from simclr_dist.monitor.trackers import Trackers


class Monitor:
    """Shows nothing. `RunMonitor` shows; both have these methods."""

    latest: Mapping[str, float] = MappingProxyType({})  # the last figure of each tag

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def say(self, text: str) -> None:
        """A line for people."""

    def warn(self, text: str) -> None:
        """A line for people who should do something."""

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        """A table for people, when the run begins and when it ends."""

    def advance(self, step: int) -> None:
        """`step` steps are done."""

    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """One point of each curve; `values` by TensorBoard tag."""

    def log_histograms(self, histograms: Mapping[str, Histogram], *, samples_seen: int) -> None:
        """By TensorBoard tag."""

    def show_pairs(self, views: Tensor, *, samples_seen: int) -> None:
        """views: float [2, n, 3, H, W], normalised. A grid, one image's two views side by side."""

    def show_neighbours(self, rows: Tensor, *, samples_seen: int) -> None:
        """rows: uint8 [q, 1 + k, S, S, 3], each a query image and its nearest neighbours, nearest first."""

    def show_embedding(self, h: Tensor, images: Tensor, labels: Sequence[str], *, samples_seen: int) -> None:
        """h [n, D], thumbnails uint8 [n, S, S, 3] and a label each, for the embedding projector."""

    def finish(self, settings: Mapping[str, Any]) -> None:
        """The run has come to its end: its settings stand beside its last figures."""


SilentMonitor = Monitor


class RunMonitor(Monitor):
    """Writes under `run_dir` and to the terminal. `samples_seen`: where a resumed run goes on; later points vanish.

    settings_of_run: the configuration, for other loggers. Raises ConfigError when a tracker cannot be had.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: MonitorConfig | None = None,
        *,
        total_steps: int,
        first_step: int,
        samples_seen: int,
        steps_per_epoch: int | None = None,
        settings_of_run: Mapping[str, Any] | None = None,
    ) -> None:
        settings = settings or MonitorConfig()
        self.run_dir = run_dir
        self.latest: dict[str, float] = {}
        self._broken: set[str] = set()
        self._terminal = build_terminal(
            settings.terminal, total_steps=total_steps, first_step=first_step, steps_per_epoch=steps_per_epoch
        )
        self._trackers = Trackers(settings.trackers, run_dir, settings_of_run or {}, self.warn)
        _drop_later_lines(run_dir / "log.jsonl", samples_seen)
        self._log = (run_dir / "log.jsonl").open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(run_dir / "tensorboard", samples_seen)

    def __enter__(self) -> RunMonitor:
        self._try("terminal", self._terminal.start)
        return self

    def __exit__(self, *exc: object) -> None:
        for name, part in (("trackers", self._trackers), ("TensorBoard", self._tensorboard), ("log.jsonl", self._log)):
            self._try(name, part.close)
        self._try("terminal", self._terminal.stop)

    def _try(self, part: str, show: Callable[[], None]) -> None:
        """Full disks, closed pipes and vanished directories end what is shown, not the training; said once a part."""
        try:
            show()
        except OSError as error:
            if part not in self._broken:
                self._broken.add(part)
                with suppress(OSError):
                    self._terminal.warn(f"{part} cannot be written to ({error}); training goes on without it")

    def say(self, text: str) -> None:
        self._try("terminal", lambda: self._terminal.say(text))

    def warn(self, text: str) -> None:
        self._try("terminal", lambda: self._terminal.warn(text))

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        self._try("terminal", lambda: self._terminal.summarize(event, title, rows))

    def advance(self, step: int) -> None:
        self._try("terminal", lambda: self._terminal.advance(step))

    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        self.latest |= values
        # JSON knows no NaN: a step that was skipped has no loss.
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3), **finite}
        self._try("TensorBoard", lambda: self._tensorboard.log(values, samples_seen))
        self._try("log.jsonl", lambda: print(json.dumps(line), file=self._log, flush=True))
        self._try("terminal", lambda: self._terminal.log(line))
        self._try("trackers", lambda: self._trackers.log(values, step=step, samples_seen=samples_seen))

    def log_histograms(self, histograms: Mapping[str, Histogram], *, samples_seen: int) -> None:
        self._try("TensorBoard", lambda: self._tensorboard.log_histograms(histograms, samples_seen))

    def show_pairs(self, views: Tensor, *, samples_seen: int) -> None:
        self._try("TensorBoard", lambda: self._tensorboard.show_pairs(views, samples_seen))

    def show_neighbours(self, rows: Tensor, *, samples_seen: int) -> None:
        self._try("TensorBoard", lambda: self._tensorboard.show_neighbours(rows, samples_seen))

    def show_embedding(self, h: Tensor, images: Tensor, labels: Sequence[str], *, samples_seen: int) -> None:
        self._try("TensorBoard", lambda: self._tensorboard.show_embedding(h, images, labels, samples_seen=samples_seen))

    def finish(self, settings: Mapping[str, Any]) -> None:
        final = {tag: value for tag, value in self.latest.items() if tag.startswith(("eval/", "train/loss"))}
        if final:
            self._try("TensorBoard", lambda: self._tensorboard.compare_runs(settings, final))


def _drop_later_lines(path: Path, samples_seen: int) -> None:
    """A run that goes on from an earlier checkpoint repeats steps; their old lines would stand twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["samples_seen"] <= samples_seen:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a killed process
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory so far: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
