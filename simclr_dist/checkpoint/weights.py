"""One door to weights: runs, checkpoints and exports of ours, files and folders of others, what libraries publish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.config import ModelConfig
from simclr_dist.network import guess
from simclr_dist.network.library_weights import PRETRAINED, library_weights
from simclr_dist.network.simclr import SimCLR
from simclr_dist.network.weight_files import Weights, read_weights
from simclr_dist.network.weights import (
    Match,
    fold_normalisation,
    groups,
    load,
    match,
    non_finite,
    percent,
    refuse_too_little,
    sentence,
)
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.run.layout import RunDir, is_checkpoint

Say = Callable[[str], None]
_HEAD = "projection_head."
_MOST_NAMES = 100  # in the record of a run


@dataclass(frozen=True)
class Start:
    """Weights that fit a network. `load_into` copies them."""

    match: Match
    head: dict[str, Any]
    """Tensors of the projection head: only a network of ours has the same."""
    sentences: tuple[str, ...]
    record: dict[str, Any]
    """For checkpoints and lineage.jsonl."""

    def load_into(self, network: SimCLR) -> None:
        load(network.encoder, self.match)
        network.projection_head.load_state_dict(self.head, strict=False)


def is_ours(path: Path) -> bool:
    """Whether it is a run or a checkpoint; a file that we have exported is one of many formats."""
    return (path / "MANIFEST.json").exists() or is_checkpoint(path) or RunDir(path).checkpoints.is_dir()


def open_weights(source: str | Path, model: ModelConfig, say: Say) -> Weights:
    """model: whose weights `pretrained` asks for. Raises CheckpointError, or ConfigError where there are none."""
    if source == PRETRAINED:
        return library_weights(model.encoder, model.image_size, say)
    path = Path(source).expanduser()
    return _of_checkpoint(find_checkpoint(path, say)) if is_ours(path) else read_weights(path)


def plan_start(model: ModelConfig, network: SimCLR, say: Say, pixels: PixelFormat = RGB) -> Start:
    """What of `model.weights` fits `network`, which may have shapes only. Raises CheckpointError or ConfigError."""
    assert model.weights is not None
    weights = open_weights(model.weights, model, say)
    return fit(weights, network, model.encoder, partial=model.weights_partial, pixels=pixels)


def fit(weights: Weights, network: SimCLR, encoder: str, *, partial: bool, pixels: PixelFormat = RGB) -> Start:
    """pixels: what the network will eat. Raises CheckpointError where the weights are not those of `encoder`."""
    found = match(weights, network.encoder)
    refuse_too_little(weights, found, encoder, partial=partial, hint=lambda: guess.hint(weights))
    normalisation = fold_normalisation(weights, found, network.encoder, pixels.mean, pixels.std)
    own_head = network.projection_head.state_dict()
    head = {name: weights.tensors.get(f"{_HEAD}{name}") for name in own_head}
    same = found.prefix == "encoder." and all(
        x is not None and x.shape == own_head[name].shape for name, x in head.items()
    )
    what_of_head = "the projection head is taken too" if same else "the projection head is new"
    record = {
        "weights": weights.source,
        "kind": weights.kind,
        "sha256": weights.sha256,
        "share": found.share,
        "tensors": len(found.taken),
        "names": found.naming,
        "prefix": found.prefix,
        "adapted": found.adapted,
        "new": found.new[:_MOST_NAMES],
        "left_out": groups(found.left_out),
        "normalisation": normalisation,
        "projection_head": "taken" if same else "new",
    }
    said = f"{sentence(weights, found)}; {what_of_head}"
    return Start(found, head if same else {}, tuple(filter(None, (said, normalisation))), record)


def _of_checkpoint(found: Checkpoint) -> Weights:
    with (found.path / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(
        str(found.path),
        digest,
        found.model_state,
        f"a checkpoint of simclr_dist, step {found.step}",
        encoder=found.config.model.encoder,
        image_size=found.config.data.image_size,
        mean=found.config.data.pixel_format.mean,
        std=found.config.data.pixel_format.std,
    )


def describe_weights(path: Path, say: Say) -> Iterator[tuple[str, str]]:
    """Rows of a table: what a file, a folder or a run holds, and which encoder takes it. Raises CheckpointError."""
    weights = _of_checkpoint(find_checkpoint(path, say)) if is_ours(path) else read_weights(path)
    tensors = weights.tensors
    yield "weights", f"{weights.source}: {weights.kind}"
    yield "sha256", weights.sha256
    yield "tensors", f"{len(tensors):,}, {sum(x.numel() for x in tensors.values()):,} numbers"
    for i, group in enumerate(groups(tensors, at_most=20)):
        yield "" if i else "names", group
    if weights.mean and weights.std:
        yield "normalised", f"mean {' '.join(map(str, weights.mean))}; std {' '.join(map(str, weights.std))}"
    if bad := non_finite(weights):
        yield "DAMAGED", f"{len(bad)} tensors hold NaN or infinity, the first {bad[0]}"
    fitting = guess.fitting_encoders(weights)
    for i, (name, stem, share) in enumerate(fitting):
        rest = " --stem cifar" if stem == "cifar" else ""
        yield "" if i else "fits", f"--encoder {name}{rest} ({percent(share)})"
    if not fitting:
        yield "fits", f"{weights.encoder or 'none of the encoders that were tried'}"
