"""How others name the parameters of the same network, when a file of theirs is read (names_elsewhere.py has the rules).

A naming gives, for a name of ours (torchvision's or timm's), the names under which a file may hold it, without the
prefix of the file: one, or query, key and value that lie apart there and are joined here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from simclr_dist.network.hugging_face import HuggingFaceEncoder
from simclr_dist.network.names_elsewhere import timm_to_transformers, torchvision_to_timm

Names = tuple[str, ...]
_SHAPELESS = torch.empty(0)


@dataclass(frozen=True)
class Naming:
    label: str
    """Whose names they are, for people."""
    names: Callable[[str], Names]


def namings(encoder: nn.Module) -> list[Naming]:
    """All that are tried for this encoder, the most usual first. A name that a rule does not know stays as it is."""
    if isinstance(encoder, HuggingFaceEncoder):
        return [
            Naming("the library's own", lambda name: (name,)),
            Naming("transformers'", lambda name: (name.removeprefix("network."),)),
            Naming("transformers' before 2020", lambda name: (_before_2020(name.removeprefix("network.")),)),
        ]
    numbers = _numbers(encoder, ())
    without_pooling = _numbers(encoder, (nn.MaxPool2d, nn.Identity))
    families = ("vit", "convnext", "swin", "regnet")
    return [
        Naming("the library's own", lambda name: (name,)),
        Naming("numbers of layers", partial(_with_number, numbers)),
        Naming("numbers of layers without pooling", partial(_with_number, without_pooling)),
        *(Naming(f"timm's {family}", partial(_timm, family)) for family in families),
        *(
            Naming(f"transformers' {kind}", partial(_transformers, kind))
            for kind in ("resnet", "vit", "convnext", "swin")
        ),
        Naming("transformers' dinov2", _transformers_dinov2),
        Naming("torchvision's vit", lambda name: (_replaced(name, _TORCHVISION_VIT_BY_TIMM),)),
        Naming("torchvision's old densenet", lambda name: (re.sub(r"(denselayer\d+\.\w+?)(\d)\.", r"\1.\2.", name),)),
    ]


def _numbers(encoder: nn.Module, skipped: tuple[type[nn.Module], ...]) -> dict[str, int]:
    """Places of the parts in `nn.Sequential(*encoder.children())`, as lightly and others take a ResNet apart."""
    kept = [name for name, child in encoder.named_children() if not isinstance(child, skipped)]
    return {name: number for number, name in enumerate(kept)}


def _with_number(numbers: dict[str, int], name: str) -> Names:
    first, dot, rest = name.partition(".")
    return (f"{numbers[first]}{dot}{rest}" if first in numbers else name,)


def _before_2020(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _timm(family: str, name: str) -> Names:
    """name: torchvision's."""
    try:
        return torchvision_to_timm(f"{family}_", {name: _SHAPELESS})[name]
    except KeyError:
        return (name,)


def _transformers(kind: str, name: str) -> Names:
    """name: torchvision's or timm's."""
    (timms,) = _timm(kind, name) if kind != "resnet" else (name,)
    try:
        return timm_to_transformers(kind, [timms])[timms]
    except KeyError:
        return (timms,)


def _transformers_dinov2(name: str) -> Names:
    """Those of a ViT, but for what its blocks have more, and call otherwise."""
    (timms,) = _timm("vit", name)
    table = (
        (r"^mask_token$", "embeddings.mask_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.(norm\d|mlp)\.", r"encoder.layer.\1.\2."),
    )
    replaced = _replaced(timms, table)
    return (replaced,) if replaced != timms else _transformers("vit", timms)


_TORCHVISION_VIT_BY_TIMM = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    (r"^norm\.", "encoder.ln."),
)


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name
