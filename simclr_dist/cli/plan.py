"""`simclr-dist plan`: what a training will need, before it starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from simclr_dist.argument_types import positive_float, positive_int
from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.config import IMAGES, load_config
from simclr_dist.errors import ConfigError
from simclr_dist.source_text import lines, missing

if TYPE_CHECKING:
    from simclr_dist.plan.forecast import Forecast
    from simclr_dist.plan.measure import MeasuredStep

EPILOG = """\
examples:
  simclr-dist plan configs/imagenet_resnet50_100ep.yaml --gpus 32 --images 1281167 --images-per-s 2500
  simclr-dist plan configs/cifar10_resnet18_100ep.yaml --measure
"""


def register(commands: Commands) -> None:
    plan = add_command(
        commands,
        "plan",
        _run,
        help="memory, hours, traffic and bottleneck of a training, before it starts",
        epilog=EPILOG,
        description="Predicts what a training will need. Nothing is trained, and no GPU is used but by --measure.",
    )
    plan.add_argument("config", metavar="CONFIG")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--gpus", type=positive_int, help="devices in all (default: this machine's, or one CPU process)")
    plan.add_argument("--images", type=positive_int, help="images to train on, where the data is not here")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument(
        "--images-per-s", type=positive_float, help="images a second that one device trains on, for the hours"
    )
    speed.add_argument("--measure", action="store_true", help="measure that here, by a few steps and batches")
    plan.add_argument("--json", action="store_true", help="for programs")


def _run(args: argparse.Namespace) -> int:
    import psutil  # type: ignore[import-untyped]

    def tell(what: str) -> None:
        """A sign of life, for a person who waits."""
        if not args.json:
            print(f"{what} …", file=sys.stderr, flush=True)

    tell("importing torch")
    import torch

    from simclr_dist.data.loading.fetch_ahead import sentence_of_store
    from simclr_dist.data.loading.view_loader import order_of
    from simclr_dist.data.mix import MixedOrder
    from simclr_dist.kinds import kind_of
    from simclr_dist.plan.forecast import Speed, forecast
    from simclr_dist.plan.measure import measure_loader, measure_step
    from simclr_dist.training.network_facts import network_facts
    from simclr_dist.training.preflight import settled

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world_size = args.gpus or here or 1
    device_type = "cuda" if args.gpus or here else "cpu"
    config = settled(load_config(args.config, args.overrides, world_size=world_size, check_data=False))
    data, train, kind = config.data, config.train, kind_of(config.data)
    data_is_here = data.kind != IMAGES or data.train == "synthetic" or missing(data.train) is None
    if not args.images and not data_is_here:
        raise ConfigError([f"data.train: {data.train} is not here; say how many {kind.noun}s it holds with --images"])
    num_images = args.images or kind.describe(data.train).num_samples
    if num_images < train.global_batch_size:
        raise ConfigError(
            [f"train.global_batch_size: {train.global_batch_size} is more than the {num_images} {kind.noun}s"]
        )
    network_facts(config)  # refuses what the network cannot take
    speed, step = Speed(args.images_per_s), None
    if args.measure:
        images = train.global_batch_size // world_size
        tell(f"measuring steps of {images} {kind.noun}s")
        step = measure_step(
            augment=config.augment,
            model=config.model,
            loss=config.loss,
            optim=config.optim,
            train=train,
            kind=kind,
            images=images,
            device=torch.device("cuda" if here else "cpu"),
        )
        local_size = max(1, min(here, world_size))
        if data_is_here:
            tell("measuring the loader")
        loader = (
            measure_loader(data, config.augment, images=min(images, 256), local_size=local_size)
            if data_is_here
            else None
        )
        speed = Speed(step.images_per_s, loader)
    tell("counting memory, traffic and operations of the network")
    found = forecast(
        data=data,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=train,
        settings=config.model_dump(mode="json"),
        num_images=num_images,
        world_size=world_size,
        device_type=device_type,
        speed=speed,
    )
    device_bytes = torch.cuda.get_device_properties(0).total_memory if here else None
    bottleneck = found.bottleneck(device_bytes, psutil.virtual_memory().total)
    if args.json:
        values = asdict(found) | {
            "memory_total": found.memory.total,
            "sent_bytes_per_step": found.sent_bytes_per_step,
            "seconds_per_step": found.seconds_per_step,
            "hours": found.hours,
            "bottleneck": bottleneck,
            "measured_step": asdict(step) if step else None,
        }
        print(json.dumps(values, indent=1))
    else:
        rows = [*render(found, bottleneck, step, kind.noun)]
        if data.kind == IMAGES and data_is_here and (data.mix is not None or not args.images):
            order = order_of(data, num_images, train.global_batch_size, config.seed)
            if isinstance(order, MixedOrder):
                rows += [("mix", line) for line in order.sentences(lines(data.train), found.num_steps)]
            if store := sentence_of_store(data, order):
                rows.append(("store", store))
        if (size := config.evaluation_data.image_size) != data.image_size:
            rows.append(("evaluations", f"see images of {size} px; views are of {data.image_size} px"))
        print("\n".join(f"{key:15} {text}".rstrip() for key, text in rows))
    return 0


def render(
    found: Forecast, bottleneck: str, step: MeasuredStep | None, noun: str = "image"
) -> Iterator[tuple[str, str]]:
    """Rows of a name and a text. noun: what a sample is called."""
    memory, speed = found.memory, found.speed
    yield (
        "devices",
        f"{found.num_devices} x {found.device_type}, {found.batch_size_per_device} {noun}s in {found.num_views} views "
        "each a step",
    )
    yield "precision", found.precision
    yield "global batch", f"{found.global_batch_size:,}, peak learning rate {found.peak_learning_rate:.4g}"
    for number, rates in enumerate(found.layer_rates):
        yield "" if number else "rates by layer", rates
    yield "steps", f"{found.num_steps:,} ({found.steps_per_epoch:,} an epoch of {found.num_images:,} {noun}s)"
    yield "parameters", f"{found.num_parameters:,}"
    parts = ", ".join(f"{name} {size_of(value)}" for name, value in vars(memory).items())
    yield "device memory", f"{size_of(memory.total)}: {parts}"
    if step and step.peak_bytes is not None:
        yield "", f"a step of {step.images} {noun}s was measured to hold {size_of(step.peak_bytes)}"
    yield "host memory", f"{size_of(found.loader_bytes)} of batches decoded ahead, a process"
    yield (
        "page cache",
        f"{size_of(found.data_bytes)} of data should fit into memory for full speed" if found.data_bytes else "0",
    )
    yield "checkpoint", size_of(found.checkpoint_bytes)
    if found.num_devices > 1:
        yield "sent a step", f"{size_of(found.sent_bytes_per_step)} by each device:"
        for name, num_bytes in traffic_by_part(found).items():
            yield "", f"  {name}: {size_of(num_bytes)}"
    if speed.device:
        how = f" (measured here, {step.images} {noun}s a step)" if step else " (given)"
        yield "speed", f"{speed.device:,.0f} {noun}s/s a device{how}"
    if speed.loader:
        made = "decoded" if noun == "image" else "read"
        yield "", f"{speed.loader:,.0f} {noun}s/s {made} by a process of this machine (measured)"
    if found.hours is not None:
        yield "time", hours(found.hours)
    yield "bottleneck", bottleneck


def traffic_by_part(found: Forecast) -> dict[str, float]:
    """Bytes that a rank sends in a step: for the loss, the gradients, BatchNorm, requests."""
    parts: dict[str, float] = {}
    for collective in found.collectives:
        part = collective.what.partition(" ")[0].rstrip(":")
        parts[part] = parts.get(part, 0.0) + collective.sent(found.num_devices)
    return parts


def size_of(num_bytes: float) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 1 else f"{60 * value:.1f} min"
