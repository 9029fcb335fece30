"""How others name the parameters of the same network.

A naming gives, for a name of ours (torchvision's or timm's), the names under which a file may hold it, without the
prefix of the file: one, or query, key and value that lie apart there and are joined here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Names = tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    label: str
    """Whose names they are, for people."""
    names: Callable[[str], Names]


def namings(encoder: nn.Module) -> list[Naming]:
    """All that are tried for this encoder, the most usual first."""
    found = [Naming("the library's own", lambda name: (name,))]
    for label, skipped in (("numbers of layers", ()), ("numbers of layers without pooling", (nn.MaxPool2d,))):
        numbers = _numbers(encoder, skipped)
        found.append(Naming(label, lambda name, numbers=numbers: (_with_number(name, numbers),)))  # type: ignore[misc]
    found += [
        Naming("transformers' ResNet", lambda name: (_transformers_resnet(name),)),
        Naming("timm's ViT", lambda name: (_timm_vit(name),)),
        Naming("torchvision's ViT", lambda name: (_torchvision_vit(name),)),
        Naming("transformers' ViT", lambda name: _transformers_vit(_timm_vit(name))),
        Naming("transformers' DINOv2", lambda name: _transformers_dinov2(_timm_vit(name))),
        Naming("torchvision's old DenseNet", lambda name: (re.sub(r"(denselayer\d+\.\w+?)(\d)\.", r"\1.\2.", name),)),
    ]
    return found


def _numbers(encoder: nn.Module, skipped: tuple[type[nn.Module], ...]) -> dict[str, int]:
    """Places of the parts in `nn.Sequential(*encoder.children())`, as lightly and others take a ResNet apart.

    A CIFAR stem has an Identity for its pooling, which others leave out or keep in place.
    """
    skip = (*skipped, *((nn.Identity,) if skipped else ()))
    kept = [name for name, child in encoder.named_children() if not isinstance(child, skip)]
    return {name: number for number, name in enumerate(kept)}


def _with_number(name: str, numbers: dict[str, int]) -> str:
    first, dot, rest = name.partition(".")
    return f"{numbers[first]}{dot}{rest}" if first in numbers else name


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _transformers_resnet(name: str) -> str:
    if found := re.match(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.*)", name):
        stage, block, kind, number, rest = found.groups()
        part = "convolution" if kind == "conv" else "normalization"
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(number) - 1}.{part}.{rest}"
    if found := re.match(r"layer(\d)\.(\d+)\.downsample\.([01])\.(.*)", name):
        stage, block, number, rest = found.groups()
        part = "normalization" if number == "1" else "convolution"
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{part}.{rest}"
    table = ((r"^conv1\.", "embedder.embedder.convolution."), (r"^bn1\.", "embedder.embedder.normalization."))
    return _replaced(name, table)


_TIMM_BY_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_TORCHVISION_BY_TIMM = (
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
_VIT_EMBEDDINGS = (
    (r"^(cls|mask)_token$", r"embeddings.\1_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
)


def _timm_vit(name: str) -> str:
    return _replaced(name, _TIMM_BY_TORCHVISION)


def _torchvision_vit(name: str) -> str:
    return _replaced(name, _TORCHVISION_BY_TIMM)


def _transformers_vit(name: str) -> Names:
    """name: timm's."""
    table = (
        *_VIT_EMBEDDINGS,
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    )
    return _query_key_value(name) or (_replaced(name, table),)


def _transformers_dinov2(name: str) -> Names:
    """name: timm's."""
    table = (
        *_VIT_EMBEDDINGS,
        (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    )
    return _query_key_value(name) or (_replaced(name, table),)


def _query_key_value(name: str) -> Names:
    if found := re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name):
        layer, kind = found.groups()
        return tuple(f"encoder.layer.{layer}.attention.attention.{x}.{kind}" for x in ("query", "key", "value"))
    return ()
