"""The loss and the loader in the Trainer of transformers, which is accelerate inside.

    accelerate launch --cpu --num-processes 2 examples/loop_hf_trainer.py
    python examples/loop_hf_trainer.py             # the same losses

In a loop of accelerate alone: prepare(model, optimizer), not the loader, which divides the batches itself.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from simclr_dist import load_views
from simclr_dist.config import ModelConfig
from simclr_dist.data.loading.ready_views import Views
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model


class ContrastiveTrainer(Trainer):
    nt_xent = NTXentLoss(temperature=0.5)

    def get_train_dataloader(self) -> Views:
        return load_views(
            "synthetic", image_size=32, global_batch_size=64, preset="simclr_cifar", device=self.args.device
        )

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
        views, sample_ids = inputs
        _h, z = model(views.flatten(0, 1))  # z [2B, K]: all of view 0, then all of view 1
        loss = self.nt_xent(z, sample_ids)  # DDP averages: no factor is needed
        if self.is_world_process_zero():
            print(f"step {self.state.global_step} loss {loss.item():.6f}", flush=True)
        return loss


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=4, learning_rate=0.005, optim="sgd", lr_scheduler_type="constant", report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = convert_to_global_batch_norm(build_model(ModelConfig(encoder="resnet_small", width=8)))
        ContrastiveTrainer(model, arguments).train()


if __name__ == "__main__":
    main()
