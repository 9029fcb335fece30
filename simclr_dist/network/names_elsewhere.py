"""What timm and transformers call torchvision's networks and their parameters. Imports neither.

torchvision's ResNets and DenseNets have the same names in timm. For the others there are rules here, or both libraries
build their layers in the same order (`by_position`). transformers' names follow from timm's.

    torchvision ──timm_twin, torchvision_to_timm──▶ timm ──timm_to_transformers──▶ transformers

Tables go from a name to the names elsewhere: `rename` applies one, `rename_back` the other way round. transformers'
names are those of its files, which every version reads; the modules of some versions are called otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Table = Mapping[str, tuple[str, ...]]
"""A name to the names elsewhere; several are parts that follow each other along the first axis (qkv: q, k, v)."""
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# ---------------------------------------------------------------------------------------------------------------------
# torchvision to timm


@dataclass(frozen=True)
class TimmTwin:
    """The network of timm that computes the same, and the arguments that make it so."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


_EPS = {"bn_eps": 1e-3}  # torchvision's for these; timm's default is 1e-5
_TWINS: dict[str, TimmTwin] = {
    **{
        name: TimmTwin(name)
        for name in (
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
            *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *("densenet121", "densenet161", "densenet169", "densenet201"),
            *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
            *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
        )
    },
    **{f"efficientnet_b{n}": TimmTwin(f"efficientnet_b{n}", _EPS if n >= 5 else {}) for n in range(8)},
    **{f"efficientnet_v2_{size}": TimmTwin(f"efficientnetv2_{size}", _EPS) for size in "sml"},
    **{f"mobilenet_v3_{size}": TimmTwin(f"mobilenetv3_{size}_100", _EPS) for size in ("small", "large")},
    **{f"mnasnet{n}": TimmTwin(f"mnasnet_{m}") for n, m in (("0_5", "050"), ("0_75", "075"), ("1_0", "100"))},
    **{
        f"regnet_{kind}_{flops}": TimmTwin(f"regnet{kind}_{short}")
        for kind in "xy"
        for flops, short in (
            *(("400mf", "004"), ("800mf", "008"), ("1_6gf", "016"), ("3_2gf", "032")),
            *(("8gf", "080"), ("16gf", "160"), ("32gf", "320")),
        )
    },
    **{
        f"swin_{letter}": TimmTwin(f"swin_{size}_patch4_window7_224")
        for letter, size in (("t", "tiny"), ("s", "small"), ("b", "base"))
    },
    **{
        f"vit_{letter}_{patch}": TimmTwin(f"vit_{size}_patch{patch}_224")
        for letter, size, patch in (("b", "base", 16), ("b", "base", 32), ("l", "large", 16), ("l", "large", 32))
    },
    "vit_h_14": TimmTwin("vit_huge_patch14_224"),
    "mobilenet_v2": TimmTwin("mobilenetv2_100"),
    "regnet_x_400mf": TimmTwin("regnetx_004_tv"),
    "regnet_y_800mf": TimmTwin("regnety_008_tv"),
    "regnet_y_8gf": TimmTwin("regnety_080_tv"),
}


def timm_twin(encoder: str) -> TimmTwin | None:
    """The twin of a network of torchvision; None where timm has none."""
    return _TWINS.get(encoder)


