"""simclr_dist: SimCLR pretraining that is exact on any number of devices."""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# Scripts written for 0.1.0 import these modules from here. Imported on demand, so that the package needs no torch.
_MOVED = {"distributed": "simclr_dist.parallel.distributed", "encoders": "simclr_dist.network.encoders"}


def __getattr__(name: str) -> ModuleType:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_MOVED[name])
