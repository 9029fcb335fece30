"""Evaluations that compare samples with each other: similarity of texts, retrieval of pairs, zero-shot classification.

They need no class that training has seen. On several processes the ranks share the work on the features.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.lineage import same_on_all_ranks
from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.config import Precision
from simclr_dist.data.tokens.folder import TokenFolder
from simclr_dist.data.tokens.texts import Columns, read_texts
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.features import Features, ImageBatch, Normalize, extract_features_distributed
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.evaluation.retrieval import (
    Recall,
    Similarities,
    class_rows,
    classify,
    cosines,
    recall,
    recall_by_chance,
)
from simclr_dist.evaluation.score_record import require_method
from simclr_dist.evaluation.similarity import cosine, spearman
from simclr_dist.evaluation.text_baselines import MISSING, sparse_cosines, sparse_pair_cosines, text_baselines
from simclr_dist.evaluation.untrained import network_before_training
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.kinds.labelled_images import require_labels
from simclr_dist.kinds.pairs import ImagesWithTexts, PairsOfTexts, Side, to_z, tower_of_texts
from simclr_dist.kinds.tokens import Texts
from simclr_dist.network.precision import assumed_precision
from simclr_dist.network.simclr import SimCLR
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.layout import append_record
from simclr_dist.run.results import Keeping, results_dir

Say = Callable[[str], None]
Figures = Mapping[str, float]
Show = Callable[[Mapping[str, Figures], Mapping[str, Any]], None]
Load = Callable[[NDArray[np.int64]], Iterable[ImageBatch]]
USUAL_COLUMNS = Columns(("sentence1", "sentence2"), "score")


@dataclass(frozen=True)
class Compared:
    """figures: by the name of who was scored, the trained network last. record: the line of evaluations.jsonl."""

    figures: Mapping[str, Figures]
    record: Mapping[str, Any]


@dataclass
class _Evaluation:
    """A trained network, and how its features are computed."""

    kind: Kind
    network: SimCLR
    checkpoint: Checkpoint
    precision: Precision
    batch_size: int
    device: torch.device
    say: Say

    def networks(self, baselines: bool) -> Iterator[tuple[str, SimCLR]]:
        if baselines:
            config = self.checkpoint.config
            name, network = run_on_all_ranks(
                lambda: network_before_training(config.model, config.data, config.seed, self.say), self.device
            )
            yield f"{name} network", network.eval()
        yield "trained network", self.network

    def rows(self, encoder: nn.Module, load: Load, ids: NDArray[np.int64], to_input: Normalize) -> Features:
        """What the encoder makes of the samples with these numbers, on every rank."""
        return extract_features_distributed(
            encoder.to(self.device), load, ids, device=self.device, precision=self.precision, normalize=to_input
        )

    def rows_of_side(self, network: SimCLR, side: Side) -> Tensor:
        ids = np.arange(len(side.groups))
        return self.rows(side.encoder(network), lambda ids: side.batches(ids, self.batch_size), ids, side.to_input).h

    @property
    def of_texts(self) -> Texts:
        """What reads texts as this network does."""
        return self.kind.of_texts if isinstance(self.kind, ImagesWithTexts) else cast(Texts, self.kind)

    def rows_of_texts(self, encoder: nn.Module, folder: TokenFolder, ids: NDArray[np.int64]) -> Tensor:
        kind = self.of_texts
        return self.rows(encoder, lambda ids: kind.batches_of(folder, ids, self.batch_size), ids, kind.to_input).h

    def finish(
        self, method: str, figures: Mapping[str, Figures], facts: Mapping[str, Any], out: Path | None, show: Show
    ) -> Compared:
        """Shows the figures and appends the record to evaluations.jsonl."""
        record = {
            "step": self.checkpoint.step,
            "method": method,
            **facts,
            **self.kind.input_signature,
            "precision": self.precision,
            **list(figures.values())[-1],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        run = results_dir(self.checkpoint.path if self.checkpoint.of_run else None, out)
        if distributed.rank() == 0:
            show(figures, record)
            keeping = Keeping(self.say)
            if run is not None:
                with keeping.attempt(f"the line in {run.evaluations.name}"):
                    run.path.mkdir(parents=True, exist_ok=True)
                    append_record(run.evaluations, record)
            keeping.warn()
        return Compared(figures, record)


def _open(
    source: Source, method: str, *, precision: Precision | None, batch_size: int | None, device: torch.device, say: Say
) -> _Evaluation:
    found = same_on_all_ranks(source, device, say)

    def load() -> _Evaluation:
        network, checkpoint = load_pretrained(found, say)
        config = checkpoint.config
        kind = kind_of(config.evaluation_data)
        require_method(kind, method)
        chosen = precision or assumed_precision(config.train.precision, device.type)
        size = batch_size or config.evaluation.batch_size
        return _Evaluation(kind, network, checkpoint, chosen, size, device, say)

    return run_on_all_ranks(load, device)


def _baselines(a: list[str], b: list[str], say: Say) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Of texts without an encoder; none without scikit-learn, which is said."""
    try:
        return text_baselines(a, b).items()
    except ImportError:
        say(MISSING)
        return ()


