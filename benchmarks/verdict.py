"""Do figures without labels tell good runs from bad ones? Small runs from good to broken, and linear accuracy.

    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/train.beton --split train
    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/test.beton --split test
    python -m benchmarks.verdict /tmp/train.beton /tmp/test.beton --work /tmp/verdict

Each run trains as `simclr_dist.train` does, for up to 390 steps on one thread, with a look for collapse every 10 steps.
Then `simclr-dist verdict`'s figures on its 2,000 test images, and the linear probe on 5,000 training and 5,000 test
images. The runs of the first half (a_…, 16 px, seed 0) are those on which the ranking figure was chosen; those of the
second half (b_…, 20 px, seed 7, another batch size, other settings) had no part in that. Half an hour of CPU time in
all. What is there already in --work is not computed again. Writes a table and a JSON file to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn

import simclr_dist
from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.config import DataConfig, ModelConfig
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import UserError
from simclr_dist.evaluation.features import Features, extract_features
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.evaluation.untrained import untrained_encoder
from simclr_dist.evaluation.verdict import compare
from simclr_dist.network.encoders import register
from simclr_dist.views.augment import normalize

BASE = {
    "data.image_size": 16,
    "data.num_threads": 1,
    "augment.crop_scale_min": 0.2,
    "model.width": 16,
    "model.head_hidden_dim": 128,
    "optim.base_lr": 0.004,
    "optim.warmup_epochs": 0.1,
    "train.global_batch_size": 128,
    "train.epochs": 1,
    "train.max_steps": 195,
    "evaluation.knn_every_epochs": None,
    "evaluation.online_probe": False,
    "checkpoint.every_min": None,
    "checkpoint.every_steps": 195,
    "monitor.health_every_steps": 10,
    "monitor.image_pairs": 0,
    "monitor.terminal": "quiet",
}
HELD_OUT = {
    "seed": 7,
    "data.image_size": 20,
    "train.global_batch_size": 96,
    "augment.crop_scale_min": 0.15,
    "train.max_steps": 150,
}
LONG = {"train.max_steps": None}  # the whole epoch, 390 steps
NO_NORM = {"model.encoder": "plain_conv", "model.head_batch_norm": "none"}
NO_AUGMENT = {"augment.preset": "none", "augment.crop_scale_min": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "a_base": LONG,
    "a_lr_1e-5": {"optim.base_lr": 1e-5, **LONG},
    "a_lr_1e-4": {"optim.base_lr": 1e-4, **LONG},
    "a_lr_1e-3": {"optim.base_lr": 1e-3, **LONG},
    "a_lr_0.3": {"optim.base_lr": 0.3, **LONG},
    "a_lr_3": {"optim.base_lr": 3.0, **LONG},
    "a_tau_0.01": {"loss.temperature": 0.01, **LONG},
    "a_tau_0.05": {"loss.temperature": 0.05, **LONG},
    "a_tau_0.5": {"loss.temperature": 0.5},
    "a_tau_5": {"loss.temperature": 5.0},
    "a_no_augment": NO_AUGMENT,
    "a_flips": {**NO_AUGMENT, "augment.flip_p": 0.5},
    "a_head_2": {"model.head_out_dim": 2},
    "a_width_4": {"model.width": 4},
    "a_60_steps": {"train.max_steps": 60},
    "a_sgd_100": {"optim.optimizer": "sgd", "optim.base_lr": 100.0, **LONG},
    "a_muon": {"optim.optimizer": "muon", "optim.base_lr": 0.05, "model.first_layer": "whitened"},
    "a_no_norm": NO_NORM,
    "a_no_norm_lr_0.3": {**NO_NORM, "optim.base_lr": 0.3},
    "b_base": {},
    "b_lr_3e-5": {"optim.base_lr": 3e-5},
    "b_tau_0.02": {"loss.temperature": 0.02},
    "b_nothing": NO_AUGMENT,
    "b_grey": {"augment.grayscale_p": 1.0},
    "b_width_8": {"model.width": 8},
    "b_20_steps": {"train.max_steps": 20},
    "b_lars_300": {"optim.optimizer": "lars", "optim.base_lr": 300.0},
    "b_muon_3": {"optim.optimizer": "muon", "optim.base_lr": 3.0},
    "b_no_norm": {**NO_NORM, "optim.base_lr": 0.001},
    "b_no_norm_sgd_10": {**NO_NORM, "optim.optimizer": "sgd", "optim.base_lr": 10.0},
    "b_no_norm_lr_3": {**NO_NORM, "optim.base_lr": 3.0, "train.max_steps": 100},
    "b_vit_lr_0.1": {"model.encoder": "small_vit", "optim.base_lr": 0.1},
    "a_crops_no_colour": {"augment.jitter_p": 0.0, "augment.grayscale_p": 0.0},
    "a_colour_no_crops": {"augment.crop_scale_min": 1.0},
    "b_tau_2": {"loss.temperature": 2.0},
    "b_blur_only": {**NO_AUGMENT, "augment.blur_p": 1.0},
    "b_crops_0.01": {"augment.crop_scale_min": 0.01},
    "b_vit": {"model.encoder": "small_vit", "optim.base_lr": 0.001},
}
IMAGES = 5000
FIGURES = ("neighbours_shared", "contrastive_top1", "alignment", "uniformity", "rankme", "lidar", "alpha_req")
LOWER_IS_BETTER = ("alignment", "uniformity")
ALARM = re.compile(r"step (\d+): the representation has collapsed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="CIFAR-10 as a .beton file")
    parser.add_argument("test", type=Path, help="its test images")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    register("plain_conv", plain_conv)
    register("small_vit", small_vit)
    report = circumstances({"train": args.train.name, "test": args.test.name})
    rows = []
    for name, changes in SETTINGS.items():
        found = args.work / "results" / f"{name}.json"
        if not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            found.write_text(json.dumps(run(name, changes, args)) + "\n")
        rows.append(json.loads(found.read_text()))
        print(f"{name}: {json.dumps(rows[-1])}", flush=True)
    agreement = {half: agreements(part) for half, part in halves(rows).items()}
    lines = render(rows, agreement)
    print("\n".join(lines))
    write("verdict", args.out, {**report, "agreement": agreement, "runs": rows}, lines)


def run(name: str, changes: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Trains, looks at the result without and with labels."""
    settings = {**BASE, **(HELD_OUT if name.startswith("b_") else {}), **changes}
    own = {
        "name": name,
        "runs_dir": str(args.work / "runs"),
        "data.train": str(args.train),
        "data.test": str(args.test),
    }
    said, alarms = io.StringIO(), args.work / "runs" / name / "warnings.txt"
    failure = None
    with contextlib.redirect_stderr(said):
        try:
            simclr_dist.pretrain("configs/cifar10_demo.yaml", **settings, **own)
        except UserError as error:
            failure = str(error)
    if said.getvalue():
        alarms.write_text(said.getvalue())
    alarm = ALARM.search(alarms.read_text()) if alarms.exists() else None
    comparison = compare([str(alarms.parent)], device=torch.device("cpu"), say=lambda _: None)
    (verdict,) = comparison.verdicts
    assert verdict.figures is not None
    figures = asdict(verdict.figures)
    model, checkpoint = load_pretrained(str(alarms.parent))
    config, size = checkpoint.config, checkpoint.config.data.image_size
    return {
        "name": name,
        "settings": dict(changes),
        "step": checkpoint.step,
        "linear": linear_top1(model.encoder, size, args.train, args.test),
        "linear_untrained": _untrained_top1(config.model.model_dump_json(), size, config.seed, args.train, args.test),
        "collapsed": verdict.state == "collapsed",
        "alarm_step": int(alarm[1]) if alarm else None,
        "failure": failure,
        **{figure: figures[figure] if np.isfinite(figures[figure]) else None for figure in FIGURES},
    }


