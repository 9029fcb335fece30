"""Chooses the code that changes the colours: by name and device, the GPU's kernels only after a trial."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.views import torch_operations
from simclr_dist.views.parameters import Parameters, draw_parameters
from simclr_dist.views.presets import Augmentation, blur_kernel_size

FALLBACK = "torch"
_MODULES = {"numba": "cpu_kernel", "torch": "torch_operations", "triton": "triton_kernel"}
_DEVICES = {"numba": "cpu", "triton": "cuda"}
_LARGEST_ERROR = 1e-4  # of a normalised value; a grey level is 2e-2


class AugmentViews(Protocol):
    """Images [n, S, S, C] to normalised float32 out [n, S, S, C], on one device; kernel_size: of the blur."""

    def __call__(
        self, images: Tensor, out: Tensor, parameters: Parameters, kernel_size: int, pixels: PixelFormat = RGB
    ) -> None: ...


def best(device: torch.device) -> str:
    """What `auto` means on this device, where it works."""
    return next((name for name, kind in _DEVICES.items() if kind == device.type), FALLBACK)


def load(name: str) -> AugmentViews:
    """Raises ImportError where numba or triton is missing."""
    function: AugmentViews = import_module(f"simclr_dist.views.{_MODULES[name]}").augment_views
    return function


@cache
def choose(name: str, device: torch.device, image_size: int, pixels: PixelFormat = RGB) -> AugmentViews:
    """The code that `name` means on this device; torch's operations with a warning, where it does not work there."""
    name = best(device) if name == "auto" else name
    if reason := obstacle(name, device, image_size, pixels):
        warnings.warn(f"the augmentation uses implementation {FALLBACK!r} instead of {name!r}: {reason}", stacklevel=2)
        name = FALLBACK
    return load(name)


@cache
def obstacle(name: str, device: torch.device, image_size: int, pixels: PixelFormat = RGB) -> str | None:
    """Why `name` cannot be used on this device; None if it can. The GPU's kernels are compiled and tried, once."""
    if name not in _MODULES:
        raise ValueError(f"unknown implementation {name!r}; known: auto, {', '.join(_MODULES)}")
    if name == FALLBACK:
        return None
    if device.type != _DEVICES[name]:
        return f"it is for {_DEVICES[name]}, the images are on {device.type}"
    if name == "triton" and pixels != RGB:
        return f"its kernels are for 8-bit RGB normalised as ImageNet, and these images are {pixels}"
    try:
        function = load(name)
        return disagreement(function, device, image_size) if name == "triton" else None
    except Exception as error:  # compilers and drivers raise anything
        return f"{type(error).__name__}: {error}"


def disagreement(function: AugmentViews, device: torch.device, image_size: int) -> str | None:
    """How views of random images differ from those of torch's operations on the CPU; None if they agree."""
    everything = Augmentation(1.0, 0.0, (0.8, 0.8, 0.8, 0.2), 0.9, 0.3, (0.7, 0.7), (0.5, 0.5))
    parameters = draw_parameters(everything, 0, 0, np.arange(8))
    shape = (16, image_size, image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    error = torch.zeros(())
    for kernel_size in (1, blur_kernel_size(image_size)):  # as for presets that never blur, and that do
        expected, found = torch.empty(shape), torch.full(shape, torch.nan, device=device)
        torch_operations.augment_views(images, expected, parameters, kernel_size)
        function(images.to(device), found, parameters, kernel_size)
        error = torch.maximum(error, (found.cpu() - expected).abs().max())
    return None if error < _LARGEST_ERROR else f"its views are off by {error:.1e}"
