"""What `train.precision` means to torch."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from simclr_dist.config import Precision, PrecisionSetting

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type that autocast computes in; None for fp32, which needs no autocast."""
    return _DTYPES[precision]


def assumed_precision(setting: PrecisionSetting, device_type: str) -> Precision:
    """What `auto` comes to, as far as it is known without a measurement (training/precision.py decides)."""
    if setting != "auto":
        return setting
    return "bf16" if device_type == "cuda" else "fp32"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 itself: x86 with AVX512-BF16, AVX10 or AMX, Arm with BF16. True if not known."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return True
    return not flags or not {"avx512_bf16", "amx_bf16", "bf16", "avx10_2"}.isdisjoint(flags[0].split())


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """A context in which networks compute in `precision` on `device`."""
    dtype = autocast_dtype(precision)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
