"""Does it matter on how many processes a training runs? Bytes, loss curves and accuracy; and those of others beside.

    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/train.beton --split train
    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/test.beton --split test
    python -m benchmarks.parity /tmp/train.beton /tmp/test.beton --work /tmp/parity

Every row trains for the same steps on the same global batches, views and initial weights, once for each seed, and is
compared with the first row of its part, on one process. Ours are whole trainings; what others do is a plain loop with
DistributedDataParallel, in which each process has BatchNorm and the loss of its own images (plain DDP), or the loss of
lightly, which gathers z of all. kNN is ours for all rows. All processes share the CPU, one thread each.

What is finished lies in --work, and the same command goes on from there. Needs `pip install lightly
lightning-utilities` besides simclr_dist; without it the rows of lightly are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import simclr_dist
from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config, ModelConfig
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.evaluation.features import Features, extract_features
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.network import encoders
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.schedule import build_schedule, set_learning_rate
from simclr_dist.parallel import distributed
from simclr_dist.parallel.accelerator import join_process_group
from simclr_dist.views.augment import Augment, normalize

SIZE, BATCH, EARLY, K = 16, 64, 24, 20
CLASSES, BANK = 10, 5000
SHARDS = {"train.virtual_shards": 4, "model.batch_norm": "per_shard"}
VIT = {"model.encoder": "parity_vit", "model.head_batch_norm": "none"}
RESNET_PART, VIT_PART = "ResNet with BatchNorm", "ViT with dropout 0.1, no BatchNorm"


@dataclass(frozen=True)
class Row:
    part: str
    name: str
    worlds: tuple[int, ...] = (1,)
    """How many processes, one after the other, in equal numbers of steps."""
    settings: dict[str, Any] = field(default_factory=dict)
    side: str = "ours"
    start: int = 1

    @property
    def key(self) -> str:
        return "_".join("".join(c if c.isalnum() else "-" for c in x) for x in (self.part[:3], self.name))


ROWS = [
    Row(RESNET_PART, "W = 1"),
    Row(RESNET_PART, "W = 1, the same command again", start=2),
    Row(RESNET_PART, "W = 2", (2,)),
    Row(RESNET_PART, "W = 4", (4,)),
    Row(RESNET_PART, "W = 1, then 2, then 4", (1, 2, 4)),
    Row(RESNET_PART, "4 virtual shards, W = 1", (1,), SHARDS),
    Row(RESNET_PART, "4 virtual shards, W = 2", (2,), SHARDS),
    Row(RESNET_PART, "4 virtual shards, W = 4", (4,), SHARDS),
    Row(RESNET_PART, "4 virtual shards, W = 1, then 2, then 4", (1, 2, 4), SHARDS),
    Row(RESNET_PART, "plain DDP, W = 1", side="plain"),
    Row(RESNET_PART, "plain DDP, W = 2", (2,), side="plain"),
    Row(RESNET_PART, "plain DDP, W = 4", (4,), side="plain"),
    Row(RESNET_PART, "lightly, W = 1", side="lightly"),
    Row(RESNET_PART, "lightly, W = 2", (2,), side="lightly"),
    Row(RESNET_PART, "lightly, W = 4", (4,), side="lightly"),
    Row(VIT_PART, "W = 1", (1,), VIT),
    Row(VIT_PART, "W = 2", (2,), VIT),
    Row(VIT_PART, "W = 4", (4,), VIT),
    Row(VIT_PART, "W = 2, in micro-batches of 8", (2,), {**VIT, "train.micro_batch_size": 8}),
    Row(VIT_PART, "W = 1, then 2, then 4", (1, 2, 4), VIT),
    Row(VIT_PART, "4 virtual shards, W = 1", (1,), {**VIT, **SHARDS}),
    Row(VIT_PART, "4 virtual shards, W = 4", (4,), {**VIT, **SHARDS}),
]


def compared_with(row: Row) -> Row:
    """The first row of the same part, side and network: what it should not differ from."""
    kind = (row.part, row.side, "train.virtual_shards" in row.settings)
    return next(x for x in ROWS if (x.part, x.side, "train.virtual_shards" in x.settings) == kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="a .beton file")
    parser.add_argument("test", help="a .beton file")
    parser.add_argument("--work", type=Path, required=True, help="where runs and results of each lie")
    parser.add_argument("--steps", type=int, default=201, help="of a run; a multiple of 3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs is not None:
        work(args)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    report = circumstances({name: str(value) for name, value in vars(args).items() if name not in ("train", "test")})
    rows = [row for row in ROWS if row.side != "lightly" or importlib.util.find_spec("lightly")]
    for seed, (start, world_size) in itertools.product(range(args.seeds), ((1, 1), (2, 1), (1, 2), (1, 4))):
        jobs = [
            (row.key, seed, row.worlds.index(world_size))
            for row in rows
            if world_size in row.worlds and row.start == start and not result_file(args.work, row, seed).exists()
        ]
        if jobs:
            run_processes(world_size, [*sys.argv[1:], "--jobs", json.dumps(jobs)])
    found = {
        row.key: [json.loads(result_file(args.work, row, seed).read_text()) for seed in range(args.seeds)]
        for row in rows
    }
    table = render(rows, found)
    print("\n".join(table))
    runs = [
        {"part": row.part, "row": row.name, "seed": seed, **run}
        for row in rows
        for seed, run in enumerate(found[row.key])
    ]
    write("parity", args.out, {**report, "table": table, "runs": runs}, table)


def result_file(work: Path, row: Row, seed: int) -> Path:
    return work / "results" / f"{row.key}-{seed}.json"


def run_processes(world_size: int, arguments: list[str]) -> None:
    """This program on `world_size` processes. Raises CalledProcessError."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.parity", *arguments]
    processes = []
    for rank in range(world_size):
        env = dict(shared)
        if world_size > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        processes.append(subprocess.Popen(command, env=env))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise subprocess.CalledProcessError(next(filter(None, codes)), command)


