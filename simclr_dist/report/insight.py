"""What the encoder of a run does with data: augmented pairs, neighbours, a map, confusion, similarities.

Letters: n images, D width of h, C classes, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.checkpoint.pretrained import Source, load_pretrained
from simclr_dist.config import AugmentConfig
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features, extract_features
from simclr_dist.evaluation.gallery import in_rows, neighbour_rows
from simclr_dist.evaluation.labels import relabelled
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.kinds.labelled_images import open_labelled
from simclr_dist.network.simclr import SimCLR
from simclr_dist.parallel.distributed import World

PAIRS, QUERIES = 8, 8
MAP_IMAGES = 1000  # t-SNE of more takes long, and the points hide each other
SIMILARITY_IMAGES = 256
SMALLEST_MAP = 8


@dataclass(frozen=True)
class Neighbours:
    """uint8 [1 + k, S, S, 3] or texts, the query first, and their classes."""

    shown: Tensor | list[str]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Confusion:
    """counts int64 [C, C]: true class by predicted class, of a linear probe on `fitted_to` training images."""

    counts: NDArray[np.int64]
    class_names: tuple[str, ...]
    top1: float
    fitted_to: int


@dataclass(frozen=True)
class EmbeddingMap:
    """Points float [n, 2] of the same images; labels int64 [n], -1 where there is none."""

    pca: NDArray[np.float64]
    tsne: NDArray[np.float64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


@dataclass
class Insight:
    """positives [n], negatives [n (n - 1)]: cosine similarities of z. pairs: float [2, PAIRS, 3, S, S],
    normalised, or two lists of texts; None: there is nothing to look at.

    notes: what is missing, and why.
    """

    step: int
    noun: str
    """What a sample is called."""
    pairs: Tensor | list[list[str]] | None
    positives: NDArray[np.float32]
    negatives: NDArray[np.float32]
    neighbours: list[Neighbours]
    map: EmbeddingMap | None = None
    confusion: Confusion | None = None
    notes: list[str] = field(default_factory=list)


def look_into(
    run: Source,
    *,
    train: str | None = None,
    test: str | None = None,
    images: int,
    image_size: int | None = None,
    device: torch.device,
) -> Insight:
    """Of the run's newest checkpoint, or of weights from elsewhere.

    images: how many of its training images, and of its test images, are looked at. image_size: side at which the
    encoder sees them; None: as evaluations of the run do. Views are those of the training.

    Raises CheckpointError, DataError.
    """
    model, checkpoint = load_pretrained(run, image_size=image_size)
    model.to(device)
    config = checkpoint.config
    if not checkpoint.of_run:
        if train is None:
            raise DataError(f"{checkpoint.path}: is of no run, so name images with --train and --test")
        model.projection_head = nn.Sequential()  # the one there is was never trained: h takes the place of z
    given = {key: value for key, value in (("train", train), ("test", test)) if value is not None}
    views, kind = (kind_of(data.model_copy(update=given)) for data in (config.data, config.evaluation_data))
    data, batch_size = kind.data, config.evaluation.batch_size
    pairs, z = _views(views, config.augment, config.seed, model, device)
    positives, negatives = similarities(z)
    insight = Insight(checkpoint.step, kind.noun, pairs, positives, negatives, [])
    if not checkpoint.of_run:
        insight.notes.append("similarities are those of h: there is no projection head")

    source = data.test or data.train
    shown = _features(kind, model, source, images, batch_size, device)
    names = kind.describe(source).class_names
    some = shown[torch.from_numpy(_spread(min(MAP_IMAGES, len(shown)), len(shown)))]
    insight.neighbours = _neighbours(kind, source, some, names)
    if not insight.neighbours:
        insight.notes.append(f"no neighbours: a {kind.noun} is neither picture nor text")
    if pairs is None:
        insight.notes.append(f"no pairs: views of a {kind.noun} are neither pictures nor texts")
    if len(some) >= SMALLEST_MAP:
        insight.map = EmbeddingMap(*two_dimensions(some.h.numpy()), some.labels.numpy(), names)
    else:
        insight.notes.append(f"no map: {len(some)} {kind.noun}s are too few")
    if data.test is None:
        insight.notes.append("no probe: data.test is null; --test gives held-out images")
        return insight
    try:
        labelled = open_labelled(data, train or config.evaluation.train)
        fitted = _features(kind, model, labelled.train, images, batch_size, device)
        names = labelled.train_info.class_names
        insight.confusion = confusion(fitted, relabelled(shown, labelled.classes), names, device)
    except DataError as error:
        insight.notes.append(f"no probe: {error}")
    return insight


def similarities(z: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine of the two views of each image, and of views 0 and 1 of different images; z [2, n, K]."""
    first, second = F.normalize(z.float(), dim=2)
    cosine = (first @ second.T).cpu()
    same = torch.eye(len(first), dtype=torch.bool)
    return cosine[same].numpy(), cosine[~same].numpy()


def two_dimensions(h: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """h [n, D] by its first two principal components, and by t-SNE of the 50 first; rows of length 1, as kNN sees."""
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    components = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit.astype(np.float64))
    perplexity = min(30.0, (len(h) - 1) / 3)
    return components[:, :2], TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components)


def confusion(train: Features, test: Features, class_names: tuple[str, ...], device: torch.device) -> Confusion:
    """Of a linear probe. Raises DataError when the labels do not fit."""
    C = len(class_names)
    probe = linear_probe(train, test, num_classes=C, device=device)
    predicted = probe.predict(test.h).argmax(dim=1)
    counts = torch.bincount(test.labels * C + predicted, minlength=C * C).view(C, C)
    return Confusion(counts.numpy(), class_names, probe.top1, len(train))


def _views(
    kind: Kind, augment: AugmentConfig, seed: int, model: SimCLR, device: torch.device
) -> tuple[Tensor | list[list[str]] | None, Tensor]:
    """The first augmented pairs as people see them, and z [2, n, K] of the first batch of epoch 0."""
    # The first two views are the same, however many there are.
    kind = kind_of(kind.data.model_copy(update={"num_views": 2}))
    count = min(SIMILARITY_IMAGES, kind.describe(kind.data.train).num_samples)
    loader = kind.loader(augment, seed=seed, global_batch_size=count, world=World(), device=device)
    with loader, torch.no_grad():
        views = kind.views(augment, seed, device, lambda _: None)[0](next(iter(loader.batches(0))))
        z = model(views.flatten(0, 1))[1].unflatten(0, (2, -1))
        return kind.show_views(views[:, :PAIRS].clone().cpu()), z


def _spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` of the numbers 0..total-1, evenly spread."""
    return np.arange(count, dtype=np.int64) * total // count


def _features(kind: Kind, model: SimCLR, source: str, images: int, batch_size: int, device: torch.device) -> Features:
    total = kind.describe(source).num_samples
    batches = kind.evaluation_batches(source, _spread(min(images, total), total), batch_size)
    return extract_features(model.encoder, batches, device=device, normalize=kind.to_input)


def _neighbours(kind: Kind, source: str, features: Features, names: tuple[str, ...]) -> list[Neighbours]:
    rows = neighbour_rows(features.h, torch.from_numpy(_spread(min(QUERIES, len(features)), len(features))))
    wanted, place = features.sample_ids[rows].unique(return_inverse=True)
    if (shown := kind.show(source, wanted.numpy())) is None:
        return []
    labels = features.labels[rows].tolist()
    return [
        Neighbours(samples, tuple(names[label] if label >= 0 else "unlabelled" for label in classes))
        for samples, classes in zip(in_rows(shown[0], place), labels, strict=True)
    ]
