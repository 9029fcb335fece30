"""The loss and the loader in Lightning.

python -m torch.distributed.run --nproc-per-node 2 examples/loop_lightning.py
python examples/loop_lightning.py              # the same losses
"""

from __future__ import annotations

import os

import lightning
import torch

from simclr_dist import load_views
from simclr_dist.config import ModelConfig
from simclr_dist.data.loading.ready_views import Views
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model


class SimCLR(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = build_model(ModelConfig(encoder="resnet_small", width=8))  # or any other
        self.nt_xent = NTXentLoss(temperature=0.5)  # inside the module: a learned temperature would be trained too

    def configure_model(self) -> None:  # when the process group exists, before DDP wraps this module
        self.network = convert_to_global_batch_norm(self.network)

    def train_dataloader(self) -> Views:  # each process reads its part of every batch of 64
        return load_views("synthetic", image_size=32, global_batch_size=64, preset="simclr_cifar", device=self.device)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
        views, sample_ids = batch
        _h, z = self.network(views.flatten(0, 1))  # z [2B, K]: all of view 0, then all of view 1
        loss = self.nt_xent(z, sample_ids)
        self.print(f"step {step} loss {loss.item():.6f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005)


def main() -> None:
    lightning.seed_everything(0)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=4,
        use_distributed_sampler=False,  # the loader divides the batches itself
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(SimCLR())


if __name__ == "__main__":
    main()
