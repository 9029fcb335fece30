"""The terminal: a live bar for people, plain lines for log files, JSON lines for programs, or silence.

Numbers and news go to stdout, warnings to stderr. rich honours NO_COLOR and TERM=dumb.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

TerminalStyle = Literal["auto", "plain", "quiet", "json"]

# What a line shows of a log record, the most wanted first: narrow terminals lose the end.
_SHORT: dict[str, Callable[[float], str]] = {
    "train/loss": lambda v: f"loss {v:.4f}",
    "speed/images_per_s": lambda v: f"{v:,.0f} img/s",
    "eval/knn_top1": lambda v: f"kNN {v:.2%}",
    "speed/data_wait_share": lambda v: f"wait {v:.0%}",
}


class Quiet:
    """Warnings only; the others build on it."""

    def __init__(self) -> None:
        self._errors = Console(stderr=True)

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self._errors.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        pass

    def log(self, record: Mapping[str, Any]) -> None:
        """record: step, samples_seen and the figures by tag; None where one is not finite."""


class JsonLines(Quiet):
    """One JSON object a line on stdout, told apart by "event": log, message, warning."""

    def say(self, text: str) -> None:
        self._write("message", {"text": text})

    def warn(self, text: str) -> None:
        self._write("warning", {"text": text})

    def log(self, record: Mapping[str, Any]) -> None:
        self._write("log", record)

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps({"event": event, **content}) + "\n")
        sys.stdout.flush()


class Lines(Quiet):
    """Plain lines, never wrapped, so that they can be searched."""

    def __init__(self, *, total_steps: int, first_step: int, steps_per_epoch: int | None) -> None:
        super().__init__()
        self._console = Console()
        self._total_steps = total_steps
        self._first_step = first_step
        self._steps_per_epoch = steps_per_epoch
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def log(self, record: Mapping[str, Any]) -> None:
        numbers = _numbers(record)
        if numbers:
            step = record["step"]
            self.say("  ".join([f"step {step}/{self._total_steps}", *numbers, *self._eta(step)]))

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

    def __init__(self, *, total_steps: int, first_step: int, steps_per_epoch: int | None) -> None:
        super().__init__(total_steps=total_steps, first_step=first_step, steps_per_epoch=steps_per_epoch)
        self._numbers: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), console=self._console, expand=True
        )
        self._task = self._progress.add_task(self._line(first_step), total=total_steps, completed=first_step)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step, description=self._line(step))

    def log(self, record: Mapping[str, Any]) -> None:
        self._numbers |= record  # what comes seldom, such as kNN, stays in sight
        self.advance(record["step"])

    def _line(self, step: int) -> str:
        position = [part for part in (self._epoch(step), f"step {step}/{self._total_steps}") if part]
        parts = [*position, *self._eta(step), *_numbers(self._numbers)]
        return escape(fit(parts, self._console.width - 10))  # a bar of fewer than 8 cells says nothing


def build_terminal(style: TerminalStyle, *, total_steps: int, first_step: int, steps_per_epoch: int | None) -> Quiet:
    """auto: a live bar on a terminal that can draw one, else plain lines."""
    if style == "quiet":
        return Quiet()
    if style == "json":
        return JsonLines()
    console = Console()
    live = style == "auto" and console.is_terminal and not console.is_dumb_terminal
    return (Live if live else Lines)(total_steps=total_steps, first_step=first_step, steps_per_epoch=steps_per_epoch)


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


def _numbers(record: Mapping[str, Any]) -> list[str]:
    return [render(record[tag]) for tag, render in _SHORT.items() if record.get(tag) is not None]
