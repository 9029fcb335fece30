"""simclr_dist: SimCLR pretraining that is exact on any number of devices.

`simclr_dist.pretrain` and `simclr_dist.Run` are in api.py; torch is imported when they are called.
"""

from importlib import import_module
from typing import Any

from simclr_dist import renamed

__version__ = "0.1.0"

renamed.install()


def __getattr__(name: str) -> Any:
    if name in ("pretrain", "Run"):
        return getattr(import_module("simclr_dist.api"), name)
    raise AttributeError(f"module 'simclr_dist' has no attribute {name!r}")
