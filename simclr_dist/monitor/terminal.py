"""The terminal: a live bar for people, plain lines for log files, JSON lines for programs, or silence.

Numbers and news go to stdout, warnings to stderr. rich honours NO_COLOR and TERM=dumb.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from simclr_dist.monitor.events import Event, Figures, Message, Sink, StepsDone, Summary
from simclr_dist.monitor.speed import LAST_INTERVAL, SINCE_START
from simclr_dist.streams import rich_text

TerminalStyle = Literal["auto", "plain", "quiet", "json"]

# What a line shows of a log record, the most wanted first: narrow terminals lose the end.
_SHORT: dict[str, Callable[[float], str]] = {
    "train/loss": lambda v: f"loss {v:.4f}",
    "eval/knn_top1": lambda v: f"kNN {v:.2%}",
    "train/probe_top1": lambda v: f"probe {v:.1%}",
    "train/temperature": lambda v: f"temp {v:.4f}",
    LAST_INTERVAL: lambda v: f"{v:,.0f}",  # and its unit
    SINCE_START: lambda v: f"mean {v:,.0f}",
    "speed/data_wait_share": lambda v: f"wait {v:.0%}",
}
_SELDOM = ("eval/knn_top1",)  # stays on the line until there is a new one
_NARROW = 60  # columns; below, a bar and the epoch leave no room for numbers


class _Console(Console):
    """rich ends the program when its reader has gone, as in `… | head`; a training goes on without one."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Quiet(Sink):
    """Warnings only; the other styles build on it. `show` and `close` are what the monitor calls."""

    name = "terminal"

    def __init__(self) -> None:
        self._errors = _Console(stderr=True, highlight=False)

    def show(self, event: Event) -> None:
        match event:
            case Message(text, is_warning):
                (self.warn if is_warning else self.say)(text)
            case Summary(kind, title, rows):
                self.summarize(kind, title, rows)
            case StepsDone(step):
                self.advance(step)
            case Figures(values, step, samples_seen):
                finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
                self.log({"step": step, "samples_seen": samples_seen, **finite})

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self._errors.print(rich_text("warning:", "yellow") + rich_text(f" {text}"), soft_wrap=True)

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        """What the run says of itself when it begins and when it ends."""

    def advance(self, step: int) -> None:
        pass

    def log(self, record: Mapping[str, Any]) -> None:
        """record: step, samples_seen and the figures by tag; None where one is not finite."""


class JsonLines(Quiet):
    """One JSON object a line on stdout, told apart by "event": start, log, message, end. Whatever else is printed goes
    to stderr meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stdout = sys.stdout
        self._redirection = ExitStack()

    def start(self) -> None:
        self._redirection.enter_context(redirect_stdout(sys.stderr))

    def close(self) -> None:
        self._redirection.close()

    def say(self, text: str) -> None:
        self._write("message", {"text": text})

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        self._write(event, {"text": title, **rows})

    def log(self, record: Mapping[str, Any]) -> None:
        self._write("log", record)

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        self._stdout.write(json.dumps({"event": event, **content}) + "\n")
        self._stdout.flush()


class Lines(Quiet):
    """Plain lines, never wrapped, so that they can be searched."""

    def __init__(self, *, total_steps: int, first_step: int, steps_per_epoch: int | None, noun: str = "image") -> None:
        """noun: what a sample is called."""
        super().__init__()
        self._rate = f" {noun}s/s"
        self._console = _Console(highlight=False)
        self._total_steps = total_steps
        self._first_step = first_step
        self._steps_per_epoch = steps_per_epoch
        self._started = time.monotonic()
        self._seldom: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self._console.print(rich_text(text), soft_wrap=True)

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        self.say(title)
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            self.say(f"  {name:<{width}}  {text}")

    def log(self, record: Mapping[str, Any]) -> None:
        if not self._numbers(record):
            return
        self._seldom |= {tag: record[tag] for tag in _SELDOM if tag in record}
        step = record["step"]
        self.say(
            "  ".join(
                [f"step {step}/{self._total_steps}", *self._numbers({**record, **self._seldom}), *self._eta(step)]
            )
        )

    def _numbers(self, record: Mapping[str, Any]) -> list[str]:
        return [
            render(record[tag]) + (self._rate if tag in (LAST_INTERVAL, SINCE_START) else "")
            for tag, render in _SHORT.items()
            if record.get(tag) is not None
        ]

    def _epoch(self, step: int) -> str:
        if self._steps_per_epoch is None:
            return ""
        # The step that ends an epoch still belongs to it.
        epoch, epochs = (-(-max(n, 1) // self._steps_per_epoch) for n in (step, self._total_steps))
        return f"epoch {epoch}/{epochs}"

    def _eta(self, step: int) -> list[str]:
        done = step - self._first_step
        if done <= 0:
            return []
        left_s = (time.monotonic() - self._started) / done * (self._total_steps - step)
        return [f"eta {duration(left_s)}"]


class Live(Lines):
    """A bar that moves, fitted to the terminal's width; everything else scrolls above it."""

    def __init__(self, *, total_steps: int, first_step: int, steps_per_epoch: int | None, noun: str = "image") -> None:
        super().__init__(total_steps=total_steps, first_step=first_step, steps_per_epoch=steps_per_epoch, noun=noun)
        self._latest: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), _Bar(self._console), console=self._console, expand=True
        )
        self._task = self._progress.add_task(self._line(first_step), total=total_steps, completed=first_step)

    def start(self) -> None:
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def summarize(self, event: Literal["start", "end"], title: str, rows: Mapping[str, str]) -> None:
        if event == "end":
            self._progress.stop()  # the table is the last thing to be seen
        table = Table.grid(Column(style="cyan"), Column(overflow="fold"), padding=(0, 2))
        for name, text in rows.items():
            table.add_row(rich_text(f"  {name}"), rich_text(text))
        self._console.print(rich_text(title, "bold"))
        self._console.print(table)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step, description=self._line(step))

    def log(self, record: Mapping[str, Any]) -> None:
        self._latest |= record
        self.advance(record["step"])

    def _line(self, step: int) -> str:
        width = self._console.width
        if width < _NARROW:
            parts, room = [f"{step}/{self._total_steps}"], width - 2
        else:
            parts, room = [part for part in (self._epoch(step), f"step {step}/{self._total_steps}") if part], width - 10
        return fit([*parts, *self._eta(step), *self._numbers(self._latest)], room)


class _Bar(ProgressColumn):
    """As wide as there is room; none on a narrow terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bar = BarColumn(bar_width=None)

    def render(self, task: Task) -> RenderableType:
        return Text("") if self._console.width < _NARROW else self._bar.render(task)


def build_terminal(
    style: TerminalStyle, *, total_steps: int, first_step: int, steps_per_epoch: int | None, noun: str = "image"
) -> Quiet:
    """auto: a live bar on a terminal that can draw one, else plain lines."""
    if style == "quiet":
        return Quiet()
    if style == "json":
        return JsonLines()
    # rich takes a pipe for a terminal where FORCE_COLOR is set, as it is in many CI systems.
    live = style == "auto" and sys.stdout.isatty() and not Console().is_dumb_terminal
    shown = Live if live else Lines
    return shown(total_steps=total_steps, first_step=first_step, steps_per_epoch=steps_per_epoch, noun=noun)


def fit(parts: list[str], width: int, gap: str = "  ") -> str:
    """As many of the parts, from the first on, as fit into `width` characters; always the first."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + len(gap) + len(part) > width:
            break
        line += gap + part
    return line


def duration(seconds: float) -> str:
    """3725.9 -> 1:02:05"""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
