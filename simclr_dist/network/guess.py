"""Which encoder a file of weights may be of, for messages: by trying the usual ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from simclr_dist.config import ModelConfig
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.network.encoders import RESNETS
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.weight_files import Weights
from simclr_dist.network.weights import ENOUGH, match

_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_TORCHVISION_VITS = {768: "b", 1024: "l", 1280: "h"}


def fitting_encoders(weights: Weights) -> list[tuple[str, str, float]]:
    """Encoder, stem, and the share of it that is in the file; of those that fit best."""
    found = []
    for name, stem in _candidates(weights):
        try:
            shape = shape_of_model(ModelConfig(encoder=name, stem=stem, image_size=224))  # type: ignore[arg-type]
            fits = match(_shapes_only(weights), shape.encoder)
        except (ConfigError, CheckpointError):
            continue
        if fits.share >= ENOUGH and fits.deeper_share <= 1 - ENOUGH:
            # A stem that has to be adapted is the other one's.
            found.append((name, stem, fits.share - 0.001 * len(fits.adapted)))
    found.sort(key=lambda one: -one[2])
    return [one for one in found if one[2] >= found[0][2] - 1e-9]


def hint(weights: Weights) -> str:
    """The end of a sentence that says which encoder to name: `: it fits resnet18`."""
    if weights.encoder is not None:
        return f": by its config.json it is {weights.encoder}"
    names = [
        f"{name}{' with model.stem=cifar' if stem == 'cifar' else ''}" for name, stem, _ in fitting_encoders(weights)
    ]
    return f": it fits {' or '.join(names)}" if names else ""


def _shapes_only(weights: Weights) -> Weights:
    """Nothing is read, compared or converted."""
    empty = {name: torch.zeros((), dtype=x.dtype).expand(x.shape) for name, x in weights.tensors.items()}
    return Weights(weights.source, weights.sha256, empty, weights.kind)


def _candidates(weights: Weights) -> list[tuple[str, str]]:
    if weights.encoder is not None:
        return [(weights.encoder, "imagenet")]
    if not any(x.ndim == 4 for x in weights.tensors.values()):
        return []  # nothing that sees pixels
    names = "\n".join(weights.tensors)
    if re.search(
        r"(blocks\.0\.attn\.qkv|layer\.0\.attention\.attention\.query|encoder_layer_0\.self_attention)", names
    ):
        return [(name, "imagenet") for name in _vits(weights.tensors)]
    if re.search(r"(layer4|stages\.3\.layers|\b[67])\.0\.", names):
        sees_pixels = (x.shape[3] for x in weights.tensors.values() if x.ndim == 4 and x.shape[1] in (1, 3))
        stem = "cifar" if next(sees_pixels, 7) == 3 else "imagenet"
        is_basic = re.search(r"\.0\.(conv3|layer\.2\.convolution)\.", names) is None
        return [(name, stem) for name in RESNETS if (name in ("resnet18", "resnet34")) == is_basic]
    others = ("convnext_tiny", "convnext_small", "convnext_base", "mobilenet_v2", "mobilenet_v3_large")
    return [(name, "imagenet") for name in others]


def _vits(tensors: Mapping[str, Tensor]) -> list[str]:
    """By the patch embedding, the only convolution."""
    found = []
    for tensor in tensors.values():
        if tensor.ndim == 4 and tensor.shape[1] == 3 and tensor.shape[2] == tensor.shape[3]:
            width, patch = tensor.shape[0], tensor.shape[2]
            if width in _WIDTHS:
                found += [f"timm/vit_{_WIDTHS[width]}_patch{patch}_{end}" for end in ("224", "dinov2")]
            if width in _TORCHVISION_VITS:
                found.append(f"vit_{_TORCHVISION_VITS[width]}_{patch}")
    return list(dict.fromkeys(found))