# ---------------------------------------------------------------------------------------------------------------------
# Similarity


@dataclass(frozen=True)
class ScoredPairs:
    first: list[str]
    second: list[str]
    scores: NDArray[np.float64]
    fingerprint: str


def read_scored_pairs(path: Path, columns: Columns, encoding: str = "utf-8") -> ScoredPairs:
    """A table of two texts and a number in each row. columns.label: that of the numbers. Raises DataError."""
    first, second, scores = list[str](), list[str](), list[float]()
    texts = read_texts(path, columns, encoding)[1]
    for a in texts:
        b = next(texts)
        try:
            scores.append(float(a.label))
        except ValueError:
            raise DataError(f"{path}, {a.name}: the score {a.label[:40]!r} is no number") from None
        first.append(a.text)
        second.append(b.text)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return ScoredPairs(first, second, np.array(scores), fingerprint)


def evaluate_similarity(
    source: Source,
    pairs: Path,
    *,
    columns: Columns | None = None,
    encoding: str = "utf-8",
    precision: Precision | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
    out: Path | None = None,
    show: Show = lambda figures, record: None,
    device: torch.device,
    say: Say,
) -> Compared:
    """Spearman's correlation of the cosine of h with the scores that people gave, over all pairs of a table.

    columns: two of texts, and `label` that of the scores. Of a network of images and texts, h is that of the texts.
    Raises CheckpointError, ConfigError, DataError.
    """
    evaluation = _open(source, "similarity", precision=precision, batch_size=batch_size, device=device, say=say)
    found = run_on_all_ranks(lambda: read_scored_pairs(pairs, columns or USUAL_COLUMNS, encoding), device)
    n = len(found.scores)
    folder = run_on_all_ranks(lambda: evaluation.of_texts.tokenised([*found.first, *found.second]), device)
    has_tokens = (folder.lengths > 0).reshape(2, n).all(axis=0)
    kept = np.flatnonzero(has_tokens)
    if len(kept) < n:
        say(f"{n - len(kept):,} of {n:,} pairs of {pairs} have a text without a token and are left out")

    def figures_of(similarities: Tensor) -> dict[str, float]:
        return {"spearman": spearman(similarities.double().numpy(), found.scores[kept])}

    figures: dict[str, Figures] = {}
    if baselines:
        for name, (a, b) in _baselines([found.first[i] for i in kept], [found.second[i] for i in kept], say):
            figures[name] = figures_of(sparse_pair_cosines(a, b))
    for name, network in evaluation.networks(baselines):
        tower = tower_of_texts(network)
        h = evaluation.rows_of_texts(tower.encoder, folder, np.concatenate([kept, kept + n]))
        figures[name] = figures_of(cosine(*h.chunk(2)))
    facts = {"test": str(pairs), "test_fingerprint": found.fingerprint, "pairs": len(kept)}
    return evaluation.finish("similarity", figures, facts, out, show)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def evaluate_retrieval(
    source: Source,
    pairs: str | None = None,
    *,
    precision: Precision | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
    out: Path | None = None,
    show: Show = lambda figures, record: None,
    device: torch.device,
    say: Say,
) -> Compared:
    """How often each side of a pair finds the other, first or among ten, in both directions.

    pairs: a folder of pairs; None: data.test of the run. Every row of the other side is in the gallery, and equal
    contents are right. Raises CheckpointError, ConfigError, DataError.
    """
    evaluation = _open(source, "retrieval", precision=precision, batch_size=batch_size, device=device, say=say)
    kind, place = evaluation.kind, pairs or evaluation.kind.data.test
    if place is None:
        raise ConfigError(["data.test is null: name a folder of held-out pairs with --pairs"])
    assert isinstance(kind, PairsOfTexts | ImagesWithTexts)
    info, sides = run_on_all_ranks(lambda: (kind.describe(place), kind.sides(place)), device)
    groups = [torch.from_numpy(side.groups) for side in sides]

    def figures_of(similarities: Similarities) -> dict[str, float]:
        there = recall(similarities, *groups)
        back = recall(lambda rows, columns: similarities(columns, rows).T, *groups[::-1])
        return {
            "r1": (there.at_1 + back.at_1) / 2,
            "r10": (there.at_10 + back.at_10) / 2,
            **_of_direction("to_second", there),
            **_of_direction("to_first", back),
        }

    figures: dict[str, Figures] = {}
    texts = [side.texts() for side in sides if side.texts is not None]
    if baselines and len(texts) == len(sides):
        for name, (a, b) in _baselines(texts[0], texts[1], say):
            figures[name] = figures_of(sparse_cosines(a, b))
    for name, network in evaluation.networks(baselines):
        first, second = (evaluation.rows_of_side(network, side) for side in sides)
        figures[name] = figures_of(cosines(first, second, device))
    facts = {
        "test": place,
        "test_fingerprint": info.content_fingerprint,
        "first": sides[0].noun,
        "second": sides[1].noun,
        "pairs": info.num_samples,
        "chance_r1": recall_by_chance(*groups),
    }
    return evaluation.finish("retrieval", figures, facts, out, show)


