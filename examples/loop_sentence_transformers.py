"""The loss for pairs of sentences, with a model of sentence-transformers: side 0 against side 1, as in CLIP.

    python -m torch.distributed.run --nproc-per-node 2 examples/loop_sentence_transformers.py MODEL
    python examples/loop_sentence_transformers.py MODEL    # the same losses: every step has the same 8 pairs

MODEL is a folder or a name of a model of sentence-transformers. Afterwards `towers.encoder.save(FOLDER)` keeps it.
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
PAIRS = [(f"a {colour} {animal}", f"{animal} that is {colour}") for animal in ANIMALS for colour in COLOURS]


class Towers(nn.Module):
    """One call a step: DDP then sees the loss as its output, and averages the gradient of the temperature, too."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.nt_xent = NTXentLoss(temperature=0.05, pairs="across", learn_temperature=True)

    def forward(self, features: dict[str, torch.Tensor], group_ids: torch.Tensor) -> torch.Tensor:
        z = self.encoder(features)["sentence_embedding"]  # [2B, K]: all of side 0, then all of side 1
        loss: torch.Tensor = self.nt_xent(z, group_ids=group_ids)  # negatives from all processes
        return loss


def main(path: str) -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # nccl on GPUs
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    towers = Towers(SentenceTransformer(path, device="cpu").train())
    model: nn.Module = towers
    if processes > 1:  # some models have layers that no sentence embedding goes through
        model = DistributedDataParallel(towers, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step in range(4):
        numbers = range(8 * step, 8 * step + 8)[rank::processes]  # this process's part of the step's 8 pairs
        pairs = [PAIRS[n % 16] for n in numbers]
        # Pairs about one animal are never negatives of one another; so would be captions of one image, equal texts.
        group_ids = torch.tensor([n % 16 // 4 for n in numbers])
        features = towers.encoder.preprocess([pair[side] for side in (0, 1) for pair in pairs])
        loss = model(features, group_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        towers.nt_xent.limit_temperature()
        if rank == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
