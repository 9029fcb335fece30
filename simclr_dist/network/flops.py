"""How much arithmetic a network needs, and how much a device could do."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simclr_dist.network.inputs import Inputs

# Dense bf16 and fp16 with float32 sums, TFLOP/s, from NVIDIA's data sheets (without sparsity). The first name that is a
# whole word of the device's is used.
PEAK_TFLOPS_16_BIT = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "V100": 125.0,
    "T4": 65.0,
}


def forward_flops(model: nn.Module, inputs: Inputs) -> int | None:
    """Floating-point operations for one input of mean size, forward; a multiply-add is two. None: not known.

    Counted on a copy without values (torch's meta device), so it takes neither memory nor time. Convolutions, matrix
    products and attention are counted; the rest is less than a hundredth.
    """
    shape = copy.deepcopy(model).to("meta").eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounterMode(display=False) as counter:
            shape((inputs.mean or inputs.draw)(2).to("meta"))  # of images with texts, one is a text
    except Exception:  # a user's encoder that reads the values of its tensors; this figure is for people only
        return None
    return counter.get_total_flops() // 2


def train_flops(forward: int, num_views: int) -> int:
    """For one image in a training step: all of its views, and a backward that costs twice its forward.

    Model FLOPs as in PaLM (arXiv:2204.02311, appendix B): forward passes that micro-batches repeat do not count, nor
    does the loss.
    """
    return 3 * num_views * forward


def peak_flops(device_name: str, precision: str) -> float | None:
    """Floating-point operations per second of a device at best; None where unknown.

    Unknown for fp32: there it depends on the operation, because convolutions use TF32 and matrix products do not.
    """
    if precision == "fp32":
        return None
    fits = (peak for name, peak in PEAK_TFLOPS_16_BIT.items() if re.search(rf"\b{name}\b", device_name))
    tflops = next(fits, None)
    return None if tflops is None else tflops * 1e12
