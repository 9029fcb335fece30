"""What keyed dropout costs: forward and backward with it and with torch's own, in turns.

    python -m benchmarks.dropout                        layers, and small versions of three networks, on one CPU thread
    python -m benchmarks.dropout --device cuda --image-size 224 --images 128 --encoders swin_t convnext_tiny

Both are the same modules with the same weights; without keys they draw from torch's generator. Both take turns, so
that a busy machine slows them alike; the figures are medians. Keys are made outside, once a step: a row of its own. The
result is a table and benchmarks/results/dropout_<date>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import ModelConfig
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import SimCLR, build_model


class Layer(nn.Module):
    """Tokens [n, T, D], made of images by one product, through a layer."""

    def __init__(self, layer: nn.Module, tokens: int, width: int) -> None:
        super().__init__()
        self.layer, self.tokens = layer, tokens
        self.scale = nn.Parameter(torch.ones(tokens, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images[:, :1, :1, :1].flatten(1)[:, None] * self.scale).mean(1)


def networks(encoders: list[str], image_size: int) -> dict[str, tuple[nn.Module, int]]:
    """By name: an encoder, and the side of its images."""
    vit = torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 512, dropout=0.1, attention_dropout=0.1)
    vit.heads = nn.Identity()
    made: dict[str, tuple[nn.Module, int]] = {
        "nn.Dropout [n, 64, 384]": (Layer(nn.Dropout(0.1), 64, 384), 32),
        "StochasticDepth [n, 64, 384]": (Layer(StochasticDepth(0.1, "row"), 64, 384), 32),
        "attention, 64 tokens of 128": (
            Layer(nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True), 64, 128),
            32,
        ),
        "vit of 4 layers, dropout everywhere": (vit, 32),
    }
    for name in encoders:
        made[name] = build_model(ModelConfig(encoder=name, image_size=image_size)).encoder, image_size
    return made


def measure(encoder: nn.Module, image_size: int, images: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    network = SimCLR(encoder, nn.Identity(), 0).to(device).train()
    key_draws(network, images(image_size))
    x = torch.randn(2 * images, 3, image_size, image_size, device=device)
    keys = draw_keys(0, 0, 0, np.arange(images), device).flatten(0, 1)
    runs: dict[str, Callable[[], Tensor]] = {"torch": lambda: network(x)[1], "keyed": lambda: network(x, keys)[1]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repetitions + 1):
        for name in sorted(runs, reverse=bool(i % 2)):
            start = _now(device)
            runs[name]().sum().backward()
            if i:
                seconds[name].append(_now(device) - start)
    found = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    ratios = [keyed / plain for keyed, plain in zip(seconds["keyed"], seconds["torch"], strict=True)]
    return found | {"ratio": statistics.median(ratios), "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2]}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32, help="a step; each has two views")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--encoders", nargs="*", default=["convnext_tiny", "swin_t", "efficientnet_b0"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report: dict[str, Any] = circumstances(vars(args), device) | {"found": {}}
    lines = [f"{'forward and backward':36} {'torch, ms':>10} {'keyed, ms':>10} {'keyed/torch':>12}"]
    print(lines[0])
    for name, (encoder, image_size) in networks(args.encoders, args.image_size).items():
        found = measure(encoder, image_size, args.images, args.repetitions, device)
        report["found"][name] = found
        lines.append(f"{name:36} {found['torch_ms']:10.1f} {found['keyed_ms']:10.1f} {found['ratio']:12.2f}")
        print(lines[-1], flush=True)
    start = time.perf_counter()
    for step in range(100):
        draw_keys(0, 0, step, np.arange(args.images), device)
    report["found"]["keys_ms"] = 10 * (time.perf_counter() - start)
    lines.append(f"{'keys of a step':36} {'':10} {report['found']['keys_ms']:10.2f}")
    print(lines[-1])
    write("dropout", args.out, report, lines)


if __name__ == "__main__":
    main()
