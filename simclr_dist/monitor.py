"""What people watch: TensorBoard, log.jsonl, and a progress bar or plain lines on the terminal.

Only the main process has a `Monitor` that does anything; the others get `SilentMonitor`, so the loop asks no ranks.
The axis of every curve is samples seen: it means the same for any batch size and any number of devices.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid


class Monitor(Protocol):
    def __enter__(self) -> Monitor: ...
    def __exit__(self, *exc: object) -> None: ...
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def advance(self, step: int) -> None: ...
    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None: ...
    def show_pairs(self, views: Tensor, *, samples_seen: int) -> None: ...


class SilentMonitor:
    def __enter__(self) -> SilentMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        pass

    def show_pairs(self, views: Tensor, *, samples_seen: int) -> None:
        pass


class RunMonitor:
    """Writes under `run_dir` and to the terminal. `samples_seen`: where a resumed run goes on; later points vanish."""

    def __init__(self, run_dir: Path, *, total_steps: int, first_step: int, samples_seen: int) -> None:
        self.run_dir = run_dir
        self.total_steps = total_steps
        self._first_step = first_step
        self._console = Console()
        self._errors = Console(stderr=True)
        self._live = self._console.is_terminal
        self._started = time.monotonic()
        _drop_later_lines(run_dir / "log.jsonl", samples_seen)
        self._log = (run_dir / "log.jsonl").open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=samples_seen + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("step", total=total_steps, completed=first_step, numbers="")

    def __enter__(self) -> RunMonitor:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        self._writer.close()
        self._log.close()

    def say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._errors.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, values: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """One point of each curve; `values` by TensorBoard tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, samples_seen)
        line = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        numbers = "  ".join(render(values[tag]) for tag, render in _SHORT.items() if tag in values)
        self._progress.update(self._task, numbers=numbers)
        if not self._live and numbers:
            self._console.print(
                f"step {step}/{self.total_steps}  {numbers}{self._eta(step)}", highlight=False, soft_wrap=True
            )

    def show_pairs(self, views: Tensor, *, samples_seen: int) -> None:
        """views: float [2, n, 3, H, W], normalised. A grid in TensorBoard, one image's two views side by side."""
        pairs = views.transpose(0, 1).flatten(0, 1).float()
        low, high = pairs.amin(), pairs.amax()
        grid = make_grid((pairs - low) / (high - low).clamp_min(1e-6), nrow=8, padding=1, pad_value=1.0)
        self._writer.add_image("data/augmented_pairs", grid, samples_seen)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return ""
        left_s = (time.monotonic() - self._started) / done * (self.total_steps - step)
        return f"  eta {int(left_s // 3600)}:{int(left_s % 3600 // 60):02d}:{int(left_s % 60):02d}"


_SHORT: dict[str, Any] = {
    "train/loss": lambda v: f"loss {v:.4f}",
    "speed/images_per_s": lambda v: f"{v:,.0f} img/s",
    "speed/data_wait_share": lambda v: f"wait {v:.0%}",
    "eval/knn_top1": lambda v: f"kNN {v:.2%}",
}


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
