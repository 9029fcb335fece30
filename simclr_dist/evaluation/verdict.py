"""Is a run learning, has it collapsed, which of several is better? Without a label.

All encoders are shown the same views of the same images (evaluation/views.py). They are ranked by one figure: how many
of an image's 10 nearest neighbours by h in one view are its neighbours in another view too. docs/evaluation.md has how
well that agrees with linear accuracy, and how badly others do.

Letters: M images, V views of each, D width of h, K of z.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.pretrained import ForeignEncoder, Source, images_alone, load_pretrained
from simclr_dist.config import DataConfig, Precision
from simclr_dist.errors import ConfigError, DataError, UserError
from simclr_dist.evaluation.course import Course, course_of
from simclr_dist.evaluation.untrained import before_training
from simclr_dist.evaluation.views import ChosenImages, encode_views
from simclr_dist.health import figures as health
from simclr_dist.health.collapse import collapse
from simclr_dist.network.simclr import SimCLR
from simclr_dist.run.layout import RunDir, step_of

IMAGES = 2000
VIEWS = 4  # the least of which LiDAR makes sense; and two pairs
SMALLEST = 50  # of fewer images no figure means anything
STANDARD_ERRORS = 2

Say = Callable[[str], None]
State = Literal["learning", "not learning", "collapsed", "not known"]


@dataclass(frozen=True)
class Figures:
    """Of h unless they say otherwise; see simclr_dist/health/figures.py."""

    neighbours_shared: float
    """Of the 10 nearest neighbours in one view, those that are neighbours in another. This one ranks."""
    neighbours_error: float
    """Standard error of that."""
    contrastive_top1: float
    """Of pairs of views among all images, the mean of V/2 pairs."""
    alignment: float
    uniformity: float
    rankme: float
    lidar: float
    alpha_req: float
    z_spread: float | None

    @classmethod
    def of(cls, h: Tensor, z: Tensor | None) -> Figures:
        """h [V, M, D], z [V, M, K]; V even."""
        near = [health.similarities(pair) for pair in h.split(2)]
        return cls(
            *_neighbours(h),
            float(torch.stack([health.contrastive_accuracy(found, 1) for found in near]).mean()),
            float(health.alignment(near[0])),
            float(health.uniformity(h[:2])),
            float(health.rankme(h[0])),
            float(health.lidar(h)),
            float(health.alpha_req(h[0])),
            None if z is None else float(health.spread(z.flatten(0, 1)).mean()),
        )


@dataclass(frozen=True)
class Verdict:
    """Of one run or encoder. figures: None where it cannot be looked at; `sentence` says why."""

    name: str
    state: State
    sentence: str
    step: int | None = None
    width: int | None = None
    """D"""
    image_size: int | None = None
    figures: Figures | None = None
    trained_on_images: bool = False
    """The images shown are its training images."""
    before_training: float | None = None
    """neighbours_shared of the encoder with which the run began."""
    neighbours_kept: float | None = None
    """neighbours_shared with the checkpoint before this one."""
    compared_step: int | None = None
    """Of that checkpoint."""


@dataclass(frozen=True)
class Comparison:
    """Verdicts, best first, and what they are about."""

    images: ChosenImages
    verdicts: list[Verdict]
    num_views: int = VIEWS
    """Of each image."""

    @property
    def note(self) -> str:
        """What a reader of the figures should know; empty: nothing more."""
        seen = [verdict.name for verdict in self.verdicts if verdict.trained_on_images]
        if not seen:
            return ""
        others = ", the others were not" if len(seen) < len(self.verdicts) else ""
        return f"{', '.join(seen)}: trained on these images{others}; --data names held-out ones"

    @property
    def chance(self) -> float:
        """Differences of neighbours_shared below this are chance: two standard errors, where the best run stands."""
        first = next(verdict.figures for verdict in self.verdicts if verdict.figures)
        return _chance(first.neighbours_error, first.neighbours_error)


def compare(
    sources: Sequence[Source],
    *,
    data: str | None = None,
    images: int = IMAGES,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    device: torch.device,
    say: Say,
) -> Comparison:
    """Of the newest checkpoint of each run, of checkpoints, or of weights from elsewhere.

    data: the images; None: data.test of the first run, or its data.train. images: how many of them, evenly spread.
    precision, batch_size: of all; None: evaluation.batch_size of each.
    What cannot be looked at comes last, and its sentence says why. Raises the first's UserError where nothing can be;
    ConfigError or DataError for images that do not do.
    """
    shown: ChosenImages | None = None
    before: dict[tuple[str, int, int], tuple[float, float]] = {}
    found, failures = list[Verdict](), list[UserError]()
    for source in sources:
        name = _name_of(source)
        try:
            model, checkpoint = images_alone(*load_pretrained(source, say), "verdict")
        except UserError as error:
            failures.append(error)
            found.append(_unknown(name, error, course_of(RunDir(Path(name)))))
            continue
        shown = shown or _choose(data, checkpoint, images)
        judge = _Judge(shown, before, precision, batch_size or checkpoint.config.evaluation.batch_size, device, say)
        try:
            found.append(judge(name, model.to(device), checkpoint))
        except UserError as error:
            failures.append(error)
            found.append(_unknown(name, error, Course()))
    if not any(verdict.figures for verdict in found):
        raise failures[0]
    assert shown is not None
    found.sort(key=lambda verdict: verdict.figures.neighbours_shared if verdict.figures else -1.0, reverse=True)
    return Comparison(shown, found)


def _chance(error: float, other_error: float) -> float:
    """What the difference of two figures with these standard errors must exceed to mean something."""
    return STANDARD_ERRORS * math.hypot(error, other_error)


@dataclass(frozen=True)
class _Judge:
    images: ChosenImages
    before: dict[tuple[str, int, int], tuple[float, float]]
    """neighbours_shared of encoders before training, and its error, by what they depend on."""
    precision: Precision
    batch_size: int
    device: torch.device
    say: Say

    def __call__(self, name: str, model: SimCLR, checkpoint: Checkpoint) -> Verdict:
        data, begin = checkpoint.config.data, time.monotonic()
        head = model.projection_head if checkpoint.of_run else None
        h, z = self._encode(model.encoder, head, data, VIEWS)
        if h.shape[1] < SMALLEST:
            raise DataError(
                f"{self.images.source}: {h.shape[1]} images are too few for a verdict, {SMALLEST} the least"
            )
        figures, before = Figures.of(h, z), self._before(checkpoint)
        kept, compared_step = self._kept(h[0], checkpoint)
        self.say(f"{name}: step {checkpoint.step}, {VIEWS * h.shape[1]:,} views, {time.monotonic() - begin:.1f} s")
        course = course_of(RunDir.of_checkpoint(checkpoint.path), checkpoint.step) if checkpoint.of_run else Course()
        state, sentence = _judged(figures, *before, h.shape[2], course)
        return Verdict(
            name,
            state,
            sentence,
            step=checkpoint.step,
            width=h.shape[2],
            image_size=data.image_size,
            figures=figures,
            trained_on_images=data.train == self.images.source,
            before_training=before[0],
            neighbours_kept=kept,
            compared_step=compared_step,
        )

    def _encode(
        self, encoder: nn.Module, head: nn.Module | None, data: DataConfig, num_views: int
    ) -> tuple[Tensor, Tensor | None]:
        return encode_views(
            encoder,
            head,
            self.images,
            data,
            num_views=num_views,
            batch_size=self.batch_size,
            precision=self.precision,
            device=self.device,
        )

    def _before(self, checkpoint: Checkpoint) -> tuple[float, float]:
        config = checkpoint.config
        key = config.model.model_dump_json(), config.data.image_size, config.seed
        if key not in self.before:
            # A whitened first layer looks at training images, which may be elsewhere: those shown do as well.
            data = config.data.model_copy(update={"train": self.images.source, "loader": "auto"})
            _, encoder = before_training(config.model, data, config.seed, self.say)
            h, _ = self._encode(encoder.to(self.device), None, config.data, 2)
            self.before[key] = _neighbours(h)
        return self.before[key]

    def _kept(self, h: Tensor, checkpoint: Checkpoint) -> tuple[float | None, int | None]:
        """neighbours_shared with the run's checkpoint before this one, and its step. h [M, D] of the first view."""
        run = RunDir.of_checkpoint(checkpoint.path)
        earlier = [path for path in run.list_checkpoints() if step_of(path) < checkpoint.step]
        if not (checkpoint.of_run and earlier):
            return None, None
        try:
            model, found = load_pretrained(str(earlier[-1]))
        except UserError:  # damaged, or a training beside has removed it
            return None, None
        then, _ = self._encode(model.encoder.to(self.device), None, found.config.data, 1)
        return float(health.neighbours_shared(h, then[0]).mean()), found.step


