"""Weights from elsewhere into an encoder: found by names and shapes, adapted knowingly, and told.

Of all ways to name the encoder's parameters (weight_names.py) and all prefixes that occur in the file, that pair is
taken which finds the most of the encoder. So a file of MoCo, DINO, SwAV, lightly, solo-learn or VISSL needs no table:
their prefixes differ, the names behind them are torchvision's or timm's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.errors import CheckpointError
from simclr_dist.network.weight_files import Weights
from simclr_dist.network.weight_names import Naming, namings
from simclr_dist.pixel_format import RGB

ENOUGH = 0.9
"""Share of the encoder's parameters that a file must hold, unless less is asked for."""
_POSITIONS = ("pos_embed", "pos_embedding", "position_embeddings")
# Of twins in one file: what its authors evaluate comes first, what follows or is followed by it last.
_BETTER, _WORSE = ("teacher", "ema", "encoder_q", "online"), ("momentum", "encoder_k", "target", "student")
_SHOWN = 5
_LONGEST = 120  # characters of a name in a message: names come from the file
_WRAPPERS = frozenset({"module", "model", "state_dict", "net", "network", "classy_state_dict", "base_model", "trunk"})


@dataclass
class Match:
    """What of a file fits an encoder. All names are the encoder's, but those in `left_out`."""

    naming: str
    prefix: str
    taken: dict[str, Tensor] = field(default_factory=dict, repr=False)
    adapted: list[str] = field(default_factory=list)
    """A sentence for each tensor that was changed to fit."""
    new: list[str] = field(default_factory=list)
    """Parameters and buffers that keep their initial values."""
    misfits: list[str] = field(default_factory=list)
    """Of these: there under this name, in another shape."""
    left_out: list[str] = field(default_factory=list)
    deeper: list[str] = field(default_factory=list)
    """Of these: layers that the encoder would have if it were the file's."""
    twins: list[str] = field(default_factory=list)
    """Other prefixes under which the file holds as much."""
    share: float = 0.0
    """Of the encoder's parameters that are taken."""
    deeper_share: float = 0.0
    """Parameters in `deeper`, compared with those of the encoder."""


def match(weights: Weights, encoder: nn.Module) -> Match:
    """The best match; changes nothing. encoder: may be on the device "meta".

    Raises CheckpointError where a tensor that would be taken is not finite, or no number of a network.
    """
    own, tensors, stem = encoder.state_dict(), weights.tensors, _stem(encoder)
    best = _best_fit(tensors, own, stem, namings(encoder))
    if best is None:
        return Match("none", "", new=list(own), left_out=list(tensors))
    naming, prefix, twins = best
    result = Match(naming.label, prefix, twins=twins)
    used: set[str] = set()
    for name, target in own.items():
        theirs = [prefix + part for part in naming.names(name)]
        if any(part not in tensors for part in theirs):
            result.new.append(name)
            continue
        found = [tensors[part] for part in theirs]
        used.update(theirs)
        if not _fits(name, target, found, stem):
            shapes = " + ".join(str(tuple(x.shape)) for x in found)
            result.misfits.append(f"{name} ({shapes} in the file, {tuple(target.shape)} here)")
            result.new.append(name)
            continue
        result.taken[name] = _take(weights, name, target, found, stem, encoder, result.adapted)
    result.left_out = [name for name in tensors if name not in used]
    return _describe(result, weights, encoder, naming, used)


def _describe(result: Match, weights: Weights, encoder: nn.Module, naming: Naming, used: set[str]) -> Match:
    """Fills in the shares."""
    parameters = {name: p.numel() for name, p in encoder.named_parameters()}
    total = sum(parameters.values())
    result.share = sum(n for name, n in parameters.items() if name in result.taken) / max(total, 1)
    result.new = [name for name in result.new if not name.endswith("num_batches_tracked")]  # old files lack it
    rest_of_used = {name.removeprefix(result.prefix) for name in used}
    tops = {rest.partition(".")[0] for rest in rest_of_used}
    without_class = tuple(
        naming.names(f"{name}.")[0] for name, module in encoder.named_modules() if _is_gone(name, module)
    )
    for name in result.left_out:
        rest = name.removeprefix(result.prefix)
        if name.startswith(result.prefix) and rest.partition(".")[0] in tops and not rest.startswith(without_class):
            result.deeper.append(name)
    size = sum(weights.tensors[name].numel() for name in result.deeper)
    result.deeper_share = size / max(total, 1)
    return result


