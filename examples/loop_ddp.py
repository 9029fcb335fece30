"""The loss and the loader in a loop of plain PyTorch: DistributedDataParallel, or one process.

python -m torch.distributed.run --nproc-per-node 2 examples/loop_ddp.py
python examples/loop_ddp.py                    # the same losses: every step has the same 64 images and negatives
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_dist import load_views
from simclr_dist.config import ModelConfig
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # nccl on GPUs
    torch.manual_seed(0)
    model: nn.Module = build_model(ModelConfig(encoder="resnet_small", width=8))  # or any other network
    model = convert_to_global_batch_norm(model)  # statistics of the whole batch, as one process has them
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    nt_xent = NTXentLoss(temperature=0.5)

    with load_views("synthetic", image_size=32, global_batch_size=64, preset="simclr_cifar") as loader:
        for step, (views, sample_ids) in enumerate(loader):  # views [2, B, 3, S, S], B images of this process
            _h, z = model(views.flatten(0, 1))  # z [2B, K]: all of view 0, then all of view 1
            loss = nt_xent(z, sample_ids)  # negatives from all processes; the same number on each
            optimizer.zero_grad()
            loss.backward()  # after DDP's average: the gradient of the whole batch
            optimizer.step()
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"step {step} loss {loss.item():.6f}", flush=True)
            if step == 3:
                break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
