"""Time and memory of the loss, compared with its lower bound and with other libraries.

    python -m benchmarks.loss                            one process and 2 ranks, small sizes: some minutes
    python -m benchmarks.loss --rows 4096 8192 16384     as in docs/loss.md
    python -m benchmarks.loss --device cuda --dtype bfloat16 --rows 8192 65536 131072
    python -m benchmarks.loss --rows --ranks --micro-batches 1 2 4 8

Contenders take turns, A B C A B C, so that a noisy machine slows all alike; times are medians, forward and backward
together, as ratios to ours. On a GPU a time is a tenth of a window of ten steps between
two events, which the host queues without waiting. Every row of ours names the code that computed it. Memory is the peak
above the inputs, on a CPU in a process of its own. The floors are the bare products of one N x N x K problem in our
tiles, in the dtype of --dtype: three of them and two exp2 for any loss that computes all similarities (forward, and
again with the gradient), two and one for one that uses their symmetry. Peers are not dependencies:
`pip install lightly pytorch-metric-learning`; those that are absent are named. The result is a table and
benchmarks/results/loss_<date>.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.loss import NTXentLoss, implementations
from simclr_dist.loss.enumeration import Within, rectangle
from simclr_dist.loss.tiled import Tiles
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.parallel import distributed

K, TEMPERATURE = 128, 0.1
RESULTS = Path(__file__).parent / "results"
Loss = Callable[[Tensor], Any]  # of z [N, K] with a gradient


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each builds a function that takes z and runs forward and backward


class Ours:
    """Forward and backward, and what computed them."""

    def __init__(self, implementation: str, row_dtype: torch.dtype = torch.float32) -> None:
        self.loss = NTXentLoss(TEMPERATURE, implementation, row_dtype=row_dtype)  # type: ignore[arg-type]

    def __call__(self, z: Tensor) -> None:
        self.loss(z).backward()


def plain_full_logits(z: Tensor) -> None:
    """The simplest form: N x N logits, a mask, cross-entropy."""
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2)).backward()


def half_problem(z: Tensor) -> None:
    """open_clip's loss: view 0 against view 1 only, so a quarter of the similarities: a smaller task."""
    a, b = F.normalize(z, dim=1).chunk(2)
    logits = a @ b.T / TEMPERATURE
    labels = torch.arange(len(a), device=z.device)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()


def lightly(gather: bool) -> Loss:
    loss = importlib.import_module("lightly.loss").NTXentLoss(TEMPERATURE, gather_distributed=gather)
    return lambda z: loss(*z.chunk(2)).backward()