def _of_direction(name: str, found: Recall) -> dict[str, float]:
    return {f"r1_{name}": found.at_1, f"r10_{name}": found.at_10, f"median_rank_{name}": found.median_rank}


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification


def evaluate_zero_shot(
    source: Source,
    test: str | None = None,
    *,
    templates: Sequence[str] = ("{}",),
    precision: Precision | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
    out: Path | None = None,
    show: Show = lambda figures, record: None,
    device: torch.device,
    say: Say,
) -> Compared:
    """Top-1 and top-5 of images whose class is the one whose name, put into the templates, is the most similar.

    test: labelled images; None: data.test of the run. templates: with {} for the name of a class, `_` in it being a
    space; a class is the mean of its prompts. Raises CheckpointError, ConfigError, DataError.
    """
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ConfigError([f"--template {wrong[0]!r}: needs {{}} once, for the name of a class"])
    evaluation = _open(source, "zero-shot", precision=precision, batch_size=batch_size, device=device, say=say)
    kind, place = evaluation.kind, test or evaluation.kind.data.test
    if place is None:
        raise ConfigError(["data.test is null: name labelled images with --test"])
    assert isinstance(kind, ImagesWithTexts)
    info = run_on_all_ranks(lambda: kind.describe(place), device)
    require_labels("image", "the test images", place, info, remedy="name labelled images with --test")
    names = [name.replace("_", " ") for name in info.class_names]
    prompts = [template.replace("{}", name) for name in names for template in templates]
    folder = run_on_all_ranks(lambda: evaluation.of_texts.tokenised(prompts), device)
    if (folder.lengths == 0).any():
        raise DataError(f"{place}: nothing of the prompt {prompts[int(folder.lengths.argmin())]!r} is a token")
    read, everything = ReadableImages(kind, place, evaluation.batch_size), np.arange(info.num_samples)
    figures: dict[str, Figures] = {}
    for name, network in evaluation.networks(baselines):
        z = evaluation.rows_of_texts(to_z(tower_of_texts(network)), folder, np.arange(len(prompts)))
        images = evaluation.rows(to_z(network), read, everything, kind.to_input)
        classes = class_rows(z, len(names))
        found = classify(images.h, classes, images.labels)
        figures[name] = {"top1": found.top1, "top5": found.top5}
    if sentence := read.left_out(everything, images, device):
        say(sentence)
    facts = {
        "test": place,
        "test_fingerprint": info.content_fingerprint,
        "test_images": len(images),
        "classes": len(names),
        "templates": list(templates),
        "chance_top1": 1 / len(names),
    }
    return evaluation.finish("zero-shot", figures, facts, out, show)
