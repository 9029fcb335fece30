"""An encoder to evaluate, export or fine-tune: that of a run, or one that others have trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from simclr_dist.checkpoint.files import Checkpoint, check_names
from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.checkpoint.weights import fit, is_ours, open_weights
from simclr_dist.config import HUGGING_FACE, IMAGES, LARGEST_SIDE, SMALLEST_SIDE, Config, ModelConfig, parse_config
from simclr_dist.config.schema import IMAGES_OF_PAIRS, TokensConfig
from simclr_dist.errors import ConfigError
from simclr_dist.network import guess
from simclr_dist.network.library_weights import PRETRAINED
from simclr_dist.network.simclr import SimCLR, TwoTowers, build_model
from simclr_dist.network.trial import check_evaluation_size
from simclr_dist.network.weight_files import Weights
from simclr_dist.pixel_format import RGB

USUAL_SIZE = 224
UNKNOWN_IMAGES = "unknown"


@dataclass(frozen=True)
class ForeignEncoder:
    """Weights that no run of ours has made, and what must be known of their encoder. None: what the file says."""

    path: str
    """As `model.weights` takes it."""
    encoder: str | None = None
    image_size: int | None = None
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: int = 32
    partial: bool = False


Source = str | Path | Checkpoint | ForeignEncoder


def load_pretrained(
    source: Source, warn: Callable[[str], None] = lambda _: None, image_size: int | None = None
) -> tuple[SimCLR, Checkpoint]:
    """A trained network on the CPU, in eval mode, and where it comes from.

    source: a run or a checkpoint; a file or folder of weights of any origin, whose projection head is not trained.
    image_size: side at which the encoder is to see images, which the configuration that is returned says then as its
        evaluation.image_size; None: as that of the run says, of other weights as they or `source` say.
    Raises CheckpointError, or ConfigError where it is not known of which encoder the weights are, or where the encoder
    takes no such images.
    """
    if image_size is not None and not SMALLEST_SIDE <= image_size <= LARGEST_SIDE:
        raise ConfigError([f"--image-size: {image_size} is not between {SMALLEST_SIDE} and {LARGEST_SIDE}"])
    model, checkpoint = _load(source, warn, image_size)
    config = checkpoint.config
    if image_size is not None:
        config = config.model_copy(
            update={"evaluation": config.evaluation.model_copy(update={"image_size": image_size})}
        )
    check_evaluation_size(
        *(config.model, model, config.evaluation_data.image_size),
        trained_at=config.data.image_size,
        asked_by="evaluation.image_size" if image_size is None else "--image-size",
    )
    return model.eval(), replace(checkpoint, config=config)


def _load(source: Source, warn: Callable[[str], None], image_size: int | None) -> tuple[SimCLR, Checkpoint]:
    if isinstance(source, ForeignEncoder):
        path = Path(source.path).expanduser()
        if source.path != PRETRAINED and is_ours(path):
            raise ConfigError([f"--encoder: {path} knows its own encoder; leave out what says more of it"])
        return _load_foreign(replace(source, image_size=image_size or source.image_size), warn)
    if not isinstance(source, Checkpoint) and not _is_of_run(Path(source)):
        return _load_foreign(ForeignEncoder(str(source), image_size=image_size), warn)
    checkpoint = find_checkpoint(source, warn)
    model = build_model(checkpoint.config.model)
    state = {name: x for name, x in checkpoint.model_state.items() if not name.startswith("loss.")}
    check_names(checkpoint.path, "model", state, model.state_dict())
    model.load_state_dict(state)
    return model, checkpoint


def checkpoint_of(source: Source, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `source` names; None: it is weights from elsewhere. Raises CheckpointError."""
    if isinstance(source, ForeignEncoder) or not (isinstance(source, Checkpoint) or _is_of_run(Path(source))):
        return None
    return find_checkpoint(source, warn)


def images_alone(model: SimCLR, checkpoint: Checkpoint, what: str) -> tuple[SimCLR, Checkpoint]:
    """The encoder of images, as if there had been no texts beside them in training.

    Raises ConfigError where it was trained on something else. what: knows images only.
    """
    data = checkpoint.config.data
    if isinstance(model, TwoTowers):
        images = {"kind": IMAGES, "train": str(Path(data.train) / IMAGES_OF_PAIRS), "tokens": TokensConfig()}
        network = checkpoint.config.model.model_copy(update={"text": None})
        update = {"data": data.model_copy(update=images), "model": network}
        return model.of_images(), replace(checkpoint, config=checkpoint.config.model_copy(update=update))
    if data.kind != IMAGES:
        raise ConfigError([f"{what} is for encoders of images; {checkpoint.path} was trained on data.kind={data.kind}"])
    return model, checkpoint


def _is_of_run(path: Path) -> bool:
    """Also where there is nothing at all, which the search for a checkpoint then says."""
    return is_ours(path) or not (str(path) == PRETRAINED or path.is_file() or (path / "config.json").is_file())


def _load_foreign(source: ForeignEncoder, warn: Callable[[str], None]) -> tuple[SimCLR, Checkpoint]:
    asked = ModelConfig(encoder=source.encoder or "", image_size=source.image_size)
    if source.path == PRETRAINED and source.encoder is None:
        raise ConfigError(["pretrained: of which encoder? Name it with --encoder"])
    weights = open_weights(source.path, asked, warn)
    config = _config_of(weights, source)
    model = build_model(config.model)
    pixels = config.data.pixel_format
    start = fit(weights, model, config.model.encoder, partial=source.partial, pixels=pixels)
    start.load_into(model)
    for sentence in start.sentences:
        warn(sentence)
    size = source.image_size or config.evaluation_data.image_size
    by = "ImageNet's mean and deviation" if pixels == RGB else f"the mean and deviation of its {pixels}"
    warn(f"{config.model.encoder} at {size} px, images normalised with {by}")
    path = Path(source.path if source.path != PRETRAINED else f"pretrained_{config.name}")
    return model, Checkpoint(
        path, config, 0, 0, "", model_state={}, optimizer_state={}, started_from=start.record, of_run=False
    )


def _config_of(weights: Weights, source: ForeignEncoder) -> Config:
    """The settings of an export of ours; for others those that must be known, and the defaults."""
    if "config" in weights.metadata and weights.metadata.get("producer", "").startswith("simclr_dist"):
        try:
            config = parse_config(weights.metadata["config"])
        except ValueError as error:
            raise ConfigError([f"{source.path}: its configuration cannot be read: {error}"]) from None
        if source.encoder not in (None, config.model.encoder):
            raise ConfigError([f"--encoder: {source.path} is of {config.model.encoder}, not of {source.encoder}"])
        return config
    encoder = source.encoder or weights.encoder
    if encoder is None:
        raise ConfigError([f"{source.path}: of which encoder? Name it with --encoder NAME{guess.hint(weights)}"])
    if encoder.startswith(HUGGING_FACE):
        raise ConfigError(
            [
                f"{source.path}: is an encoder of tokens, and what they mean is known to runs only: begin one with "
                f"model.encoder={encoder}"
            ]
        )
    size = source.image_size or weights.image_size or USUAL_SIZE
    settings: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "_", Path(source.path).stem).lstrip("._-")[:64] or "weights",
        "data": {"train": UNKNOWN_IMAGES, "image_size": size},
        "model": {"encoder": encoder, "stem": source.stem, "width": source.width},
        "optim": {"warmup_epochs": 0.0},
        "train": {"global_batch_size": 256, "epochs": 1, "channels_last": False},
    }
    return Config.model_validate(settings)
