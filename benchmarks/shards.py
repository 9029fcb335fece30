"""What `train.virtual_shards` costs on one process: a step in shards, in micro-batches and whole, in turn.

    python -m benchmarks.shards

CPU seconds of forward, loss and backward on one thread, medians as a ratio to the whole batch. The loss alone is a row
of its own, because on W processes each of them computes all of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import ModelConfig
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.optim.virtual_shards import VirtualShards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="G")
    parser.add_argument("--shards", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=int, default=16, help="of resnet_small")
    parser.add_argument("--image-size", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = circumstances(vars(args))
    torch.manual_seed(0)
    views, ids = torch.randn(2, args.images, 3, args.image_size, args.image_size), torch.arange(args.images)
    nt_xent = NTXentLoss()
    network = build_model(ModelConfig(encoder="resnet_small", width=args.width))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = torch.randn(2 * args.images, 128, requires_grad=True)

    def in_micro_batches(size: int) -> Tensor:
        return backward_in_micro_batches(network, views, lambda z: nt_xent(z, ids), micro_batch_size=size)

    def in_shards(shards: int) -> Tensor:
        return VirtualShards(network, shards).backward(views, ids, nt_xent, begin_shard=torch.manual_seed)

    ways: dict[str, Callable[[], object]] = {
        "the whole batch": lambda: nt_xent(network(views.flatten(0, 1))[1], ids).backward(),
        "the loss alone": lambda: nt_xent(z, ids).backward(),
    }
    for shards in args.shards:
        size = args.images // shards
        ways[f"{shards} micro-batches of {size}"] = lambda size=size: in_micro_batches(size)  # type: ignore[misc]
        ways[f"{shards} shards of {size}"] = lambda shards=shards: in_shards(shards)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(args.repetitions + 1):
        for name, step in ways.items():
            network.zero_grad(set_to_none=True)
            began = time.process_time()
            step()
            if repetition:  # the first warms up
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    whole = medians["the whole batch"]
    table = ["| | CPU s | ratio |", "|---|---:|---:|"]
    table += [f"| {name} | {found:.3f} | {found / whole:.2f} |" for name, found in medians.items()]
    print("\n".join(table))
    write("shards", args.out, {**report, "seconds": seconds}, table)


if __name__ == "__main__":
    main()