def _is_gone(name: str, module: nn.Module) -> bool:
    """Whether here was a class layer, which an encoder does not have."""
    return bool(name) and isinstance(module, nn.Identity)


def load(encoder: nn.Module, found: Match) -> None:
    """Copies what was matched."""
    encoder.load_state_dict(found.taken, strict=False)


def refuse_too_little(
    weights: Weights, found: Match, encoder_name: str, *, partial: bool, hint: Callable[[], str] = lambda: ""
) -> None:
    """Raises CheckpointError unless the file holds this encoder, or, with `partial`, something of it.

    hint: the end of a sentence about what else the file may be of; it takes a while to find.
    """
    if not found.taken:
        raise CheckpointError(
            f"{weights.source}: nothing in it fits {encoder_name}. It holds {len(weights.tensors):,} tensors: "
            f"{_listed(list(weights.tensors))}{hint()}"
        )
    if partial:
        return
    remedy = "; if you want a part of it all the same, set model.weights_partial=true"
    if found.share < ENOUGH:
        misfits = {misfit.partition(" ")[0] for misfit in found.misfits}
        missing = [name for name in found.new if name not in misfits]
        details = [f"of another shape: {_listed(found.misfits)}"] if misfits else []
        details += [f"not in the file: {_listed(missing)}"] if missing else []
        raise CheckpointError(
            f"{weights.source}: only {percent(found.share)} of {encoder_name} is in it ({'; '.join(details)}). "
            f"Name the encoder that it is of{hint()}{remedy}"
        )
    if found.deeper_share > 1 - ENOUGH:
        raise CheckpointError(
            f"{weights.source}: is of a larger network than {encoder_name}: it has {len(found.deeper)} tensors more "
            f"among the same layers ({_listed(found.deeper)}). Name the encoder that it is of{hint()}{remedy}"
        )


def sentence(weights: Weights, found: Match) -> str:
    """For the start of a run: what was taken from where."""
    parts = [
        f"{weights.source} ({weights.kind}, sha256 {weights.sha256[:12]}): {percent(found.share)} of the encoder, "
        f"{len(found.taken)} tensors"
    ]
    if found.naming != "the library's own":
        parts.append(f"names: {found.naming}")
    if found.prefix:
        twins = f", not {_listed(found.twins)}" if found.twins else ""
        parts.append(f"prefix {found.prefix}{twins}")
    parts += found.adapted
    parts.append(f"new: {_listed(found.new)}" if found.new else "nothing is new")
    if found.left_out:
        parts.append(f"left out: {len(found.left_out)} ({', '.join(groups(found.left_out))})")
    return "; ".join(parts)


def groups(names: Iterable[str], at_most: int = _SHOWN) -> list[str]:
    """`fc: 2, module.encoder_k: 120`: what so many names have in common at their beginning."""
    tops: dict[str, int] = defaultdict(int)
    for name in names:
        parts = name.split(".")
        depth = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), 0) + 1
        tops[_short(".".join(parts[:depth]))] += 1
    listed = [f"{top}: {count}" for top, count in tops.items()]
    return listed[:at_most] + ([f"… {len(listed) - at_most} more"] if len(listed) > at_most else [])


def non_finite(weights: Weights) -> list[str]:
    """Names of tensors that hold NaN or infinity."""
    floats = ((name, x) for name, x in weights.tensors.items() if x.is_floating_point() or x.is_complex())
    return [name for name, x in floats if not bool(torch.isfinite(x if x.is_complex() else x.float()).all())]


def percent(share: float) -> str:
    """Never 100 % of what is not whole."""
    return "100 %" if share >= 1 else f"{math.floor(1000 * share) / 10:.1f} %"


