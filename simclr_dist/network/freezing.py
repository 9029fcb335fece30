"""`model.freeze`: parameters that keep their values, by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr_dist.errors import ConfigError


def freeze_matching(network: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Takes the parameters whose names match out of training; returns those names.

    A BatchNorm all of whose parameters are frozen also keeps its statistics: it normalises with them, as in
    evaluation, and does not move them. Dropout stays as it is. Raises ConfigError for a pattern that matches nothing,
    and where nothing would be left to train.
    """
    if not patterns:
        return ()
    names = [name for name, _ in network.named_parameters()]
    problems = [_no_match(pattern, names) for pattern in patterns if not any(fnmatchcase(n, pattern) for n in names)]
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        problems.append("model.freeze: nothing is left to train; leave the projection head out")
    if problems:
        raise ConfigError(problems)
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            _keep_in_evaluation(module)
    return tuple(frozen)


def _keep_in_evaluation(norm: nn.Module) -> None:
    """Also where the network around it is set to training."""
    norm.eval()
    norm.train = MethodType(_stay, norm)  # type: ignore[method-assign]


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def _no_match(pattern: str, names: list[str]) -> str:
    parts = sorted({".".join(name.split(".")[:depth]) for name in names for depth in range(1, 9)} | set(names))
    near = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5)
    inner = [f"encoder.{pattern}"] if any(fnmatchcase(name, f"encoder.{pattern}") for name in names) else []
    known = " or ".join(dict.fromkeys([*inner, *(x if x in names else f"{x}.*" for x in near)]))
    return f"model.freeze: {pattern!r} matches no parameter; " + (
        f"did you mean {known}?" if known else f"names are such as {names[0]} and {names[-1]}"
    )
