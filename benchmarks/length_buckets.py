"""What do batches of like lengths save? Padding, the balance of ranks, and tokens a second of a training step.

    python -m benchmarks.length_buckets data/proteins_train.tokens data/glosses_train.tokens

The folders are those of `make demo-proteins` and `make demo-text`. Padding: tokens that the slowest rank computes,
times the number of ranks, over the real tokens of the global batch; the mean of some batches of an epoch. Speed: real
tokens of forward and backward passes of transformer_small a second of CPU time, with and without windows in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import AugmentConfig, DataConfig, ModelConfig
from simclr_dist.kinds import kind_of
from simclr_dist.kinds.tokens import Tokens
from simclr_dist.network.simclr import build_model
from simclr_dist.parallel.distributed import World

WINDOWS = 0, 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="TOKENS")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--timed", type=int, default=4, help="steps that are timed, of each window, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    when = circumstances(vars(options) | {"folders": [folder.name for folder in options.folders]})
    rows = [row for folder in options.folders for row in measure(folder, options)]
    lines = [
        f"Global batch {options.global_batch}, {options.ranks} ranks, at most {options.max_tokens} tokens; one core of "
        f"{when['device']}, commit {when['commit']}.",
        "",
        "| folder | window | padded / real | slowest / fastest rank | tokens a CPU second |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {window} | {pad:.2f} | {ratio:.2f} | {speed:,.0f} |"
            for name, window, pad, ratio, speed in rows
        ),
    ]
    print("\n".join(lines))
    write("length_buckets", options.out, {**when, "rows": rows}, lines)


def measure(folder: Path, options: argparse.Namespace) -> list[tuple[str, int, float, float, float]]:
    """(folder, window, padding, slowest over fastest rank, real tokens a second of CPU time)."""
    speeds: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for _ in range(options.rounds):
        for window in WINDOWS:
            speeds[window].append(speed(kind(folder, window, options), options))
    return [
        (folder.stem, window, *padding(kind(folder, window, options), options), max(speeds[window]))
        for window in WINDOWS
    ]


def kind(folder: Path, window: int, options: argparse.Namespace) -> Tokens:
    from simclr_dist.data.tokens.folder import open_tokens

    what = {"text": "text", "proteins": "proteins"}[open_tokens(folder).vocabulary.what]
    tokens = {"max_tokens": options.max_tokens, "length_window": window}
    found = kind_of(DataConfig.model_validate({"kind": what, "train": str(folder), "tokens": tokens}))
    assert isinstance(found, Tokens)
    return found


def padding(data: Tokens, options: argparse.Namespace) -> tuple[float, float]:
    """By the batches that each rank is given."""
    worlds = [World(rank=rank, size=options.ranks) for rank in range(options.ranks)]
    loaders = [
        data.loader(AugmentConfig(), seed=0, global_batch_size=options.global_batch, world=world, device="cpu").batches(
            0
        )
        for world in worlds
    ]
    shares, ratios = [], []
    for _ in range(min(options.batches, len(data.train) // options.global_batch)):
        views = [next(loader).views for loader in loaders]
        computed = [view.numel() for view in views]
        shares.append(options.ranks * max(computed) / sum(int((view != 0).sum()) for view in views))
        ratios.append(max(computed) / min(computed))
    return float(np.mean(shares)), float(np.mean(ratios))


def speed(data: Tokens, options: argparse.Namespace) -> float:
    torch.manual_seed(0)
    size = data.train.vocabulary.size
    model = build_model(ModelConfig(encoder="transformer_small", vocabulary=size, width=64, depth=2))
    world = World(rank=0, size=options.ranks)
    loader = data.loader(AugmentConfig(), seed=0, global_batch_size=options.global_batch, world=world, device="cpu")
    batches = loader.batches(0)
    model(next(batches).views.flatten(0, 1))[1].sum().backward()
    real, begin = 0, time.process_time()
    for _ in range(options.timed):
        views = next(batches).views
        real += int((views != 0).sum())
        model(views.flatten(0, 1))[1].square().mean().backward()
    return real / (time.process_time() - begin)


if __name__ == "__main__":
    main()