def metric_learning_sup_con() -> Loss:
    loss = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(temperature=TEMPERATURE)
    return lambda z: loss(z, torch.arange(len(z) // 2, device=z.device).repeat(2)).backward()


def floor(symmetric: bool) -> Loss:
    """The bare products and exp2 in our tiles: all of them, or those on and above the diagonal, twice."""

    def run(z: Tensor) -> None:
        z = F.normalize(z.detach(), dim=1)
        size = min(len(z), 512 if z.device.type == "cpu" else 4096)
        gradient, buffer = torch.zeros_like(z), z.new_empty(size * size)
        whole = slice(0, len(z))
        tiles = list(Within(0, 1, len(z), size).own() if symmetric else rectangle(whole, whole, size))
        for with_gradient in (False, True):
            for i, j in tiles:
                rows, columns = z[i], z[j]
                e = torch.mm(rows, columns.T, out=buffer[: len(rows) * len(columns)].view(len(rows), -1)).exp2_()
                if with_gradient:
                    gradient[i].addmm_(e, columns)
                    if symmetric and i != j:
                        gradient[j].addmm_(e.T, rows)

    return run


# name -> (how to build it, the largest number of rows: with more it needs over 16 GiB)
ONE_PROCESS: dict[str, tuple[Callable[[], Loss], int]] = {
    "ours": (lambda: Ours("auto"), 1 << 20),
    "ours, float16 rows": (lambda: Ours("auto", torch.float16), 1 << 20),
    "ours, bfloat16 rows": (lambda: Ours("auto", torch.bfloat16), 1 << 20),
    "ours, tiled": (lambda: Ours("tiled"), 1 << 17),
    "floor, 3 products": (lambda: floor(symmetric=False), 1 << 17),
    "floor, 2 products": (lambda: floor(symmetric=True), 1 << 17),
    "plain full logits": (lambda: plain_full_logits, 1 << 15),
    "half problem (open_clip's)": (lambda: half_problem, 1 << 15),
    "lightly": (lambda: lightly(gather=False), 1 << 14),
    "pytorch-metric-learning SupCon": (metric_learning_sup_con, 1 << 14),
}


ON_A_GPU_ONLY = ("ours, float16 rows", "ours, bfloat16 rows", "ours, tiled")  # on a CPU all of them are ours


class FullColumns(Tiles):
    """Every rank sums its own rows against all columns, to show what dividing the pairs saves."""

    def sums(self) -> Tensor:
        own = self.batch.own
        sums = self.z.new_zeros(self.batch.num_rows)
        for i, j in self.tiles.own():
            e = self._exp(i, self.z, j, own.start, self._tile_to_keep() if self.keeps_tiles else self._e)
            sums[i] += e.sum(1)
            if i != j:
                sums[j] += e.sum(0)
        self.all = self.batch.all_rows().to(self.z.dtype)
        for i, j in self.tiles.others():
            sums[i] += self._exp(i, self.all, j, 0, self._e).sum(1)
        return distributed.all_gather(sums)


class OursWithFullColumns(Ours):
    def __call__(self, z: Tensor) -> None:
        implementations.Tiles = FullColumns  # type: ignore[misc]
        try:
            super().__call__(z)
        finally:
            implementations.Tiles = Tiles  # type: ignore[misc]


SEVERAL_RANKS: dict[str, Callable[[], Loss]] = {
    "ours": lambda: Ours("auto"),
    "ours, full columns": lambda: OursWithFullColumns("tiled"),
    "lightly": lambda: lightly(gather=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def build(contenders: dict[str, Callable[[], Loss]], absent: set[str]) -> dict[str, Loss]:
    built = {}
    for name, make in contenders.items():
        try:
            built[name] = make()
        except ImportError:
            absent.add(name)
    return built


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS_OF_A_WINDOW = 10


def interleaved_times(losses: dict[str, Loss], z: Tensor, repetitions: int, clock: str) -> dict[str, list[float]]:
    """Seconds of a step in every repetition; the order rotates."""
    step_s = on_gpu if z.is_cuda else by_clock(CLOCKS[clock])
    times: dict[str, list[float]] = {name: [] for name in losses}
    names = list(losses)
    for repetition in range(-1, repetitions):  # the first only warms up
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            seconds = step_s(losses[name], z)
            if repetition >= 0:
                times[name].append(seconds)
    return times


def by_clock(now: Callable[[], float]) -> Callable[[Loss, Tensor], float]:
    """Times one step, between two barriers of all ranks."""

    def step_s(loss: Loss, z: Tensor) -> float:
        z.grad = None
        distributed.barrier()
        start = now()
        loss(z)
        distributed.barrier()
        return now() - start

    return step_s


def on_gpu(loss: Loss, z: Tensor) -> float:
    """The mean of a window of steps between two events: the device's time, if the host keeps ahead of it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(z.device)
    begin.record()
    for _ in range(STEPS_OF_A_WINDOW):
        z.grad = None
        loss(z)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / STEPS_OF_A_WINDOW


def summary(losses: dict[str, Loss], times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    reference, best = statistics.median(times["ours"]), min(times["ours"])
    return {
        name: {
            "implementation": str(loss.loss.choice) if isinstance(loss := losses[name], Ours) else None,
            "median_ms": 1e3 * statistics.median(t),
            "best_ms": 1e3 * min(t),
            "ratio_of_medians": statistics.median(t) / reference,
            "ratio_of_bests": min(t) / best,
        }
        for name, t in times.items()
    }


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class PeakMemory:
    """MiB above those in use at the start: of the process (Linux), or of the GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else self._status("VmHWM")
        self.mib = peak - self.before

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak_mib(name: str, rows: int, device: str, dtype: str, threads: int) -> float:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    loss = ONE_PROCESS[name][0]()
    loss(random_rows(256, device, dtype))  # loads libraries, which must not count
    z = random_rows(rows, device, dtype)
    with PeakMemory(z.device) as peak:
        loss(z)
    return peak.mib


def random_rows(rows: int, device: str, dtype: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, K, generator=generator).to(device, getattr(torch, dtype)).requires_grad_()


def rank_main(rank: int, world_size: int, store: str, rows: int, repetitions: int, clock: str, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
    )
    absent: set[str] = set()
    losses = build(SEVERAL_RANKS, absent)
    times = interleaved_times(losses, random_rows(rows // world_size, "cpu", "float32"), repetitions, clock)
    if rank == 0:
        results.put((summary(losses, times), absent))
    torch.distributed.destroy_process_group()


def on_ranks(world_size: int, rows: int, repetitions: int, clock: str) -> tuple[dict[str, Any], set[str]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        arguments = (world_size, str(Path(folder) / "store"), rows, repetitions, clock, results)
        processes = [
            context.Process(target=rank_main, args=(rank, *arguments), daemon=True) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a rank ended with exit code {process.exitcode}")
        return results.get()


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches


def micro_batch_step(images: int, size: int, parts: int, threads: int, clock: str) -> tuple[float, float]:
    """(seconds, peak MiB) of forward and backward of a ResNet-18 with GroupNorm on 2 x `images` images."""
    from torchvision.models import resnet18

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = resnet18(num_classes=K, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    views = torch.randn(2, images, 3, size, size)
    loss = NTXentLoss(TEMPERATURE)
    loss(model(views[:, :2].flatten(0, 1))).backward()
    with PeakMemory(views.device) as peak:
        start = CLOCKS[clock]()
        if parts == 1:
            loss(model(views.flatten(0, 1))).backward()
        else:
            backward_in_micro_batches(model, views, loss, micro_batch_size=images // parts)
        seconds = CLOCKS[clock]() - start
    return seconds, peak.mib


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[512, 2048, 4096], help="N = 2G, of one process")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2], help="world sizes (gloo, CPU)")
    parser.add_argument("--rows-of-all-ranks", type=int, nargs="*", default=[4096])
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[], help="number of parts; 1 first")
    parser.add_argument("--images", type=int, default=256, help="of the micro-batch comparison")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: this process's CPU time, for a busy machine"
    )
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # every row of ours says what computed it, and why
    torch.set_num_threads(args.threads)
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    absent: set[str] = set()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": device_name,
        "load_average": os.getloadavg(),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "one_process": {},
        "several_ranks": {},
        "micro_batches": {},
    }
    print(
        f"{args.clock} time: median (best), as a ratio to ours, forward and backward; memory: peak above the inputs\n"
    )
    for rows in args.rows:
        left_out = () if args.device == "cuda" else ON_A_GPU_ONLY
        contenders = {n: make for n, (make, most) in ONE_PROCESS.items() if rows <= most and n not in left_out}
        losses = build(contenders, absent)
        z = random_rows(rows, args.device, args.dtype)
        found = summary(losses, interleaved_times(losses, z, args.repetitions, args.clock))
        for name in losses:  # the GPU's allocator is exact; a process's memory holds what others have left there
            where = (lambda f, *a: f(*a)) if args.device == "cuda" else in_own_process
            found[name]["peak_mib"] = where(peak_mib, name, rows, args.device, args.dtype, args.threads)
        say(table(f"N = {rows}, one process", found))
        report["one_process"][rows] = found
    for world_size in args.ranks:
        for rows in args.rows_of_all_ranks:
            found, absent_there = on_ranks(world_size, rows, args.repetitions, args.clock)
            absent |= absent_there
            say(table(f"N = {rows}, {world_size} ranks", found))
            report["several_ranks"][f"{rows} rows, {world_size} ranks"] = found
    for parts in args.micro_batches:
        runs = [
            in_own_process(micro_batch_step, args.images, args.image_size, parts, args.threads, args.clock)
            for _ in range(min(3, args.repetitions))
        ]
        seconds, mib = statistics.median(s for s, _ in runs), statistics.median(m for _, m in runs)
        report["micro_batches"][parts] = {"s": seconds, "peak_mib": mib}
        whole = report["micro_batches"].get(1, report["micro_batches"][parts])
        say(
            f"{parts:3} micro-batches: {seconds:7.2f} s ({seconds / whole['s']:.2f})"
            f"  {mib:7.0f} MiB ({mib / whole['peak_mib']:.2f})"
        )
    if absent:
        say(f"absent, so not compared: {', '.join(sorted(absent))} (pip install lightly pytorch-metric-learning)")
    report["absent"] = sorted(absent)
    Path(args.out).mkdir(exist_ok=True)
    path = Path(args.out) / f"loss_{datetime.now(UTC):%Y%m%d_%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(f"written: {path}")


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{title}: ours {found['ours']['median_ms']:.1f} ms ({found['ours']['best_ms']:.1f})"]
    for name, row in found.items():
        memory = f"{row['peak_mib']:10.1f} MiB" if "peak_mib" in row else ""
        code = f"   {row['implementation']}" if row["implementation"] else ""
        lines.append(f"    {name:32} {row['ratio_of_medians']:7.2f} ({row['ratio_of_bests']:.2f}){memory}{code}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
