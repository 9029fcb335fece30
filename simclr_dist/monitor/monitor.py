"""What people watch: one monitor that passes every event on to its sinks.

    events.py        what can be shown
    tensorboard.py   curves, histograms, images, the projector, the page's order
    projector.py     the files of TensorBoard's embedding projector
    log_file.py      log.jsonl
    terminal.py      a live bar, plain lines, JSON lines or silence
    trackers.py      wandb, mlflow and others, through Accelerate

Only the main process has sinks; the monitor of the other ranks shows nothing, so the loop asks for no rank.
The axis of every curve is samples seen: it means the same for any batch size and any number of devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from simclr_dist.config import MonitorConfig
from simclr_dist.errors import ConfigError
from simclr_dist.monitor.events import Event, Figures, Finished, Message, Sink
from simclr_dist.monitor.log_file import LogFile
from simclr_dist.monitor.tensorboard import TensorBoard
from simclr_dist.monitor.terminal import build_terminal
from simclr_dist.monitor.trackers import Trackers
from simclr_dist.run.layout import RunDir


class Monitor:
    """Shows events on every sink. Without sinks it shows nothing. Use it with `with`: that starts and closes them."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.latest: dict[str, float] = {}
        """The last figure of each tag."""
        self._sinks = list(sinks)
        self._broken: set[str] = set()
        self._said: set[str] = set()

    def __enter__(self) -> Monitor:
        for sink in self._sinks:
            self._try(sink, sink.start)
        return self

    def __exit__(self, *exc: object) -> None:
        for sink in self._sinks:
            self._try(sink, sink.close)

    def show(self, event: Event) -> None:
        if isinstance(event, Figures):
            self.latest |= event.values
        for sink in self._sinks:
            self._try(sink, lambda sink=sink: sink.show(event))  # type: ignore[misc]

    def _try(self, sink: Sink, action: Callable[[], None]) -> None:
        """Whatever a sink raises (full disks, closed pipes, a library's own exceptions) ends what it shows, not the
        training. It is tried again with the next event, and the first failure is a warning.
        """
        try:
            action()
        except Exception as error:
            if sink.name not in self._broken:
                self._broken.add(sink.name)
                reason = f"{error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                self.warn(f"{sink.name} cannot be written to ({reason}); training goes on without it")

    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """One point of each curve; `values` by TensorBoard tag."""
        self.show(Figures(values, step, samples_seen))

    def warn(self, text: str) -> None:
        self.show(Message(text, is_warning=True))

    def warn_once(self, text: str) -> None:
        """A warning that is not repeated."""
        if text not in self._said:
            self._said.add(text)
            self.warn(text)

    def finish(self, settings: Mapping[str, Any]) -> None:
        """The run has come to its end: its settings stand beside its last figures."""
        final = {tag: value for tag, value in self.latest.items() if tag.startswith(("eval/", "train/loss"))}
        if final:
            self.show(Finished(settings, final))


def open_monitor(
    run_dir: Path,
    settings: MonitorConfig | None = None,
    *,
    total_steps: int,
    first_step: int,
    samples_seen: int,
    steps_per_epoch: int | None = None,
    settings_of_run: Mapping[str, Any] | None = None,
    noun: str = "image",
) -> Monitor:
    """The main process's monitor: it writes under `run_dir` and to the terminal.

    samples_seen: where a resumed run goes on; later points of earlier starts are removed.
    settings_of_run: the configuration, for trackers. noun: what a sample is called.

    Raises ConfigError when a tracker cannot be had or a file cannot be written.
    """
    settings = settings or MonitorConfig()
    terminal = build_terminal(
        settings.terminal,
        total_steps=total_steps,
        first_step=first_step,
        steps_per_epoch=steps_per_epoch,
        noun=noun,
    )
    trackers = Trackers(settings.trackers, run_dir, settings_of_run or {}, terminal.warn)
    places = RunDir(run_dir)
    files: list[Sink] = []
    for place, build in ((places.tensorboard, partial(TensorBoard, noun=noun)), (places.log, LogFile)):
        try:
            files.append(build(place, samples_seen))
        except Exception as error:
            raise ConfigError([f"{place}: cannot be written to ({error}); make room, or move it away"]) from error
    monitor = Monitor([*files, trackers, terminal])
    for file in files:
        if isinstance(file, LogFile) and file.remark:
            monitor.warn(file.remark)
    return monitor


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory so far: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
