"""How long a step takes on W devices: compute, and latency and bandwidth of every collective. docs/scaling.md explains.

    step = augment + network + loss compute + collectives - what of the gradients' all-reduce hides behind the backward

    compute      a fixed time and one for each image, or for each FLOP and byte of the loss
    collective   start + hops x latency + bytes sent / bandwidth; bytes are those of simclr_dist/plan/traffic.py

Letters: B images of a device, n = 2 B rows, W devices, G = B W, N = n W, K the width of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.loss_designs import OURS_ON_GPU, Design
from simclr_dist.config import Config
from simclr_dist.plan.traffic import Collective, collectives

# DDP sends the first parameters' bucket after the backward has ended: nothing is left to hide it behind.
LAST_BUCKET_BYTES = 25 * 2**20
BACKWARD_SHARE = 2 / 3  # of forward and backward: two products for each one of the forward


@dataclass(frozen=True)
class Network:
    """Devices in nodes. Seconds and bytes a second, each way; node_bytes_per_s is that of all its adapters together."""

    name: str
    devices_per_node: int
    start_s: float
    local_hop_s: float
    local_bytes_per_s: float
    hop_s: float
    node_bytes_per_s: float
    tree_hop_s: float | None = None  # between nodes, for small all-reduces; None: rings only

    def nodes(self, W: int) -> int:
        return -(-W // self.devices_per_node)

    def latency(self, operation: str, W: int) -> float:
        """Of the way around the ring, as NCCL's own model counts it (src/graph/tuning.cc); a tree where it is shorter.

        An all-reduce goes around twice."""
        nodes = self.nodes(W)
        ring = (W - nodes) * self.local_hop_s + (nodes - 1) * self.hop_s
        if operation != "all_reduce":
            return ring
        if self.tree_hop_s is None:
            return 2 * ring
        in_node = min(W, self.devices_per_node) - 1
        tree = in_node * self.local_hop_s + math.ceil(math.log2(nodes)) * self.tree_hop_s
        return 2 * min(ring, tree)

    def seconds(self, collective: Collective, W: int) -> float:
        """All `count` calls of a collective, one after the other."""
        if W == 1:
            return 0.0
        bandwidth = self.local_bytes_per_s
        if self.nodes(W) > 1:
            # Rings are laid through all devices of a node and cross to the next one by as many adapters as there are.
            bandwidth = min(bandwidth, self.node_bytes_per_s)
        once = self.start_s + self.latency(collective.operation, W)
        return collective.count * once + collective.sent(W) / bandwidth


@dataclass(frozen=True)
class Device:
    """Seconds of a step that do not depend on the images, and for each image (two views)."""

    name: str
    step_s: float
    image_s: float
    augment_step_s: float
    augment_image_s: float
    loss_s: float
    loss_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int | None = None

    def network(self, B: int) -> float:
        return self.step_s + B * self.image_s

    def augment(self, B: int) -> float:
        return self.augment_step_s + B * self.augment_image_s

    def loss(self, design: Design, n: int, W: int, K: int) -> float:
        moved = design.moved_bytes(n, W) / self.memory_bytes_per_s
        return self.loss_s + design.flops(n, W, K) / self.loss_flops_per_s + moved


@dataclass(frozen=True)
class Step:
    """One step on W devices, seconds by part."""

    W: int
    G: int
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def images_per_s(self) -> float:
        return self.G / self.seconds

    @property
    def loss_s(self) -> float:
        return sum(seconds for name, seconds in self.parts.items() if name.startswith("loss"))


def step(config: Config, W: int, device: Device, network: Network, design: Design = OURS_ON_GPU) -> Step:
    """`config` on W devices with the loss of `design`; its batch must divide."""
    G, K = config.train.global_batch_size, config.model.head_out_dim
    B, n = G // W, 2 * G // W
    seconds = dict.fromkeys(("loss", "gradients", "BatchNorm", "stop"), 0.0)
    for collective in collectives_of(config, W):
        part = collective.what.partition(" ")[0].rstrip(":")
        if part != "loss" or collective.what == "loss: sample ids":  # these are sent whatever the design
            seconds[part] += network.seconds(collective, W)
    seconds["loss"] += sum(network.seconds(collective, W) for collective in design.collectives(n, W, K))
    backward = BACKWARD_SHARE * device.network(B)
    last_bucket = seconds["gradients"] * min(1.0, LAST_BUCKET_BYTES / gradient_bytes(config, W)) if W > 1 else 0.0
    return Step(
        W,
        G,
        {
            "augment": device.augment(B),
            "encoder and head": device.network(B),
            "loss: compute": device.loss(design, n, W, K),
            "loss: sending": seconds["loss"],
            "BatchNorm": seconds["BatchNorm"],
            "gradients, not hidden": max(seconds["gradients"] - backward, last_bucket),
            "stop requests": seconds["stop"],
        },
    )


def collectives_of(config: Config, W: int) -> list[Collective]:
    return collectives(model=config.model, loss=config.loss, train=config.train, world_size=W)


def gradient_bytes(config: Config, W: int) -> int:
    return next(c.num_bytes for c in collectives_of(config, W) if c.what == "gradients")


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def fit(rows: Sequence[Sequence[float]], seconds: Iterable[float]) -> list[float]:
    """Non-negative c with rows @ c close to seconds, in relative error: large times must not drown the small ones.

    A coefficient that would be negative is nothing: it is left out, the worst first.
    """
    measured = np.array(list(seconds), dtype=float)
    A = np.array(rows, dtype=float) / measured[:, None]
    free = [i for i in range(A.shape[1]) if A[:, i].any()]
    while True:
        scale = np.abs(A[:, free]).max(axis=0)
        found = np.linalg.lstsq(A[:, free] / scale, np.ones(len(A)), rcond=None)[0] / scale
        if (found >= 0).all():
            break
        del free[int(np.argmin(found * scale))]
    c = np.zeros(A.shape[1])
    c[free] = found
    return [float(value) for value in c]


def fit_line(points: dict[int, float]) -> tuple[float, float]:
    """Seconds by images -> (fixed, for each image)."""
    fixed, each = fit([(1, images) for images in points], points.values())
    return fixed, each


@dataclass(frozen=True)
class TimedCollective:
    operation: str
    num_bytes: int  # that a rank brings
    W: int
    seconds: float

    def as_collective(self) -> Collective:
        return Collective("measured", self.operation, self.num_bytes)  # type: ignore[arg-type]


def fit_network(timed: Sequence[TimedCollective], name: str) -> Network:
    """One machine's: start, latency of a hop, bandwidth."""
    hops: Callable[[TimedCollective], int] = lambda t: (2 if t.operation == "all_reduce" else 1) * (t.W - 1)  # noqa: E731
    rows = [(1, hops(t), t.as_collective().sent(t.W)) for t in timed]
    start_s, hop_s, byte_s = fit(rows, [t.seconds for t in timed])
    bandwidth = 1 / byte_s if byte_s else math.inf
    return Network(name, 1 << 30, start_s, hop_s, bandwidth, hop_s, bandwidth)


@dataclass(frozen=True)
class TimedLoss:
    design: Design
    n: int
    W: int
    K: int
    seconds: float


def fit_loss(timed: Sequence[TimedLoss]) -> tuple[float, float, float]:
    """(fixed seconds, FLOP/s, bytes/s); each design by its own FLOPs and bytes, one set of constants for all."""
    rows = [(1, t.design.flops(t.n, t.W, t.K), t.design.moved_bytes(t.n, t.W)) for t in timed]
    fixed, flop_s, byte_s = fit(rows, [t.seconds for t in timed])
    return fixed, 1 / flop_s if flop_s else math.inf, 1 / byte_s if byte_s else math.inf
