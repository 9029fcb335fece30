"""simclr_dist: SimCLR pretraining that is exact on any number of devices.

`simclr_dist.pretrain` and `simclr_dist.Run` are in api.py, `simclr_dist.load_views` in data/loading; torch is imported
when they are asked for.
"""

from importlib import import_module
from typing import Any

from simclr_dist import renamed

__version__ = "0.1.0"

renamed.install()


def __getattr__(name: str) -> Any:
    if name == "load_views":
        return import_module("simclr_dist.data.loading.ready_views").load_views
    if name in ("pretrain", "Run"):
        return getattr(import_module("simclr_dist.api"), name)
    raise AttributeError(f"module 'simclr_dist' has no attribute {name!r}")
