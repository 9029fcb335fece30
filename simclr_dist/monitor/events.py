"""What a run can show, one class each, and what a sink is: it shows the events it knows and ignores the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from simclr_dist.health.figures import Histogram


@dataclass(frozen=True)
class Message:
    """A line for people; a warning asks them to do something."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Summary:
    """A table when the run begins and when it ends."""

    event: Literal["start", "end"]
    title: str
    rows: Mapping[str, str]


@dataclass(frozen=True)
class StepsDone:
    """`step` steps are done."""

    step: int


@dataclass(frozen=True)
class Figures:
    """One point of each curve; `values` by TensorBoard tag."""

    values: Mapping[str, float]
    step: int
    samples_seen: int


@dataclass(frozen=True)
class Histograms:
    """By TensorBoard tag."""

    histograms: Mapping[str, Histogram]
    samples_seen: int


@dataclass(frozen=True)
class Pairs:
    """All views of n samples, side by side: float [V, n, 3, H, W], normalised, or V lists of n texts."""

    views: Tensor | Sequence[Sequence[str]]
    samples_seen: int


@dataclass(frozen=True)
class Neighbours:
    """q rows of a query and its k nearest neighbours, nearest first: uint8 [q, 1 + k, S, S, 3], or texts."""

    rows: Tensor | Sequence[Sequence[str]]
    samples_seen: int


@dataclass(frozen=True)
class Embedding:
    """For the embedding projector: h [n, D], labels, and thumbnails uint8 [n, S, S, 3] or texts if there are any."""

    h: Tensor
    shown: Tensor | Sequence[str] | None
    labels: Sequence[str]
    samples_seen: int


@dataclass(frozen=True)
class Finished:
    """The run has come to its end: its settings, nested, and its last figures by tag."""

    settings: Mapping[str, Any]
    figures: Mapping[str, float]


Event = Message | Summary | StepsDone | Figures | Histograms | Pairs | Neighbours | Embedding | Finished


class Sink:
    """Somewhere to show events. Whatever a method raises: the monitor says so once, and goes on without the sink."""

    name: str

    def start(self) -> None:
        """Training begins."""

    def show(self, event: Event) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Training has ended, well or not."""
