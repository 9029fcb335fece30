"""Kinds by name: what `data.kind` may say."""

from __future__ import annotations

from collections.abc import Callable

from simclr_dist.config import DataConfig
from simclr_dist.errors import ConfigError
from simclr_dist.kinds.images import Images
from simclr_dist.kinds.kind import Kind
from simclr_dist.kinds.pairs import ImagesWithTexts, PairsOfTexts
from simclr_dist.kinds.tokens import Proteins, Texts

Build = Callable[[DataConfig], Kind]
_BUILT_IN: dict[str, Build] = {
    "images": Images,
    "text": Texts,
    "proteins": Proteins,
    "image_text": ImagesWithTexts,
    "text_pairs": PairsOfTexts,
}
_REGISTERED: dict[str, Build] = {}


def kind_of(data: DataConfig) -> Kind:
    """The kind that `data.kind` names, of these data. Opens nothing. Raises ConfigError."""
    known = {**_BUILT_IN, **_REGISTERED}
    if data.kind not in known:
        raise ConfigError(
            [
                f"data.kind: unknown kind {data.kind!r}; known are {', '.join(known)}. One of your own is registered "
                "by the script that starts the training (docs/guides/extending.md)"
            ]
        )
    return known[data.kind](data)


def is_built_in(name: str) -> bool:
    """Whether every process knows the kind, not only a script that registers it."""
    return name in _BUILT_IN


def noun_of(kind: str) -> str:
    """What samples of `data.kind` are called, also where nobody has registered it here."""
    return str(getattr({**_BUILT_IN, **_REGISTERED}.get(kind), "noun", "sample"))


def register(name: str, build: Build) -> None:
    """Makes `data.kind: NAME` use build(config.data), usually a class of your own.

    For a script that then trains or evaluates; a configuration cannot name code itself, because it may come from
    somebody else. Raises ValueError for a name that is taken.
    """
    if name in _BUILT_IN:
        raise ValueError(f"kind {name!r} is taken; choose another name")
    _REGISTERED[name] = build