@cache
def _untrained_top1(model: str, image_size: int, seed: int, train: Path, test: Path) -> float:
    """model: its section as JSON. Runs of the same network share it."""
    section = ModelConfig.model_validate_json(model)
    data = DataConfig(train=str(train), image_size=image_size, num_threads=1)
    return linear_top1(untrained_encoder(section, data, seed), image_size, train, test)


def linear_top1(encoder: nn.Module, image_size: int, train: Path, test: Path) -> float:
    def features(source: Path) -> Features:
        total = describe(str(source)).num_samples
        ids = np.arange(IMAGES, dtype=np.int64) * total // IMAGES
        batches = load_images(str(source), image_size, batch_size=500, ids=ids, num_threads=1)
        return extract_features(encoder, batches, device="cpu", normalize=normalize)

    return linear_probe(features(train), features(test), num_classes=10).top1


# ---------------------------------------------------------------------------------------------------------------------
# Encoders without BatchNorm, which can collapse


def plain_conv(config: ModelConfig) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = []
    for before, after in ((3, 1), (1, 2), (2, 4)):
        channels = before if before == 3 else before * config.width
        layers += [nn.Conv2d(channels, after * config.width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4 * config.width


class SmallViT(nn.Module):
    def __init__(self, side: int, width: int = 64, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layers(self.patches(images).flatten(2).mT + self.place).mean(1))


def small_vit(config: ModelConfig) -> tuple[nn.Module, int]:
    assert config.image_size is not None
    return SmallViT(config.image_size), 64


# ---------------------------------------------------------------------------------------------------------------------
# The table


def halves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    chosen, held = ([row for row in rows if row["name"].startswith(half)] for half in ("a_", "b_"))
    return {"chosen on": chosen, "held out": held, "all": [*chosen, *held]}


def agreements(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman's correlation of each figure with linear accuracy, signed so that 1 is best."""
    return {
        name: (-1 if name in LOWER_IS_BETTER else 1)
        * float(spearmanr([row["linear"] for row in rows], values).statistic)
        for name in FIGURES
        if np.isfinite(values := [row[name] if row[name] is not None else -np.inf for row in rows]).any()
    }


def render(rows: Sequence[Mapping[str, Any]], agreement: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = " | ".join(name.replace("_", " ") for name in FIGURES)
    lines = [
        "Spearman's correlation with linear accuracy:",
        "",
        f"| runs | {names} |",
        "|---|" + "---:|" * len(FIGURES),
        *(
            f"| {half} | " + " | ".join(f"{found.get(name, np.nan):.2f}" for name in FIGURES) + " |"
            for half, found in agreement.items()
        ),
        "",
        f"| run | steps | linear | untrained | {names} | collapsed | alarm at step |",
        "|---|---:|---:|---:|" + "---:|" * len(FIGURES) + "---|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["linear"]):
        figures = " | ".join(f"{row[name]:.3g}" if row[name] is not None else "-" for name in FIGURES)
        lines.append(
            f"| {row['name']} | {row['step']} | {row['linear']:.1%} | {row['linear_untrained']:.1%} | {figures} | "
            f"{'yes' if row['collapsed'] else 'no'} | {row['alarm_step'] or '-'} |"
        )
    return lines


if __name__ == "__main__":
    main()