def _listed(names: list[str]) -> str:
    more = f" … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(map(_short, names[:_SHOWN])) + more


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def _best_fit(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], stem: _Stem | None, tried: list[Naming]
) -> tuple[Naming, str, list[str]] | None:
    """The naming and the prefix that find most of the encoder, and other prefixes that find as much. None: nothing."""
    prefixes = _prefixes_by_end(tensors)
    scores: list[tuple[int, int, int, Naming, str]] = []
    for naming in tried:
        sizes: dict[str, int] = defaultdict(int)
        for name, target in own.items():
            first, *others = naming.names(name)
            for prefix in prefixes.get(first, ()):
                parts = [prefix + part for part in (first, *others)]
                if all(part in tensors for part in parts) and _fits(name, target, [tensors[p] for p in parts], stem):
                    sizes[prefix] += target.numel()
        scores += [(size, _preference(prefix), -len(prefix), naming, prefix) for prefix, size in sizes.items()]
    if not scores:
        return None
    best = max(scores, key=lambda score: score[:3])
    twins = {prefix for size, *_, prefix in scores if size == best[0]} - {best[-1]}
    return best[3], best[4], sorted(twins)


def _prefixes_by_end(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For every end of a name that follows a dot, and for whole names: what stands before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        at = 0
        while True:
            found[name[at:]].append(name[:at])
            at = name.find(".", at) + 1
            if at == 0:
                break
    return found


def _preference(prefix: str) -> int:
    words = prefix.lower()
    return any(word in words for word in _BETTER) - any(word in words for word in _WORSE)


@dataclass(frozen=True)
class _Stem:
    """The convolution that sees the pixels."""

    name: str
    stride: int
    padded: bool
    has_bias: bool


def _stem(encoder: nn.Module) -> _Stem | None:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            padded = module.padding not in ((0, 0), 0, "valid")
            return _Stem(f"{name}.weight", module.stride[0], padded, module.bias is not None)
    return None


def _fits(name: str, target: Tensor, found: list[Tensor], stem: _Stem | None) -> bool:
    """As it is, or after a change that `_take` knows."""
    if len(found) > 1:
        shape = (sum(x.shape[0] if x.ndim else 0 for x in found), *found[0].shape[1:])
        return all(x.shape[1:] == found[0].shape[1:] for x in found) and shape == target.shape
    source = found[0]
    if source.shape == target.shape or _same_but_for_ones(source, target):
        return True
    if name.endswith(_POSITIONS):
        return _positions(source, target) is not None
    if stem is not None and name == stem.name and source.ndim == target.ndim == 4 and source.numel():
        square = source.shape[2] == source.shape[3] and target.shape[2] == target.shape[3]
        # A patch embedding of another patch is another network; of a convolution there is a smaller picture.
        same_kernel = source.shape[2:] == target.shape[2:]
        return source.shape[0] == target.shape[0] and square and (same_kernel or stem.padded)
    return False


def _same_but_for_ones(source: Tensor, target: Tensor) -> bool:
    """A linear map as a convolution of 1x1, or the other way round."""
    sides = [[n for n in x.shape if n != 1] for x in (source, target)]
    return source.numel() == target.numel() and source.ndim != target.ndim and sides[0] == sides[1]


# ---------------------------------------------------------------------------------------------------------------------
# Adapting


def _take(
    weights: Weights,
    name: str,
    target: Tensor,
    found: list[Tensor],
    stem: _Stem | None,
    encoder: nn.Module,
    adapted: list[str],
) -> Tensor:
    """float32 (or the target's type) of the target's shape, finite."""
    value = torch.cat(found) if len(found) > 1 else found[0]
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise CheckpointError(f"{weights.source}: {name} holds {value.dtype}, which is no type of weights")
    if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
        raise CheckpointError(f"{weights.source}: {name} holds NaN or infinity: damaged, or of a training that failed")
    value = value.to(target.dtype)
    if value.shape == target.shape:
        return value
    before = "x".join(map(str, value.shape))
    if name.endswith(_POSITIONS):
        value, what = _resize_positions(value, target)
        adapted.append(f"{name}: {what}")
    elif stem is not None and name == stem.name and not _same_but_for_ones(value, target):
        value, what = _adapt_stem(value, target, encoder)
        adapted.append(f"{name}: {what}")
    else:
        adapted.append(f"{name}: {before} as {'x'.join(map(str, target.shape))}")
    return value.reshape(target.shape)


def _positions(source: Tensor, target: Tensor) -> tuple[int, int, int] | None:
    """Tokens before the patches, and the sides of both grids; None: these are no square grids of positions."""
    if source.ndim != 3 or target.ndim != 3 or (source.shape[0], source.shape[2]) != (target.shape[0], target.shape[2]):
        return None
    for before in (0, 1, 2, 5):
        sides = [math.isqrt(max(x.shape[1] - before, 0)) for x in (source, target)]
        if all(side and side**2 == x.shape[1] - before for side, x in zip(sides, (source, target), strict=True)):
            return before, sides[0], sides[1]
    return None


def _resize_positions(source: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Bicubic, antialiased as timm does it."""
    grids = _positions(source, target)
    assert grids is not None
    before, old, new = grids
    first, patches = source[:, :before], source[:, before:]
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    patches = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return torch.cat([first, patches], dim=1), f"positions interpolated from {old}x{old} to {new}x{new} patches"


def _adapt_stem(source: Tensor, target: Tensor, encoder: nn.Module) -> tuple[Tensor, str]:
    """Channels [O, C, k, k] and kernel to those of the target. Keeps the response to an even picture."""
    said = []
    channels, wanted = source.shape[1], target.shape[1]
    if channels != wanted:
        source = source.sum(1, keepdim=True).expand(-1, wanted, -1, -1) / wanted
        said.append(
            f"{channels} input channel{'s' if channels > 1 else ''} in the file, {wanted} here: each gets a share of "
            "their sum, so that a grey picture gives the same"
        )
    old, new = source.shape[-1], target.shape[-1]
    if old != new:
        shares = _overlaps(old, new).to(source.dtype)
        source = torch.einsum("ia,jb,ocab->ocij", shares, shares, source)
        pooling = isinstance(getattr(encoder, "maxpool", None), nn.Identity)
        said.append(
            f"{old}x{old} in the file, {new}x{new} here: resampled, as for a picture of {new}/{old} the size"
            + (", and the pooling after it is left out" if pooling and old > new else "")
        )
    return source, "; ".join(said)


def _overlaps(old: int, new: int) -> Tensor:
    """[new, old]: how much of each old cell lies in each new one; every old cell is shared out in full."""
    edges, cells = torch.arange(new + 1, dtype=torch.float64) * old / new, torch.arange(old, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return ends.clamp_min(0)


def fold_normalisation(
    weights: Weights, found: Match, encoder: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> str:
    """Makes the stem take images normalised with `mean` and `std`, where the file's expects others.

    Exact where the stem has a bias and no padding, as a ViT's or a ConvNeXt's; elsewhere it is left, and said.
    """
    theirs = weights.mean, weights.std
    if theirs[0] is None or theirs[1] is None or (_near(theirs[0], mean) and _near(theirs[1], std)):
        return ""
    if len(theirs[0]) != len(mean):
        return (
            f"these weights expect {len(theirs[0])} channels normalised with their own mean and standard deviation; "
            f"here they get {len(mean)}, normalised with those of data.train"
        )
    here = "ImageNet's" if (mean, std) == (RGB.mean, RGB.std) else "those of data.train"
    shown = "; ".join(" ".join(f"{x:.3g}" for x in values) for values in theirs if values)
    stem = _stem(encoder)
    bias = None if stem is None else stem.name.removesuffix("weight") + "bias"
    if stem is None or bias not in found.taken or stem.name not in found.taken or stem.padded:
        return (
            f"these weights expect images normalised with mean and standard deviation {shown}; here they get "
            f"{here}, so h differs a little from what their authors measured, until training has adapted it"
        )
    weight = found.taken[stem.name].double()  # [O, 3, k, k]
    scale = torch.tensor(std, dtype=torch.float64) / torch.tensor(theirs[1], dtype=torch.float64)
    shift = torch.tensor(mean, dtype=torch.float64) - torch.tensor(theirs[0], dtype=torch.float64)
    shift = shift / torch.tensor(theirs[1], dtype=torch.float64)
    offset = torch.einsum("ochw,c->o", weight, shift)
    found.taken[bias] = (found.taken[bias].double() + offset).to(found.taken[bias].dtype)
    found.taken[stem.name] = (weight * scale.view(1, -1, 1, 1)).to(found.taken[stem.name].dtype)
    return (
        f"these weights expect images normalised with mean and standard deviation {shown}; {stem.name} and {bias} have "
        f"been changed so that they give the same for {here}, which are used here"
    )


def _near(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(abs(x - y) < 1e-3 for x, y in zip(a, b, strict=True))