def _neighbours(h: Tensor) -> tuple[float, float]:
    """neighbours_shared of the first two views of h [V, M, D], and its standard error."""
    shares = health.neighbours_shared(h[0], h[1]).double()
    return float(shares.mean()), float(shares.std()) / math.sqrt(len(shares))


def _name_of(source: Source) -> str:
    return str(source.path) if isinstance(source, ForeignEncoder | Checkpoint) else str(source)


def _choose(data: str | None, checkpoint: Checkpoint, images: int) -> ChosenImages:
    if data is None and not checkpoint.of_run:
        raise ConfigError([f"{checkpoint.path}: is of no run, so name images with --data"])
    config = checkpoint.config.data
    try:
        return ChosenImages.of(data or config.test or config.train, images)
    except DataError as error:
        raise DataError(f"{error}; where the images are elsewhere, name them with --data") from None


def _unknown(name: str, error: UserError, course: Course) -> Verdict:
    seen = ""
    if course.collapsed_since is not None:
        seen = f"; by its last health checks it has collapsed, since step {course.collapsed_since:,}"
    elif course.last_step:
        seen = f"; its log has come to step {course.last_step:,}"
    return Verdict(name, "not known", f"not known: {error}{seen}")


def _judged(figures: Figures, before: float, before_error: float, width: int, course: Course) -> tuple[State, str]:
    if fallen := collapse(figures.rankme, width, figures.z_spread):
        since = f", since step {course.collapsed_since:,}" if course.collapsed_since is not None else ""
        return "collapsed", f"collapsed{since}: {fallen}"
    now, enough = figures.neighbours_shared, _chance(figures.neighbours_error, before_error)
    shared = f"two views of an image share {now:.1%} of their nearest neighbours, before training {before:.1%}"
    if now <= before + enough:
        change = "worse than" if now < before - enough else "no better than"
        return "not learning", f"{change} before training: {shared}"
    idle = f"; has stopped improving since step {course.idle_since:,}" if course.idle_since is not None else ""
    return "learning", f"learning: {shared}; h uses {figures.rankme:.0f} of {width} dimensions{idle}"
