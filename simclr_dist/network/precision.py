"""What `train.precision` means to torch."""

from __future__ import annotations

import torch

from simclr_dist.config import Precision

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type that autocast computes in; None for fp32, which needs no autocast."""
    return _DTYPES[precision]


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """A context in which networks compute in `precision` on `device`."""
    dtype = autocast_dtype(precision)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
