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
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.evaluation.features import ImageBatch, Normalize, extract_features
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

Start = Literal["encoder", "head"]
HEAD_IS_LINEAR = (
    "start from the head: a head of one layer (model.head_layers: 1) gives z, which the loss compares, and has no "
    "layer before that to keep; start from the encoder"
)


class Classifier(nn.Module):
    """Images [n, 3, H, W] to logits [n, C].

    `backbone` is the encoder, with start "head" followed by the first layer of the projection head. The linear map `fc`
    on top begins at zero. Where modules of `model` draw by key (network/random_layers.py), they do so here.
    Raises ConfigError for start "head" where the head has that layer only.
    """

    def __init__(self, model: SimCLR, num_classes: int, start: Start = "encoder") -> None:
        super().__init__()
        self.start = start
        self.num_classes = num_classes
        width = model.feature_dim
        self.backbone: nn.Module = model.encoder
        if start == "head":
            names = [name for name, _ in model.projection_head.named_children()]
            if "linear2" not in names:
                raise ConfigError([HEAD_IS_LINEAR])
            first = [model.projection_head.get_submodule(name) for name in names[: names.index("linear2")]]
            width = first[0].out_features  # type: ignore[assignment]
            self.backbone = nn.Sequential(model.encoder, *first)
        self.fc = nn.Linear(width, num_classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.draws = model.draws
        if self.draws is not None:
            self.register_buffer("layer_hashes", self.draws.hashes(), persistent=False)

    def forward(self, images: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """row_keys: int32 [n, 2], what dropout and its like draw from. None: from torch's generator."""
        if self.draws is not None:
            self.draws.begin(row_keys, self.get_buffer("layer_hashes"))
        logits = self.fc(self.backbone(images))
        if self.draws is not None:
            self.draws.end()
        return logits


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images between 0 and 1."""

    top1: float
    top5: float


def accuracy(
    classifier: nn.Module,
    batches: Iterable[ImageBatch] | None,
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    normalize: Normalize,
) -> Accuracy:
    """Of the classifier in evaluation mode on labelled images. Raises DataError as `extract_features` does.

    batches: with several ranks, which call this together, the part of this rank; None: it has none.
    """

    def count() -> list[int]:
        if batches is None:
            return [0, 0, 0]
        # Logits are features of width C: the same loop and the same checks.
        logits = extract_features(classifier, batches, device=device, precision=precision, normalize=normalize)
        hits = logits.h.topk(min(5, logits.h.shape[1]), dim=1).indices == logits.labels[:, None]
        return [int(hits[:, 0].sum()), int(hits.sum()), len(logits)]

    counts = torch.tensor(run_on_all_ranks(count, device, catch=Exception), device=device)
    top1, top5, n = distributed.all_reduce_sum_(counts).tolist()
    return Accuracy(top1 / n, top5 / n)


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
