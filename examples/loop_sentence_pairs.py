"""The loss for pairs of sentences with a model of sentence-transformers: a pair is a positive, all others negatives.

    python -m torch.distributed.run --nproc-per-node 2 examples/loop_sentence_pairs.py MODEL
    python examples/loop_sentence_pairs.py MODEL           # the same losses: 8 pairs in every step

MODEL is a folder or a name of a model of sentence-transformers.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_dist.loss import NTXentLoss

COLOURS, ANIMALS = ("red", "green", "blue", "grey"), ("cat", "dog", "bird", "fish")
PAIRS = [(f"{colour} {animal}", f"{animal} that is {colour}") for animal in ANIMALS for colour in COLOURS]


def main(path: str) -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # nccl on GPUs
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    encoder = SentenceTransformer(path, device="cpu").train()
    # The loss uses one embedding of each sentence: parameters that do not reach it get no gradient.
    model: nn.Module = encoder
    if processes > 1:
        model = DistributedDataParallel(encoder, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    nt_xent = NTXentLoss(temperature=0.05)

    for step in range(4):
        pairs = PAIRS[8 * (step % 2) :][:8][rank::processes]  # this process's part of the step's 8 pairs
        sentences = [pair[side] for side in (0, 1) for pair in pairs]  # all of side 0, then all of side 1
        z = model(encoder.tokenize(sentences))["sentence_embedding"]  # [2B, K]
        loss = nt_xent(z)  # negatives from all processes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
