"""What benchmarks/scaling.py measures here: a rank's parts, gloo's collectives, three losses, whole steps."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loss_designs import FULL, GATHERED, OURS
from benchmarks.traffic import CountTraffic
from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.lars import build_optimizer
from simclr_dist.parallel import distributed
from simclr_dist.plan.memory import LiveBytes
from simclr_dist.run.stop_requests import Requests
from simclr_dist.views.augment import Augment

K = 128
DESIGNS = {design.name: design for design in (OURS, GATHERED, FULL)}
CPU = torch.device("cpu")


def on_ranks(W: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` on W ranks of a gloo group (W = 1: without one); the answer of each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, W, f"{folder}/store", results, work, arguments), daemon=True)
            for rank in range(W)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        while len(answers) < W:
            if results.empty() and any(process.exitcode for process in processes):
                raise SystemExit("a rank failed: see above")
            if results.empty():
                time.sleep(0.02)
            else:
                rank, answer = results.get()
                answers[rank] = answer
        for process in processes:
            process.join()
    return [answers[rank] for rank in range(W)]


def _rank(rank: int, W: int, store: str, results: Any, work: Callable[..., Any], arguments: tuple) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if W > 1:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(store, W),
            rank=rank,
            world_size=W,
            timeout=timedelta(minutes=5),
        )
    results.put((rank, work(*arguments)))
    if W > 1:
        distributed.shut_down()


def times(work: Callable[[], Any], repetitions: int, clock: Callable[[], float]) -> list[float]:
    """Of every repetition but the first, which warms up; all ranks start each together."""
    found = []
    for _ in range(repetitions + 1):
        distributed.barrier()
        start = clock()
        work()
        found.append(clock() - start)
    return found[1:]


def cpu_seconds(work: Callable[[], Any], repetitions: int) -> float:
    """Median of this process's CPU time: other work on the machine counts little."""
    return statistics.median(times(work, repetitions, time.process_time))


# ---------------------------------------------------------------------------------------------------------------------


def random_batch(config: Config, B: int) -> Batch:
    S = config.data.image_size
    ids = torch.arange(B) + distributed.rank() * B
    return Batch(torch.randint(0, 256, (2, B, S, S, 3), dtype=torch.uint8), ids, ids, 0)


def parts(config: Config, images: list[int], repetitions: int) -> dict[str, dict[int, float]]:
    """CPU seconds by part and images of a device: augmentation, and forward and backward of encoder and of head.

    On all ranks at once: cores share caches and memory, and global BatchNorm costs more than one process's.
    """
    augment = Augment(config.augment, config.seed, config.data.image_size)
    model: Any = convert_to_global_batch_norm(build_model(config.model), CPU)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, dict[int, float]] = {"augment": {}, "encoder": {}, "head": {}}
    for B in images:
        batch = random_batch(config, B)
        views = augment(batch).flatten(0, 1).clone()
        h = torch.randn(2 * B, model.feature_dim, requires_grad=True)
        found["augment"][B] = cpu_seconds(lambda batch=batch: augment(batch), repetitions)
        found["encoder"][B] = cpu_seconds(lambda x=views: model.encoder(x).square().sum().backward(), repetitions)
        found["head"][B] = cpu_seconds(lambda x=h: model.projection_head(x).square().sum().backward(), repetitions)
    return found


def collective_seconds(sizes: list[int], repetitions: int) -> list[tuple[str, int, float]]:
    """(operation, bytes of a rank, best wall seconds) on this rank."""
    found = []
    for num_bytes in sizes:
        x = torch.zeros(num_bytes // 4)
        work: dict[str, Callable[[], Any]] = {
            "all_gather": lambda x=x: distributed.all_gather(x),
            "all_reduce": lambda x=x: distributed.all_reduce_sum_(x),
        }
        for operation, run in work.items():
            found.append((operation, num_bytes, min(times(run, repetitions, time.perf_counter))))
    return found


def loss_on_ranks(name: str, rows: list[int], repetitions: int) -> dict[int, tuple[float, float]]:
    """By rows of a rank: CPU seconds of forward and backward, and bytes that this rank sends."""
    found = {}
    for n in rows:
        z = torch.randn(n, K, requires_grad=True)

        def run(z: Tensor = z) -> None:
            z.grad = None
            DESIGNS[name].loss(z).backward()

        with CountTraffic(distributed.world_size()) as traffic:
            run()
        found[n] = cpu_seconds(run, repetitions), traffic.sent
    return found


def copies_of_logits(name: str, n: int) -> float:
    """Matrices of similarities that an autograd design holds at its fullest, in one process."""
    z = torch.randn(n, K, requires_grad=True)
    with LiveBytes() as live:
        DESIGNS[name].loss(z).backward()
    return live.peak / (4 * n * n)


def whole_step(config: Config, repetitions: int) -> tuple[float, float, float]:
    """A training step made of the trainer's parts: best wall seconds, CPU seconds, and the bytes this rank sends."""
    W = distributed.world_size()
    augment = Augment(config.augment, config.seed, config.data.image_size)
    plain = convert_to_global_batch_norm(build_model(config.model), CPU)
    if config.train.channels_last:
        plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(plain, config.optim)
    model = DistributedDataParallel(plain, broadcast_buffers=False, gradient_as_bucket_view=True) if W > 1 else plain
    nt_xent, batch = NTXentLoss(config.loss.temperature), random_batch(config, config.train.global_batch_size // W)
    requests = Requests(Path("nowhere"), CPU)

    def run() -> None:
        requests.announce()
        views = augment(batch)
        optimizer.zero_grad(set_to_none=True)
        nt_xent(model(views.flatten(0, 1))[1], batch.sample_ids).backward()
        optimizer.step()
        requests.agreed()

    run()
    run()  # the second says how DDP has ordered its buckets, once
    with CountTraffic(W) as traffic:
        run()
    return min(times(run, repetitions, time.perf_counter)), cpu_seconds(run, repetitions), traffic.sent
