"""How long a step takes on W devices: compute, and latency and bandwidth of every collective. docs/scaling.md explains.

    step = augment + network + loss compute + collectives - the part of the gradients' all-reduce hidden by the backward

    compute      a fixed time and one for each image, or for each FLOP and byte of the loss
    collective   start + hops x latency + bytes sent / bandwidth; bytes are those of simclr_dist/plan/traffic.py

Letters: B images of a device, n = 2 B rows, W devices, G = B W, N = n W, K the width of z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.loss_designs import OURS_ON_GPU, Design
from simclr_dist.config import Config
from simclr_dist.plan.traffic import Collective, collectives

# DDP sends the first parameters' bucket after the backward has ended, so that nothing can hide it.
LAST_BUCKET_BYTES = 25 * 2**20
BACKWARD_SHARE = 2 / 3  # of forward and backward: two products for each one of the forward


@dataclass(frozen=True)
class Network:
    """Devices in nodes. Seconds and bytes per second, each way; node_bytes_per_s is for all adapters of a node."""

    name: str
    devices_per_node: int
    start_s: float
    local_hop_s: float
    local_bytes_per_s: float
    hop_s: float
    node_bytes_per_s: float
    tree_hop_s: float  # between nodes, for small all-reduces

    def latency(self, operation: str, W: int) -> float:
        """Seconds around the ring, counted as NCCL does (src/graph/tuning.cc), or in a tree where that is shorter.

        An all-reduce goes around twice.
        """
        nodes = -(-W // self.devices_per_node)
        ring = (W - nodes) * self.local_hop_s + (nodes - 1) * self.hop_s
        if operation != "all_reduce":
            return ring
        in_node = min(W, self.devices_per_node) - 1
        tree = in_node * self.local_hop_s + math.ceil(math.log2(nodes)) * self.tree_hop_s
        return 2 * min(ring, tree)

    def seconds(self, collective: Collective, W: int) -> float:
        """All `count` calls of a collective, one after the other."""
        if W == 1:
            return 0.0
        bandwidth = self.local_bytes_per_s
        if self.devices_per_node < W:
            # A ring goes through all devices of a node, and to the next node over all of its adapters.
            bandwidth = min(bandwidth, self.node_bytes_per_s)
        return (
            collective.count * (self.start_s + self.latency(collective.operation, W)) + collective.sent(W) / bandwidth
        )


@dataclass(frozen=True)
class Device:
    """Seconds: (fixed, per image of two views) of network and augmentation; (fixed, per FLOP, per byte) of the loss."""

    name: str
    network: tuple[float, float]
    augment: tuple[float, float]
    loss: tuple[float, float, float]
    memory_bytes: float = math.inf

    def loss_seconds(self, design: Design, n: int, W: int, K: int) -> float:
        fixed, per_flop, per_byte = self.loss
        return fixed + per_flop * design.flops(n, W, K) + per_byte * design.moved_bytes(n, W)


@dataclass(frozen=True)
class Step:
    """One step with a global batch of G images: seconds by part."""

    G: int
    parts: dict[str, float]

    @property
    def images_per_s(self) -> float:
        return self.G / sum(self.parts.values())

    @property
    def loss_s(self) -> float:
        return self.parts["loss: compute"] + self.parts["loss: sending"]


def step(config: Config, W: int, device: Device, network: Network | None, design: Design = OURS_ON_GPU) -> Step:
    """`config` on W devices with the loss of `design`; network None: collectives take no time."""
    G, K = config.train.global_batch_size, config.model.head_out_dim
    B, n = G // W, 2 * G // W
    sending = dict.fromkeys(("loss", "gradients", "BatchNorm", "stop"), 0.0)
    gradient_bytes = math.inf
    for collective in collectives_of(config, W):
        part = collective.what.partition(" ")[0].rstrip(":")
        if collective.what == "gradients":
            gradient_bytes = collective.num_bytes
        if network and (part != "loss" or collective.what == "loss: sample ids"):  # the same for every design
            sending[part] += network.seconds(collective, W)
    if network:
        sending["loss"] += sum(network.seconds(collective, W) for collective in design.collectives(n, W, K))
    encoder = device.network[0] + B * device.network[1]
    last_bucket = sending["gradients"] * min(1.0, LAST_BUCKET_BYTES / gradient_bytes)
    parts = {
        "augment": device.augment[0] + B * device.augment[1],
        "encoder and head": encoder,
        "loss: compute": device.loss_seconds(design, n, W, K),
        "loss: sending": sending["loss"],
        "BatchNorm": sending["BatchNorm"],
        "gradients, not hidden": max(sending["gradients"] - BACKWARD_SHARE * encoder, last_bucket),
        "stop requests": sending["stop"],
    }
    return Step(G, parts)


def collectives_of(config: Config, W: int) -> list[Collective]:
    return collectives(model=config.model, loss=config.loss, train=config.train, world_size=W)