_TO_TIMM: dict[str, Rules] = {
    "vit_": (
        (r"class_token$", "cls_token"),
        (r"conv_proj\.", "patch_embed.proj."),
        (r"encoder\.pos_embedding$", "pos_embed"),
        (r"encoder\.ln\.", "norm."),
        (r"heads\.head\.", "head."),
        (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.", r"blocks.\1.mlp.fc1."),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.", r"blocks.\1.mlp.fc2."),
    ),
    "convnext_": (
        (r"features\.0\.([01])\.", r"stem.\1."),
        (r"features\.(\d+)\.([01])\.(weight|bias)$", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}.{m[3]}"),
        (r"features\.(\d+)\.(\d+)\.layer_scale$", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}.gamma"),
        (
            r"features\.(\d+)\.(\d+)\.block\.([0235])\.",
            lambda m: (
                f"stages.{int(m[1]) // 2}.blocks.{m[2]}."
                + {"0": "conv_dw.", "2": "norm.", "3": "mlp.fc1.", "5": "mlp.fc2."}[m[3]]
            ),
        ),
        (r"classifier\.0\.", "head.norm."),
        (r"classifier\.2\.", "head.fc."),
    ),
    "swin_": (
        (r"features\.0\.0\.", "patch_embed.proj."),
        (r"features\.0\.2\.", "patch_embed.norm."),
        (r"norm\.", "norm."),
        (r"head\.", "head.fc."),
        (r"features\.(\d+)\.(norm|reduction)\.", lambda m: f"layers.{int(m[1]) // 2}.downsample.{m[2]}."),
        (r"features\.(\d+)\.(\d+)\.mlp\.0\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.mlp.fc1."),
        (r"features\.(\d+)\.(\d+)\.mlp\.3\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.mlp.fc2."),
        (r"features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    ),
    "regnet_": (
        (r"stem\.0\.", "stem.conv."),
        (r"stem\.1\.", "stem.bn."),
        (r"fc\.", "head.fc."),
        *(
            (rf"trunk_output\.block(\d+)\.block\d+-(\d+)\.{ours}\.", rf"s\1.b#\2.{theirs}.")
            for ours, theirs in (
                *((r"proj\.0", "downsample.conv"), (r"proj\.1", "downsample.bn"), (r"f\.se\.fc1", "se.fc1")),
                *((r"f\.se\.fc2", "se.fc2"), (r"f\.a\.0", "conv1.conv"), (r"f\.a\.1", "conv1.bn")),
                *((r"f\.b\.0", "conv2.conv"), (r"f\.b\.1", "conv2.bn"), (r"f\.c\.0", "conv3.conv")),
                (r"f\.c\.1", "conv3.bn"),
            )
        ),
    ),
}
# torchvision counts a RegNet's blocks from 0, timm from 1.
_FROM_1 = re.compile(r"#(\d+)")
_COMPUTED = re.compile(r"relative_position_index$")  # in torchvision's state, though it follows from the window's size


def torchvision_to_timm(encoder: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor] | None = None) -> Table:
    """The table for the state of a network of torchvision, without or with its class layer.

    theirs: the state of timm's twin, in the order in which timm builds it; only needed where no rule knows the names.
    Raises KeyError for names that no rule knows.
    """
    rules = next((rules for prefix, rules in _TO_TIMM.items() if encoder.startswith(prefix)), None)
    names = [name for name in ours if not _COMPUTED.search(name)]
    if rules is not None:
        table = _apply(rules, names)
        return {name: (_FROM_1.sub(lambda m: str(int(m[1]) + 1), new),) for name, (new,) in table.items()}
    if theirs is None or ours.keys() == theirs.keys():
        return {name: (name,) for name in names}
    return by_position(ours, theirs)


def by_position(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Table:
    """The table of two networks that are built in the same order. Raises KeyError where sizes do not pair."""
    sizes = [[tensor.numel() for tensor in state.values()] for state in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise KeyError("the two networks do not have parameters of the same sizes in the same order")
    return {name: (other,) for name, other in zip(ours, theirs, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# timm to transformers

_TO_TRANSFORMERS: dict[str, Rules] = {
    "resnet": (
        (r"conv1\.", "embedder.embedder.convolution."),
        (r"bn1\.", "embedder.embedder.normalization."),
        *(
            (
                rf"layer(\d+)\.(\d+)\.{ours}(\d+)\.",
                lambda m, theirs=theirs: (
                    f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.layer.{int(m[3]) - 1}.{theirs}."
                ),
            )
            for ours, theirs in (("conv", "convolution"), ("bn", "normalization"))
        ),
        *(
            (
                rf"layer(\d+)\.(\d+)\.downsample\.{ours}\.",
                lambda m, theirs=theirs: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.{theirs}.",
            )
            for ours, theirs in (("0", "convolution"), ("1", "normalization"))
        ),
        (r"fc\.", "classifier.1."),
    ),
    "vit": (
        (r"cls_token$", "embeddings.cls_token"),
        (r"pos_embed$", "embeddings.position_embeddings"),
        (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
        (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
        (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layer.\1.attention.attention.{query,key,value}."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
        (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
        (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
        (r"norm\.", "layernorm."),
        (r"head\.", "classifier."),
    ),
    "convnext": (
        (r"stem\.0\.", "embeddings.patch_embeddings."),
        (r"stem\.1\.", "embeddings.layernorm."),
        (r"stages\.(\d+)\.downsample\.([01])\.", r"encoder.stages.\1.downsampling_layer.\2."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
        (r"head\.norm\.", "layernorm."),
        (r"head\.fc\.", "classifier."),
    ),
    "swin": (
        (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"patch_embed\.norm\.", "embeddings.norm."),
        # timm merges patches before a stage, transformers after it.
        (r"layers\.(\d+)\.downsample\.", lambda m: f"encoder.layers.{int(m[1]) - 1}.downsample."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.blocks.\2.layernorm_before."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.blocks.\2.layernorm_after."),
        (
            r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.",
            r"encoder.layers.\1.blocks.\2.attention.self.{query,key,value}.",
        ),
        (
            r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$",
            r"encoder.layers.\1.blocks.\2.attention.self.relative_position_bias_table",
        ),
        (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.blocks.\2.attention.output.dense."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.\1.blocks.\2.intermediate.dense."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.\1.blocks.\2.output.dense."),
        (r"norm\.", "layernorm."),
        (r"head\.fc\.", "classifier."),
    ),
}


def timm_to_transformers(model_type: str, names: Iterable[str]) -> Table:
    """The table from timm's names to those in the files of transformers' base model of that type.

    model_type: resnet, vit, convnext or swin, as `config.json` says. A file of a model with a class layer has
    "resnet.", "vit.", … before all names but the classifier's. Raises KeyError for names that no rule knows, as those
    of a variant of the architecture.
    """
    return _apply(_TO_TRANSFORMERS[model_type], names)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def rename(state: Mapping[str, Tensor], table: Table, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors under their names elsewhere, each in memory of its own; names that the table lacks are left out.

    like: a state of there, where a parameter may have another shape of the same size (a layer scale [C, 1, 1] or [C]).
    """
    found: dict[str, Tensor] = {}
    for name, others in table.items():
        parts = state[name].detach().cpu().chunk(len(others)) if len(others) > 1 else (state[name].detach().cpu(),)
        for other, part in zip(others, parts, strict=True):
            shape = part.shape if like is None else like[other].shape
            found[other] = part.reshape(shape).clone().contiguous()
    return found


def rename_back(state: Mapping[str, Tensor], table: Table, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of elsewhere under the names of here, shaped as in `like`. Raises KeyError for a missing one."""
    return {
        name: torch.cat([state[other] for other in others]).reshape(like[name].shape)
        if len(others) > 1
        else state[others[0]].reshape(like[name].shape)
        for name, others in table.items()
    }


def _apply(rules: Rules, names: Iterable[str]) -> Table:
    return {name: _expand(_first(rules, name)) for name in names}


def _first(rules: Rules, name: str) -> str:
    for pattern, new in rules:
        renamed, found = re.subn(rf"^{pattern}", new, name)
        if found:
            return renamed
    raise KeyError(name)


def _expand(name: str) -> tuple[str, ...]:
    """ "a.{b,c}.d" -> ("a.b.d", "a.c.d")"""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return (name,) if match is None else tuple(f"{match[1]}{part}{match[3]}" for part in match[2].split(","))
