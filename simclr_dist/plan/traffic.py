"""What the processes of a training send each other in one step.

Bytes are those that a rank brings to a collective, and those that it sends in a ring, the way both NCCL and gloo do it:
an all-gather of b bytes a rank sends (W-1) b, an all-reduce 2 (W-1)/W b, a broadcast b, an all-to-all (W-1)/W b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from simclr_dist.config import LossConfig, ModelConfig, TrainConfig
from simclr_dist.loss.agreement import HEADER_BYTES
from simclr_dist.plan.memory import shape_of_training


@dataclass(frozen=True)
class Collective:
    """`count` equal calls in a step, each with `num_bytes` of this rank."""

    what: str
    operation: Literal["all_gather", "all_reduce", "broadcast", "all_to_all"]
    num_bytes: int
    count: int = 1

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in a step."""
        others = world_size - 1
        factor = {
            "all_gather": others,
            "all_reduce": 2 * others / world_size,
            "broadcast": min(others, 1),
            "all_to_all": others / world_size,
        }
        return self.count * factor[self.operation] * self.num_bytes


def collectives(
    *, model: ModelConfig, loss: LossConfig, train: TrainConfig, world_size: int, num_views: int = 2
) -> list[Collective]:
    """All of a step of pretraining; none in a world of one."""
    if world_size == 1:
        return []
    network = shape_of_training(model, loss)
    B = train.global_batch_size // world_size
    n, N, K = num_views * B, num_views * B * world_size, model.head_out_dim
    gradients = sum(p.nbytes for p in network.parameters())
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if train.virtual_shards is not None:  # every rank has the whole gradient of the loss's own parameters
        gradients = sum(p.nbytes for name, p in network.named_parameters() if not name.startswith("loss."))
        moments = sum(4 * 2 * m.num_features for m in norms)
        return [
            Collective("loss: labels" if loss.kind == "supcon" else "loss: sample ids", "all_gather", 8 * B),
            Collective("loss: z", "all_gather", 4 * n * K),
            *(_tree("BatchNorm: running statistics", moments, world_size) if norms else []),
            *_tree("gradients", gradients, world_size),
            Collective("stop and save requests", "all_reduce", 8),
        ]
    width = 4 if loss.gather_dtype == loss.row_dtype == "float32" else 2
    found = [
        Collective("loss: agreement", "all_gather", HEADER_BYTES),
        Collective("loss: labels" if loss.kind == "supcon" else "loss: sample ids", "all_gather", 8 * B),
        Collective("loss: z", "all_gather", width * n * K),
        Collective("loss: sums", "all_reduce", 4 * N),
        Collective("gradients", "all_reduce", gradients),
        Collective("stop and save requests", "all_reduce", 8),
    ]
    if model.batch_norm == "per_device":
        buffers = sum(buffer.nbytes for buffer in network.buffers())
        return [*found, Collective("BatchNorm: running statistics", "broadcast", buffers)] if norms else found
    micro = train.micro_batch_size
    parts = -(-B // micro) if micro else 1
    forwards = 2 * parts if micro else 1  # a step in micro-batches goes forward twice
    for channels in sorted({m.num_features for m in norms}):
        alike = sum(m.num_features == channels for m in norms)
        forward = 4 * (2 * channels + 1)  # mean, variance, count
        found.append(Collective(f"BatchNorm {channels}: moments", "all_gather", forward, forwards * alike))
        found.append(Collective(f"BatchNorm {channels}: backward", "all_reduce", 4 * 2 * channels, parts * alike))
    return found


def _tree(what: str, num_bytes: int, world_size: int) -> list[Collective]:
    """A sum in a fixed order (`distributed.all_reduce_tree`)."""
    part = 4 * -(-num_bytes // (4 * world_size))
    return [
        Collective(f"{what}: terms", "all_to_all", world_size * part),
        Collective(f"{what}: sums", "all_gather", part),
    ]
