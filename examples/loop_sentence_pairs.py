"""The loss for pairs of sentences in sentence-transformers: each pair is a positive, all others are negatives.

    accelerate launch --cpu --num-processes 2 examples/loop_sentence_pairs.py MODEL
    python examples/loop_sentence_pairs.py MODEL

MODEL is a folder or a name of a model of sentence-transformers. Both commands have 8 pairs in a step, and equal losses.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn

from simclr_dist.loss import NTXentLoss

PAIRS = Dataset.from_dict(
    {
        "anchor": [f"{a} {b}" for a in ("red", "green", "blue", "grey") for b in ("cat", "dog", "bird", "fish")],
        "positive": [
            f"{b} that is {a}" for a in ("red", "green", "blue", "grey") for b in ("cat", "dog", "bird", "fish")
        ],
    }
)


class PairLoss(nn.Module):
    """In place of MultipleNegativesRankingLoss: with the negatives of all processes, and the exact gradient."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model, self.nt_xent = model, NTXentLoss(temperature=0.05)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        z = torch.cat([self.model(features)["sentence_embedding"] for features in sentence_features])
        loss = self.nt_xent(z)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"loss {loss.item():.6f}", flush=True)
        return loss


def main(path: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = SentenceTransformer(path, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=8 // processes, learning_rate=0.05, optim="sgd",
            lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        SentenceTransformerTrainer(model, arguments, train_dataset=PAIRS, loss=PairLoss(model)).train()


if __name__ == "__main__":
    main(sys.argv[1])