# ---------------------------------------------------------------------------------------------------------------------
# In each process


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    encoders.register("parity_vit", parity_vit)
    if distributed.world().size > 1:
        join_process_group()
    for key, seed, at in args.jobs:
        row = next(row for row in ROWS if row.key == key)
        began = cpu_s()
        result = (train_ours if row.side == "ours" else train_others)(row, seed, at, args)
        seconds = torch.tensor([cpu_s() - began])
        distributed.all_reduce_sum_(seconds)
        if distributed.rank() == 0:
            path = result_file(args.work, row, seed)
            parts = path.with_suffix(".cpu_s")
            path.parent.mkdir(parents=True, exist_ok=True)
            spent = json.loads(parts.read_text()) if parts.exists() else {}
            spent[str(row.worlds[at])] = float(seconds)
            parts.write_text(json.dumps(spent))
            if result is not None:
                encoder, facts = result
                facts |= {"cpu_s": sum(spent.values()), "knn": accuracy(encoder, args)}
                path.write_text(json.dumps(facts))
                print(row.part, row.name, seed, {x: facts[x] for x in ("cpu_s", "knn")}, flush=True)
        distributed.barrier()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def parity_vit(config: ModelConfig) -> tuple[nn.Module, int]:
    vit = VisionTransformer(SIZE, 4, 2, 2, 48, 96, dropout=0.1)
    vit.heads = nn.Identity()  # type: ignore[assignment]
    return vit, 48


def settings(row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    base = {
        "name": f"{row.key}-{seed}",
        "runs_dir": str(args.work / "runs"),
        "seed": seed,
        "data": {"train": args.train, "image_size": SIZE, "num_threads": 1},
        "augment": {"preset": "simclr_cifar", "crop_scale_min": 0.2},
        "model": {"encoder": "resnet_small", "width": 16, "head_hidden_dim": 128, "head_out_dim": 64},
        "loss": {"temperature": 0.2},
        "optim": {"optimizer": "adamw", "base_lr": 2e-3, "lr_scaling": "none", "warmup_epochs": 0.02},
        "train": {"global_batch_size": BATCH, "epochs": 1, "precision": "fp32"},
        "checkpoint": {"every_min": None},
        "monitor": {"log_every_steps": 1, "image_pairs": 0, "health_every_steps": None, "terminal": "quiet"},
    }
    base["optim"]["schedule"] = "constant"  # type: ignore[index]
    for key, value in row.settings.items():
        section, name = key.split(".")
        base[section][name] = value  # type: ignore[index]
    return base


def train_ours(row: Row, seed: int, at: int, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]] | None:
    """Up to the end of the part `at`; the encoder and what is known of the run, after the last part."""
    steps = args.steps * (at + 1) // len(row.worlds)
    run = simclr_dist.pretrain(settings(row, seed, args), **{"train.max_steps": steps})
    if run.state != "finished":
        raise SystemExit(f"{run.path}: {run.state}; the same command goes on from there")
    if at + 1 < len(row.worlds):
        return None
    lines = map(json.loads, (run.path / "log.jsonl").read_text().splitlines())
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    newest = max((run.path / "checkpoints").glob("step_*"))
    digest = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors"):
        digest.update((newest / name).read_bytes())
    return run.encoder(), {"losses": [losses[s] for s in range(1, args.steps + 1)], "sha256": digest.hexdigest()}


