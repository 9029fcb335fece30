"""Dropout and its like without state: what a layer draws is a hash of (seed, epoch, sample, view, layer, element).

torch's layers draw from a generator, so a sample's mask depends on its place in the batch, and with that on the number
of processes and on micro-batches. `key_draws` finds the modules of a network that draw (random_draws.py). From then on
they run in a mode that answers torch's random functions with hashes of keys, which come with the images. So nothing has
to be saved, and a pass that is computed again (micro-batches, activation checkpointing) draws the same.

Letters: n rows (views) of a forward pass, L keyed modules, E elements that one row draws. Hashes are 32 bits in int32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simclr_dist.data.randomness import DROPOUT, DROPOUT_OF_BATCH, keys, uniform

Shape = tuple[int, ...]

_PIECE = 1 << 16  # on a CPU, masks are made in pieces of so many elements, which stay in a core's cache
_GOLDEN = 0x1E3779B9
_ALPHA = 1.7580993408473766  # of SELU: what alpha dropout puts in place of a dropped element, with a minus


def draw_keys(
    seed: int,
    epoch: int,
    step: int,
    sample_ids: NDArray[np.int64],
    device: torch.device | str = "cpu",
    num_views: int = 2,
) -> Tensor:
    """Keys of all V views of `sample_ids` [B]: int32 [V, B, 2] on `device`.

    The first of each pair is the row's own. The second is that of global step `step`, for what a layer draws once for
    a whole batch.
    """
    rows = uniform(keys(seed, epoch, sample_ids[None], np.arange(num_views)[:, None]), DROPOUT)  # [V, B]
    shared = np.broadcast_to(uniform(keys(seed, epoch, step, 0), DROPOUT_OF_BATCH), rows.shape)
    words = torch.from_numpy((np.stack([rows, shared], axis=-1) * 2.0**32).astype(np.uint32).view(np.int32))
    # From page-locked memory the copy does not make the host wait.
    return words.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else words


class Draws:
    """What the keyed modules of one network share: the keys of the forward pass that runs, or ran last."""

    def __init__(self, by_place: bool = False) -> None:
        """by_place: what an element draws depends on its place along each axis, not on the sizes of the others: texts
        are padded to the longest of their batch, and its length must not move the others' masks.
        """
        self.by_place = by_place
        self.layers: list[KeyedLayer] = []
        self.owners: dict[str, Owner] = {}
        self.recomputing = False
        self._streams: tuple[Tensor, Tensor] | None = None  # [L, n] of the rows, [L, 1] of the batch

    @property
    def has_keys(self) -> bool:
        return self._streams is not None

    def hashes(self) -> Tensor:
        """Of the layers, [L, 1]."""
        return torch.tensor([[layer.hash] for layer in self.layers], dtype=torch.int32)

    def begin(self, row_keys: Tensor | None, hashes: Tensor) -> None:
        """A forward pass of rows with keys [n, 2] begins; None: layers draw from torch's generator.

        hashes: those of the layers, on the device of the keys.
        """
        self.recomputing = False
        for layer in self.layers:
            layer.calls = 0
        for owner in self.owners.values():
            owner.calls = 0
        if row_keys is None:
            self._streams = None
            return
        # For all layers at once: stochastic depth in 50 blocks takes no more launches than in one.
        self._streams = mix_(row_keys[:, 0] ^ hashes), mix_(row_keys[:1, 1] ^ hashes)

    def end(self) -> None:
        """The forward pass has ended: a module that runs again before the next one is recomputed in the backward."""
        self.recomputing = True
        for layer in self.layers:
            layer.calls_again = None

    def streams(self, layer: KeyedLayer) -> tuple[Tensor, Tensor]:
        """Hashes of the rows that `layer` sees and of the batch [1]."""
        assert self._streams is not None
        part, parts = layer.part
        return self._streams[0][layer.index].chunk(parts)[part], self._streams[1][layer.index]


class KeyedLayer:
    """Who a keyed module is, and how often it has run in this forward pass."""

    def __init__(self, name: str, draws: Draws) -> None:
        self.name = name
        self.draws = draws
        self.index = len(draws.layers)
        self.hash = int(np.uint32(zlib.crc32(name.encode())).view(np.int32))
        self.shapes_of_batch: frozenset[Shape] = frozenset()
        """Of draws that all rows share."""
        self.recorded: list[Shape] | None = None
        """Shapes drawn, while they are being watched."""
        self.part = 0, 1
        """Which part of the rows it sees, of how many of equal size."""
        self.owner: Owner | None = None
        self.calls = 0
        self.calls_again: int | None = None
        """While recomputing: since its owner began again."""
        draws.layers.append(self)

    def number_of_call(self) -> int:
        """Which call of the forward pass this is, or repeats."""
        if not self.draws.recomputing:
            self.calls += 1
            return self.calls - 1
        if self.calls <= 1:
            return 0
        if self.owner is None or self.owner.calls != 1 or self.calls_again is None:
            raise RuntimeError(
                f"{self.name} runs {self.calls} times in a forward pass and is recomputed in the backward: which of "
                "them this is cannot be known. Give each run a module of its own, or leave activation checkpointing out"
            )
        self.calls_again += 1
        return self.calls_again - 1


class Owner:
    """Counts calls of a module that calls keyed modules several times; a forward pre-hook of it."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.layers: list[KeyedLayer] = []
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self.draws.recomputing:
            self.calls += 1
            return
        for layer in self.layers:
            layer.calls_again = 0


