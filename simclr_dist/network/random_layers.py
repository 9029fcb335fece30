"""Which modules of a network draw random numbers in training, and which of them can draw by key.

Found by watching forward passes, not by the modules' names: torch marks its random operations, and a shape tells
whether its first size grows with the number of rows.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dist.network.inputs import Inputs
from simclr_dist.network.keyed_dropout import Draws, Shape, make_keyed, share_owner
from simclr_dist.network.simclr import SimCLR

_FEW, _MORE = 4, 6  # rows; even, because an image has two views
_NAMED = 5
_PASSES_WITH_VALUES = 5  # where layers are skipped at random, one pass does not see them all


@dataclass(frozen=True)
class RandomLayers:
    """The modules of a network that draw in training: their kinds by name."""

    keyed: Mapping[str, str] = field(default_factory=dict)
    """What they draw does not depend on the number of processes."""
    own: Mapping[str, str] = field(default_factory=dict)
    """They draw from generators, or in shapes that do not tell which row is whose."""
    failure: str = ""
    """Why it is not known."""

    def summary(self) -> str:
        """12 StochasticDepth, 2 Dropout: the same on any number of processes"""
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self.keyed.values()).items())
        return f"{kinds}: the same on any number of processes" if kinds else ""

    def warning(self) -> str:
        """What does depend on the number of processes; empty: nothing."""
        if self.failure:
            return f"whether layers draw random numbers cannot be seen, because a forward pass fails: {self.failure}"
        if not self.own:
            return ""
        names = [f"{name} ({kind})" for name, kind in self.own.items()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return (
            f"{', '.join(names[:_NAMED])}{more} cannot draw by key: results depend on the number of processes and on "
            "micro-batches (docs/guides/extending.md says what can)"
        )


def key_draws(network: SimCLR, inputs: Inputs) -> RandomLayers:
    """Makes the modules of `network` that draw do so by key, where possible. Draws nothing itself.

    Passes run on a copy without values, on one with values if the network reads them. A network that cannot run at all
    stays as it is.
    """
    failure = ""
    tokens = not inputs.example(1).is_floating_point()
    for device, passes in (("meta", 1), ("cpu", _PASSES_WITH_VALUES)):
        try:
            with _generators_stay():
                found = _examine(copy.deepcopy(network).to(device).train(), inputs, passes)
        except Exception as error:  # anything: it is a user's encoder
            failure = f"{type(error).__name__}: {error}"
            continue
        draws = Draws(by_place=tokens)
        keyed = [name for name, shapes in found.shapes_of_batch.items() if shapes is not None]
        for layer in make_keyed(network, keyed, draws):
            layer.shapes_of_batch = found.shapes_of_batch[layer.name] or frozenset()
            if layer.name in found.repeated:
                share_owner(network, layer)
        if keyed:
            network.draw_by(draws)
        own = sorted(found.left_over | {name for name, shapes in found.shapes_of_batch.items() if shapes is None})
        return RandomLayers(_kinds(network, keyed), _kinds(network, own))
    return RandomLayers(failure=failure)


@dataclass
class _Found:
    shapes_of_batch: dict[str, frozenset[Shape] | None] = field(default_factory=dict)
    """Of each module that draws, the shapes of draws that all rows share. None: it cannot draw by key."""
    repeated: set[str] = field(default_factory=set)
    """Modules that draw and run several times in a pass."""
    left_over: set[str] = field(default_factory=set)
    """Modules that draw something else than by key, in spite of it."""


def _examine(network: SimCLR, inputs: Inputs, passes: int) -> _Found:
    found, draws, watch = _Found(), Draws(), _Watch(network, inputs)
    for i in range(passes):
        watch.run(_FEW, seed=i)
        if not watch.drawing:
            return found
    names = [name for name in watch.drawing if not isinstance(network.get_submodule(name), torch.jit.ScriptModule)]
    found.left_over = watch.drawing - set(names)
    layers = make_keyed(network, sorted(names), draws)
    network.draw_by(draws)
    network.to(next(network.parameters()).device)
    drawn: dict[int, dict[str, list[Shape]]] = {_FEW: {}, _MORE: {}}
    watch.drawing.clear()
    for i in range(passes):
        for rows, shapes in drawn.items():
            for layer in layers:
                layer.recorded = []
            watch.run(rows, seed=i)
            found.repeated |= {layer.name for layer in layers if layer.calls > 1}
            for layer in layers:
                shapes[layer.name] = shapes.get(layer.name) or layer.recorded or []
    found.left_over |= watch.drawing
    for layer in layers:
        few, more = (by_layer[layer.name] for by_layer in drawn.values())
        found.shapes_of_batch[layer.name] = _shapes_of_batch(few, more, parts=layer.part[1])
    return found


def _shapes_of_batch(few: list[Shape], more: list[Shape], parts: int) -> frozenset[Shape] | None:
    """Those that stay when there are more rows. None: some neither stay nor grow with the rows, or there are none.

    parts: the layer sees one of that many parts of the rows.
    """
    if not few or len(few) != len(more):
        return None
    fewer_rows, rows = _FEW // parts, _MORE // parts
    for a, b in zip(few, more, strict=True):
        if a != b and (a[0] % fewer_rows or b != (a[0] // fewer_rows * rows, *a[1:])):
            return None
    return frozenset(a for a, b in zip(few, more, strict=True) if a == b)


class _Watch(TorchDispatchMode):
    """Notes in `drawing` the innermost module for each random operation of a pass."""

    def __init__(self, network: SimCLR, inputs: Inputs) -> None:
        super().__init__()
        self._inputs = inputs
        self.drawing: set[str] = set()
        self._network = network
        self._like = next(network.parameters())
        self._inside: list[str] = []
        self._outside_torch = _states_outside_torch()
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))  # type: ignore[misc]
            module.register_forward_hook(lambda *_: self._leave())
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False  # nothing is drawn there, and its statistics are slow without values

    def run(self, rows: int, *, seed: int) -> None:
        views = self._inputs.example(rows, seed)
        views = views.to(self._like if views.is_floating_point() else self._like.device)
        row_keys = torch.randint(
            -(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
        )
        self._inside.clear()
        self._outside_torch = _states_outside_torch()
        with torch.no_grad(), warnings.catch_warnings(action="ignore"), self._like.device, self:
            self._network(views, row_keys.to(self._like.device))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and self._inside and _is_random(func, args, kwargs or {}):
            self.drawing.add(self._inside[-1])
        return func(*args, **(kwargs or {}))

    def _enter(self, name: str) -> None:
        self._look_outside_torch()
        self._inside.append(name)

    def _leave(self) -> None:
        self._look_outside_torch()
        self._inside.pop()

    def _look_outside_torch(self) -> None:
        states = _states_outside_torch()
        if states != self._outside_torch and self._inside:
            self.drawing.add(self._inside[-1])
        self._outside_torch = states


def _is_random(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """False for dropout that drops nothing, such as inside torch's attention kernels."""
    arguments = func._schema.arguments
    given: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    return not any(given.get(name, True) in (0, False, None) for name in ("p", "dropout_p", "train", "training"))


def _states_outside_torch() -> tuple[object, object]:
    return random.getstate(), np.random.get_state()[2]  # type: ignore[index] # noqa: NPY002 - to find who uses it


@contextmanager
def _generators_stay() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _kinds(network: nn.Module, names: list[str]) -> dict[str, str]:
    return {name: type(network.get_submodule(name)).__name__.removeprefix("Keyed") for name in names}