def train_others(row: Row, seed: int, at: int, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The usual loop: DDP around the network, its gradients averaged, the loss of each process."""
    config = Config.model_validate(settings(row, seed, args))
    world = distributed.world()
    torch.manual_seed(seed)
    network = build_model(config.model)
    model = nn.parallel.DistributedDataParallel(network) if world.size > 1 else network
    optimizer = build_optimizer(network, config.optim)
    schedule = build_schedule(config.optim, BATCH, 50_000 // BATCH * BATCH, 1)
    augment = Augment(config.augment, seed, SIZE)
    loss_of = plain_loss if row.side == "plain" else lightlys_loss()
    losses = []
    with build_loader(
        config.data, config.augment, seed=seed, global_batch_size=BATCH, world=world, device="cpu"
    ) as loader:
        for step, batch in enumerate(loader.batches(0)):
            if step == args.steps:
                break
            set_learning_rate(optimizer, schedule(step * BATCH))
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*model(augment(batch).flatten(0, 1))[1].chunk(2))
            loss.backward()
            optimizer.step()
            losses.append(float(distributed.all_reduce_sum_(loss.detach())) / world.size)
    digest = hashlib.sha256()
    states = [*network.state_dict().values(), *(x for s in optimizer.state.values() for x in s.values())]
    for x in states:
        digest.update(x.numpy().tobytes())
    return network.encoder, {"losses": losses, "sha256": digest.hexdigest()}


def plain_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's loss as it is mostly written: the images of this process are all there is."""
    z = F.normalize(torch.cat([z0, z1]))
    similarity = z @ z.T / 0.2
    similarity.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z0)))


def lightlys_loss() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    loss: Callable[[Tensor, Tensor], Tensor] = NTXentLoss(
        temperature=0.2, gather_distributed=distributed.world_size() > 1
    )
    return loss


def accuracy(encoder: nn.Module, args: argparse.Namespace) -> float:
    """kNN top-1 of all test images among BANK training images; this process alone."""
    with distributed.alone():
        train, test = (
            features(encoder, args.train, range(0, 50_000, 50_000 // BANK)),
            features(encoder, args.test, range(10_000)),
        )
        return knn_top1(train, test, k=K, temperature=0.1, num_classes=CLASSES).top1


def features(encoder: nn.Module, source: str, ids: Iterable[int]) -> Features:
    chosen = torch.tensor(list(ids)).numpy()
    images = load_images(source, SIZE, batch_size=500, ids=chosen, num_threads=1)
    return extract_features(encoder.eval(), images, device="cpu", normalize=normalize)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def render(rows: list[Row], found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """found: the runs of each row, seed by seed."""
    lines = [
        f"| | bytes | loss, first {EARLY} steps | loss, all steps | kNN, % | against its first row, points | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part in dict.fromkeys(row.part for row in rows):
        lines.append(f"| **{part}** | | | | | | |")
        for row in rows:
            if row.part == part:
                lines.append(f"| {row.name} | {' | '.join(cells(row, found))} |")
    if not any(row.side == "lightly" for row in rows):
        lines += ["", "lightly is not installed: its rows are left out."]
    return lines


def cells(row: Row, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    own, base = found[row.key], found[compared_with(row).key]
    knn = [100 * run["knn"] for run in own]
    seconds = f"{statistics.mean(run['cpu_s'] for run in own):.0f}"
    if row == compared_with(row):
        return ["", "", "", mean_and_deviation(knn), "", seconds]
    pairs = list(zip(own, base, strict=True))
    equal = sum(a["sha256"] == b["sha256"] for a, b in pairs)
    curves = [[abs(x - y) / y for x, y in zip(a["losses"], b["losses"], strict=True)] for a, b in pairs]
    return [
        "equal" if equal == len(own) else f"equal for {equal} of {len(own)} seeds" if equal else "differ",
        small(max(max(curve[:EARLY]) for curve in curves)),
        small(max(max(curve) for curve in curves)),
        mean_and_deviation(knn),
        mean_and_deviation([100 * (a["knn"] - b["knn"]) for a, b in pairs], sign="+"),
        seconds,
    ]


def small(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}" if x < 1e-3 else f"{x:.1%}"


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