class Call(TorchFunctionMode):
    """One call of a keyed module: torch's random functions inside it take their randomness from keys."""

    def __init__(self, layer: KeyedLayer) -> None:
        super().__init__()
        self._layer = layer
        self._rows, self._batch = layer.draws.streams(layer)
        self._number = layer.number_of_call() << 10

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _KEYED:
            return _KEYED[func](self, *args, **(kwargs or {}))
        if func in _TRANSPARENT:
            with self:
                return _TRANSPARENT[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def streams(self, shape: Shape) -> Tensor:
        """Hashes [m] for the next draw, of `shape`: one for each row, or a single one for the batch."""
        layer, number = self._layer, self._number
        self._number += 1
        if layer.recorded is not None:
            layer.recorded.append(shape)
        streams = self._rows
        if not shape or shape in layer.shapes_of_batch or shape[0] % len(self._rows):
            if layer.recorded is None and shape not in layer.shapes_of_batch:
                raise RuntimeError(f"{layer.name} draws {list(shape)} for {len(self._rows)} rows, unlike at the start")
            streams = self._batch
        return mix_(streams + number * _GOLDEN) if number else streams

    def _elements(self, shape: Shape, streams: Tensor) -> Tensor | None:
        """Hashes of the elements that each stream draws, [E]. None: it draws one."""
        E = math.prod(shape) // len(streams)
        if not self._layer.draws.by_place:
            return None if E == 1 else _hashes(E, streams)
        elements = torch.zeros(1, dtype=torch.int32, device=streams.device)
        for size in (shape[0] // len(streams), *shape[1:]):
            elements = mix_(elements[:, None] ^ _hashes(size, streams)).flatten()
        return elements

    def bits(self, shape: Shape) -> Tensor:
        """Uniform int32 of `shape`."""
        streams = self.streams(shape)
        return _bits(streams, self._elements(shape, streams)).view(shape)

    def keep(self, shape: Shape, p: float) -> Tensor:
        """bool of `shape`: False with probability p."""
        streams = self.streams(shape)
        elements = self._elements(shape, streams)
        threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
        if streams.device.type != "cpu" or torch.compiler.is_compiling() or elements is None:
            return (_bits(streams, elements) >= threshold).view(shape)
        kept = torch.empty(len(streams), len(elements), dtype=torch.bool)
        rows = max(1, _PIECE // max(len(elements), 1))
        for i in range(0, len(streams), rows):
            torch.ge(_bits(streams[i : i + rows], elements), threshold, out=kept[i : i + rows])
        return kept.view(shape)

    def uniform(self, shape: Shape) -> Tensor:
        """float32 of `shape`, between 0 and 1, both excluded."""
        return ((self.bits(shape) >> 9).bitwise_and_(0x7FFFFF) + 0.5) * 2.0**-23

    def normal(self, shape: Shape) -> Tensor:
        return torch.erfinv(2 * self.uniform(shape) - 1) * math.sqrt(2)

    def exponential(self, shape: Shape) -> Tensor:
        return -torch.log(self.uniform(shape))


def _hashes(n: int, like: Tensor) -> Tensor:
    """Of the numbers from 1 to n."""
    return mix_(torch.arange(1, n + 1, dtype=torch.int32, device=like.device))


def _bits(streams: Tensor, elements: Tensor | None) -> Tensor:
    """Uniform int32 [m, E]; [m] where each stream draws one."""
    return streams if elements is None else mix_(streams[:, None] ^ elements)


def mix_(x: Tensor) -> Tensor:
    """A bijection of 32 bits, in place: Wellons' lowbias32. int32 wraps around; the masks make its shifts logical."""
    t = x >> 16
    x.bitwise_xor_(t.bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    torch.bitwise_right_shift(x, 15, out=t)
    x.bitwise_xor_(t.bitwise_and_(0x1FFFF)).mul_(-0x7B935975)  # 0x846CA68B
    torch.bitwise_right_shift(x, 16, out=t)
    return x.bitwise_xor_(t.bitwise_and_(0xFFFF))


# ---------------------------------------------------------------------------------------------------------------------
# torch's random functions, with its signatures


def _dropout(call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _drop(call, input, p, training, inplace, input.shape)


def _feature_dropout(call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _drop(call, input, p, training, inplace, _of_channels(input))


def _drop(call: Call, input: Tensor, p: float, training: bool, inplace: bool, shape: Shape) -> Tensor:
    if not training or p == 0:
        return input
    keep = call.keep(tuple(shape), p)
    output = input.mul_(keep) if inplace else input * keep
    return output.mul_(1 / (1 - p)) if p < 1 else output.mul_(0)


def _alpha_dropout(call: Call, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    return _drop_alpha(call, input, p, training, input.shape)


def _feature_alpha_dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _drop_alpha(call, input, p, training, _of_channels(input))


def _drop_alpha(call: Call, input: Tensor, p: float, training: bool, shape: Shape) -> Tensor:
    """Klambauer et al. 2017, arXiv:1706.02515: mean and variance stay."""
    if not training or p == 0:
        return input
    scale = ((1 - p) * (1 + p * _ALPHA**2)) ** -0.5 if p < 1 else 0.0
    return torch.where(call.keep(tuple(shape), p), input, -_ALPHA) * scale + scale * p * _ALPHA


def _of_channels(input: Tensor) -> Shape:
    return (*input.shape[:2], *(1 for _ in input.shape[2:]))


def _rrelu(
    call: Call, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.rrelu(input, lower, upper, training, inplace)
    slope = call.uniform(tuple(input.shape)).mul_(upper - lower).add_(lower).to(input.dtype)
    return torch.where(input < 0, input * slope, input)


def _attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """With dropout written out: the fused kernels draw inside."""
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    weights = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        weights = weights + attn_mask
    return _dropout(call, weights.softmax(-1), dropout_p) @ value


def _make(draw: Callable[[Call, Shape], Tensor]) -> Callable[..., Tensor]:
    """torch.rand and torch.randn."""

    def keyed(call: Call, *size: Any, **options: Any) -> Tensor:
        size = options.get("size", size[0] if size and not isinstance(size[0], int) else size)
        dtype = options.get("dtype") or torch.get_default_dtype()
        return draw(call, tuple(size)).to(options.get("device") or torch.get_default_device(), dtype)

    return keyed


def _make_like(draw: Callable[[Call, Shape], Tensor]) -> Callable[..., Tensor]:
    def keyed(call: Call, input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(call, tuple(input.shape)).to(options.get("device") or input.device, dtype or input.dtype)

    return keyed


def _uniform_(call: Call, self: Tensor, a: float = 0, b: float = 1, **options: Any) -> Tensor:
    return self.copy_(call.uniform(tuple(self.shape)).mul_(b - a).add_(a))


def _normal_(call: Call, self: Tensor, mean: float = 0, std: float = 1, **options: Any) -> Tensor:
    return self.copy_(call.normal(tuple(self.shape)).mul_(std).add_(mean))


def _exponential_(call: Call, self: Tensor, lambd: float = 1, **options: Any) -> Tensor:
    return self.copy_(call.exponential(tuple(self.shape)).div_(lambd))


def _bernoulli_(call: Call, self: Tensor, p: float | Tensor = 0.5, **options: Any) -> Tensor:
    return self.copy_(_ones(call, tuple(self.shape), p))


def _bernoulli(call: Call, input: Tensor, p: float | None = None, **options: Any) -> Tensor:
    return _ones(call, tuple(input.shape), input if p is None else p).to(input.dtype)


def _ones(call: Call, shape: Shape, p: float | Tensor) -> Tensor:
    return call.uniform(shape) < p if isinstance(p, Tensor) else call.keep(shape, 1 - p)


def _randperm(call: Call, n: int, **options: Any) -> Tensor:
    return call.bits((n,)).argsort(stable=True).to(options.get("device") or torch.get_default_device())


_KEYED: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout), _feature_dropout),
    F.alpha_dropout: _alpha_dropout,
    F.feature_alpha_dropout: _feature_alpha_dropout,
    F.rrelu: _rrelu,
    F.scaled_dot_product_attention: _attention,
    torch.rand: _make(Call.uniform),
    torch.randn: _make(Call.normal),
    torch.rand_like: _make_like(Call.uniform),
    torch.randn_like: _make_like(Call.normal),
    torch.randperm: _randperm,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    Tensor.exponential_: _exponential_,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.bernoulli: _bernoulli,
    torch.bernoulli: _bernoulli,
}


def _transparent(function: Any) -> Callable[..., Any]:
    """The same function, except that a mode sees the functions it calls, not itself."""
    blind = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(function.__code__, {**function.__globals__, **blind}, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# They draw through other functions of torch.nn.functional.
_TRANSPARENT = {function: _transparent(function) for function in (F.multi_head_attention_forward, F.gumbel_softmax)}


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class Keyed(nn.Module):
    """Goes before a module's own class (`keyed_class`)."""

    keyed_layer: KeyedLayer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and self.keyed_layer.draws.has_keys):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with Call(self.keyed_layer):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@cache
def keyed_class(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Keyed{own.__name__}", (Keyed, own), {})


def make_keyed(network: nn.Module, names: Sequence[str], draws: Draws) -> list[KeyedLayer]:
    """Changes the classes of the named modules. Names of parameters stay."""
    layers = []
    for name in names:
        module = network.get_submodule(name)
        module.keyed_layer = KeyedLayer(name, draws)  # type: ignore[assignment]
        module.__class__ = keyed_class(type(module))  # type: ignore[arg-type]
        layers.append(module.keyed_layer)
    return layers  # type: ignore[return-value]


def share_owner(network: nn.Module, layer: KeyedLayer) -> None:
    """Lets the module that owns `layer`'s tell its calls apart, also when it is recomputed."""
    name = layer.name.rpartition(".")[0]
    owners = layer.draws.owners
    if name not in owners:
        owners[name] = Owner(layer.draws)
        network.get_submodule(name).register_forward_pre_hook(owners[name])
    layer.owner = owners[name]
    owners[name].layers.append(layer)
