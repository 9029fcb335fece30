"""How deep in an encoder each parameter sits: what layer-wise learning rates count.

timm's networks say it themselves (`group_matcher`). In any other one a layer is a block of a plain `nn.Sequential` or
`nn.ModuleList`, at whatever depth these lie, or else a child of the network. What stands alone (a stem's convolution, a
norm, a position table) belongs to the block that follows it; what is nothing but norms and biases to the layer before.

    resnet18    conv1 + bn1 | layer1.0 | layer1.1 | layer2.0 | … | layer4.1
    vit_b_16    class_token + conv_proj + pos_embedding | encoder_layer_0 | … | encoder_layer_11 + ln
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers(encoder: nn.Module) -> list[list[str]]:
    """Names of the encoder's parameters, layer by layer, from the images on. Each name once."""
    is_weight = {name: p.ndim > 1 for name, p in encoder.named_parameters()}
    found: list[list[str]] = []
    for names in _as_timm_says(encoder) if callable(getattr(encoder, "group_matcher", None)) else _as_built(encoder):
        if found and not any(is_weight[name] for name in names):
            found[-1] += names
        else:
            found.append(names)
    return found


def _as_built(encoder: nn.Module) -> list[list[str]]:
    units = _merged(list(_units(encoder, "", _size(encoder))))
    found: list[list[str]] = [[] for _ in units or [()]]
    for name, _ in encoder.named_parameters():
        at = next((i for i, prefixes in enumerate(units) if name.startswith(prefixes)), 0)  # a table comes before all
        found[at].append(name)
    return found


def _as_timm_says(encoder: nn.Module) -> list[list[str]]:
    from timm.models import group_parameters

    depths = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    found: list[list[str]] = [[] for _ in range(1 + max(depths.values(), default=0))]
    for name, _ in encoder.named_parameters():
        found[depths[name]].append(name)
    return [names for names in found if names]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _units(module: nn.Module, prefix: str, total: int) -> Iterator[tuple[str, bool]]:
    """Prefixes of parameters' names in the order of the network, and whether each is a block; without a block: alone.

    A part that holds most of the network, such as a ViT's `encoder`, is looked into, if there are blocks in it.
    """
    for name, child in module.named_children():
        here = f"{prefix}{name}."
        if not _size(child):
            continue
        inside = list(_units(child, here, total)) if any(True for _ in child.children()) else []
        is_list = type(child) in (nn.Sequential, nn.ModuleList)
        is_trunk = type(module) not in (nn.Sequential, nn.ModuleList) and _size(child) > total / 2
        if is_list or (is_trunk and any(is_block for _, is_block in inside)):
            yield from inside
        else:
            yield here, bool(inside)


def _merged(units: list[tuple[str, bool]]) -> list[tuple[str, ...]]:
    """Prefixes by layer."""
    first = next((i for i, (_, is_block) in enumerate(units) if is_block), None)
    if first is None:  # a plain chain, such as a VGG's
        return [(prefix,) for prefix, _ in units]
    stem = [prefix for prefix, _ in units[:first]]
    found, waiting = ([tuple(stem)] if stem else []), list[str]()
    for prefix, is_block in units[first:]:
        waiting.append(prefix)
        if is_block:
            found.append(tuple(waiting))
            waiting = []
    return [*found[:-1], (*found[-1], *waiting)]
