"""What the trainer costs: its whole loop compared with a bare DDP loop that does the same work and nothing else.

    python -m benchmarks.overhead                         1 and 2 processes, a small encoder: some minutes
    python -m benchmarks.overhead --ranks 2 --steps 400

Both train copies of one model on the same batches with the same views, loss and optimiser, and take turns step by
step, so that a busy machine slows both alike. The trainer's time is that of everything `Trainer.fit` does between two
batches: agreeing on stop requests, the policy for NaN, logging, health checks, progress, signs of life. Loading is in
neither.
The ratio is that of sums over windows of steps, a whole number of log intervals each: median and mean over windows.
The agreement is also timed by itself, without a step to hide behind.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.parallel import distributed
from simclr_dist.run.stop_requests import Requests
from simclr_dist.training.trainer import Trainer
from simclr_dist.views.augment import Augment

LOG_EVERY = 10  # the shipped default
WARM_UP = 10


class BareLoop:
    """A loop written by hand: model, DDP, loss, optimiser."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        model = convert_to_global_batch_norm(build_model(config.model).to(device))
        self.optimizer = build_optimizer(model, config.optim)
        self.model = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if distributed.is_initialized()
            else model
        )
        self.augment = Augment(config.augment, config.seed, config.data.image_size)
        self.nt_xent = NTXentLoss(config.loss.temperature)

    def step(self, batch: Batch) -> Tensor:
        views = self.augment(batch)
        self.optimizer.zero_grad(set_to_none=True)
        _, z = self.model(views.flatten(0, 1))
        loss: Tensor = self.nt_xent(z, batch.sample_ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class TakingTurns:
    """Replaces the loader: repeats a few batches, and runs a step of the bare loop before or after each."""

    def __init__(self, trainer: Trainer, bare: BareLoop) -> None:
        self.trainer_s: list[float] = []
        self.bare_s: list[float] = []
        self._bare = bare
        batches = trainer.parts.loader.batches(0)
        self._batches = list(itertools.islice(batches, 4))
        del batches  # stops the loader's decoding

    def batches(self, step: int) -> Iterator[Batch]:
        for i, batch in enumerate(itertools.cycle(self._batches)):
            if i % 2:
                self._time_bare_step(batch)
            distributed.barrier()
            start = time.perf_counter()
            yield batch  # Trainer.fit does its step before it asks for the next batch
            distributed.barrier()
            self.trainer_s.append(time.perf_counter() - start)
            if not i % 2:
                self._time_bare_step(batch)

    def _time_bare_step(self, batch: Batch) -> None:
        distributed.barrier()
        start = time.perf_counter()
        self._bare.step(batch)
        distributed.barrier()
        self.bare_s.append(time.perf_counter() - start)


def agreement_ms(config: Config, device: torch.device, rounds: int = 500) -> float:
    """Median seconds to announce and agree on stop requests, with nothing in between."""
    times = []
    requests = Requests(config.run_dir, device)
    for _ in range(rounds):
        distributed.barrier()
        start = time.perf_counter()
        requests.announce()
        requests.agreed()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run_rank(rank: int, world_size: int, settings: dict[str, Any], port: int, results: Any) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world_size > 1:
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    torch.set_num_threads(1)
    config = Config.model_validate(settings)
    trainer = Trainer(config)
    turns = TakingTurns(trainer, BareLoop(config, trainer.parts.device))
    trainer.parts.loader.batches = turns.batches  # type: ignore[method-assign, assignment]
    trainer.fit()
    alone_ms = agreement_ms(config, trainer.parts.device)
    distributed.barrier()
    if rank == 0:
        results.put((turns.trainer_s[WARM_UP:], turns.bare_s[WARM_UP:], alone_ms))
    distributed.shut_down()


def measure(world_size: int, args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as runs:
        settings = {
            "name": "overhead",
            "runs_dir": runs,
            "data": {"train": "synthetic", "image_size": args.image_size},
            "augment": {"preset": "simclr_cifar"},
            "model": {"encoder": "resnet_small", "width": args.width, "head_hidden_dim": 128, "head_out_dim": 64},
            "optim": {"optimizer": "lars", "base_lr": 0.3},
            "train": {
                "global_batch_size": args.batch_size * world_size,
                "epochs": 10_000,
                "max_steps": args.steps + WARM_UP,
                "precision": "fp32",
            },
            "evaluation": {"knn_every_epochs": None},
            "checkpoint": {"every_epochs": None},
            "monitor": {"log_every_steps": LOG_EVERY, "image_pairs": 0, "terminal": "plain"},
        }
        port = free_port()
        ranks = [
            context.Process(target=run_rank, args=(rank, world_size, settings, port, results))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        trainer_s, bare_s, alone_ms = results.get(timeout=1800)
        for process in ranks:
            process.join()
    # The last step also saves the final checkpoint, once per run, so it is left out.
    count = min(len(trainer_s), len(bare_s)) // args.window * args.window
    windows = [slice(i, i + args.window) for i in range(0, count, args.window)]
    ratios = [sum(trainer_s[w]) / sum(bare_s[w]) for w in windows]
    step_ms = 1e3 * statistics.median(trainer_s)
    return {
        "trainer_step_ms": step_ms,
        "bare_step_ms": 1e3 * statistics.median(bare_s),
        "ratio_median_of_windows": statistics.median(ratios),
        "ratio_of_all": sum(trainer_s[:count]) / sum(bare_s[:count]),
        "windows": len(windows),
        "agreement_alone_ms": alone_ms,
        "agreement_alone_share": alone_ms / step_ms,
    }


def free_port() -> int:

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=2 * LOG_EVERY, help="steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    report: dict[str, Any] = circumstances(vars(args))
    report["found"] = found = {str(world_size): measure(world_size, args) for world_size in args.ranks}
    lines = ["processes   bare step   trainer's   ratio: median of windows, of all   agreement alone"]
    lines += [
        f"{world_size:>9}   {row['bare_step_ms']:6.1f} ms   {row['trainer_step_ms']:6.1f} ms   "
        f"{row['ratio_median_of_windows']:22.4f}, {row['ratio_of_all']:.4f}   "
        f"{row['agreement_alone_ms']:.3f} ms ({row['agreement_alone_share']:.2%} of a step)"
        for world_size, row in found.items()
    ]
    print("\n".join(lines))
    write("overhead", args.out, report, lines)


if __name__ == "__main__":
    main()
