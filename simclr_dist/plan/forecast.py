"""What one training will need: sizes, steps, hours, and what will hold it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simclr_dist.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from simclr_dist.kinds import kind_of
from simclr_dist.network.precision import assumed_precision
from simclr_dist.optim.groups import describe_scales
from simclr_dist.optim.schedule import peak_learning_rate
from simclr_dist.plan.memory import DeviceMemory, checkpoint_bytes, device_memory, loader_bytes, shape_of_training
from simclr_dist.plan.traffic import Collective, collectives

# What each device can send while all do: 100 Gbit/s, less what protocols take.
LINK_BYTES_PER_S = 10e9


@dataclass(frozen=True)
class Speed:
    """Images a second: of one device that computes, of one process that decodes; None: not known."""

    device: float | None = None
    loader: float | None = None


@dataclass(frozen=True)
class Forecast:
    """See `forecast`. Bytes are per device, but for the data's and the checkpoint's."""

    num_devices: int
    device_type: str
    global_batch_size: int
    batch_size_per_device: int
    num_views: int
    precision: str
    num_images: int
    steps_per_epoch: int
    num_steps: int
    peak_learning_rate: float
    layer_rates: tuple[str, ...]
    """As multiples of the peak, where the encoder's layers have rates of their own."""
    num_parameters: int
    memory: DeviceMemory
    loader_bytes: int
    checkpoint_bytes: int
    data_bytes: int
    collectives: tuple[Collective, ...]
    speed: Speed

    @property
    def sent_bytes_per_step(self) -> float:
        return sum(c.sent(self.num_devices) for c in self.collectives)

    @property
    def seconds_per_step(self) -> dict[str, float]:
        """How long each part would take alone, as far as it is known."""
        B, speed = self.batch_size_per_device, self.speed
        parts = {"device": B / speed.device if speed.device else 0, "loader": B / speed.loader if speed.loader else 0}
        parts["network"] = self.sent_bytes_per_step / LINK_BYTES_PER_S
        return {name: seconds for name, seconds in parts.items() if seconds}

    @property
    def hours(self) -> float | None:
        """Without evaluations and starts. Loading overlaps with computing; sending is taken not to."""
        parts = self.seconds_per_step
        if "device" not in parts:
            return None
        step_s = max(parts["device"] + parts.get("network", 0), parts.get("loader", 0))
        return self.num_steps * step_s / 3600

    def bottleneck(self, device_bytes: int | None = None, page_cache_bytes: int | None = None) -> str:
        """What will hold the training up, in a sentence. device_bytes: memory of a device, where it is known."""
        largest = max(vars(self.memory), key=lambda name: vars(self.memory)[name])
        if device_bytes and self.memory.total > 0.9 * device_bytes:
            remedy = "train.micro_batch_size" if largest == "activations" else "more devices"
            return (
                f"memory: {self.memory.total / 2**30:.1f} GiB do not fit into {device_bytes / 2**30:.1f}; most of it "
                f"is {largest} ({remedy} helps)"
            )
        parts = self.seconds_per_step
        if page_cache_bytes and self.data_bytes > page_cache_bytes:
            return "the disk: the data does not stay in memory, so every epoch reads it again"
        if "device" not in parts:
            return f"not known without a speed (--measure, --images-per-s); most memory goes to {largest}"
        slowest = max(parts, key=lambda name: parts[name])
        remedies = {
            "device": "the devices: more of them, a lower precision or smaller views would help; loading and network "
            "keep up as far as known",
            "loader": "the loader: more CPUs a process (data.num_threads), or `simclr-dist prepare --max-side`",
            "network": "the network: larger batches per device, loss.gather_dtype=bfloat16, or a faster interconnect",
        }
        return remedies[slowest]


def forecast(
    *,
    data: DataConfig,
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    train: TrainConfig,
    settings: dict[str, Any],
    num_images: int,
    world_size: int,
    device_type: str,
    speed: Speed,
) -> Forecast:
    """What these sections will need on `world_size` devices, with `num_images` images to train on.

    settings: the whole configuration as plain values; each checkpoint contains it.
    """
    G = train.global_batch_size
    steps_per_epoch = num_images // G
    total = train.epochs * steps_per_epoch
    network = shape_of_training(model, loss)
    sources = {source for source in (data.train, data.test) if source}
    return Forecast(
        num_devices=world_size,
        device_type=device_type,
        global_batch_size=G,
        batch_size_per_device=G // world_size,
        num_views=data.num_views,
        precision=assumed_precision(train.precision, device_type),
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        num_steps=min(total, train.max_steps or total),
        peak_learning_rate=peak_learning_rate(optim, G),
        layer_rates=tuple(describe_scales(network, optim)),
        num_parameters=sum(p.numel() for p in network.parameters()),
        memory=device_memory(
            data=data,
            model=model,
            loss=loss,
            optim=optim,
            train=train,
            world_size=world_size,
            device_type=device_type,
        ),
        loader_bytes=loader_bytes(data, G // world_size),
        checkpoint_bytes=checkpoint_bytes(network, optim, settings),
        data_bytes=sum(kind_of(data).size_on_disk(source) for source in sources),
        collectives=tuple(
            collectives(model=model, loss=loss, train=train, world_size=world_size, num_views=data.num_views)
        ),
        speed=speed,
    )
