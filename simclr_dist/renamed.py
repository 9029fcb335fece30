"""Modules that scripts and model cards of release 0.1.0 import by the names they had then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "simclr_dist.distributed": "simclr_dist.parallel.distributed",
    "simclr_dist.encoders": "simclr_dist.network.encoders",
    "simclr_dist.model": "simclr_dist.network.simclr",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in RENAMED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(RENAMED[spec.name])
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # it has been executed under its own name


def install() -> None:
    """Lets the old names be imported; nothing is imported before that."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
