"""An encoder with a linear classifier on top, as fine-tuning and distillation train it, and its file.

The classifier sits on h, or, as SimCLR v2 fine-tunes (Chen et al. 2020b, arXiv 2006.10029, section 3), on the first
layer of the projection head, which then becomes a part of the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_dist.atomic import replaces
from simclr_dist.bounded_json import parse_json
from simclr_dist.config import Precision, parse_config
from simclr_dist.errors import CheckpointError
from simclr_dist.evaluation.features import ImageBatch, Normalize, extract_features
from simclr_dist.network.simclr import SimCLR, build_model

Start = Literal["encoder", "head"]


class Classifier(nn.Module):
    """Images [n, 3, H, W] to logits [n, C].

    `backbone` is the encoder, with start "head" followed by the first layer of the projection head. The linear map `fc`
    on top begins at zero.
    """

    def __init__(self, model: SimCLR, num_classes: int, start: Start = "encoder") -> None:
        super().__init__()
        self.start = start
        self.num_classes = num_classes
        width = model.feature_dim
        self.backbone: nn.Module = model.encoder
        if start == "head":
            names = [name for name, _ in model.projection_head.named_children()]
            first = [model.projection_head.get_submodule(name) for name in names[: names.index("linear2")]]
            width = first[0].out_features  # type: ignore[assignment]
            self.backbone = nn.Sequential(model.encoder, *first)
        self.fc = nn.Linear(width, num_classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images between 0 and 1."""

    top1: float
    top5: float


def accuracy(
    classifier: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    normalize: Normalize,
) -> Accuracy:
    """Of the classifier in evaluation mode on labelled images. Raises DataError as `extract_features` does."""
    # Logits are features of width C: the same loop and the same checks.
    logits = extract_features(classifier, batches, device=device, precision=precision, normalize=normalize)
    hits = logits.h.topk(min(5, logits.h.shape[1]), dim=1).indices == logits.labels[:, None]
    top1, top5 = torch.stack([hits[:, 0].sum(), hits.sum()]).double().div(len(logits)).tolist()
    return Accuracy(top1, top5)


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier in evaluation mode, its classes, and the configuration of its run (see `parse_config`)."""

    network: Classifier
    class_names: tuple[str, ...]
    config_json: str


def save_classifier(
    path: Path, classifier: Classifier, class_names: tuple[str, ...], config_json: str, history: dict[str, object]
) -> None:
    """Writes a safetensors file that `load_classifier` reads; atomic.

    config_json: of its run, with the section `model` of its network. history: how it was made, plain values.
    """
    metadata = {
        "format": "pt",
        "config": config_json,
        "start": classifier.start,
        "class_names": json.dumps(class_names),
        "history": json.dumps(history),
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    with replaces(path) as temporary:
        save_file(state, temporary, metadata)


def load_classifier(path: Path) -> SavedClassifier:
    """What `save_classifier` wrote, on the CPU. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        class_names = tuple(parse_json(metadata["class_names"]))
        start: Start = "head" if metadata["start"] == "head" else "encoder"
        classifier = Classifier(build_model(parse_config(metadata["config"]).model), len(class_names), start)
        classifier.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is no classifier of `simclr-dist finetune`: {error}") from None
    return SavedClassifier(classifier.eval(), class_names, metadata["config"])
