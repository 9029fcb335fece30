"""Where the time of a training step goes, compared with its lower bound: the bare encoder's forward and backward.

    python -m benchmarks.step --device cuda                      step-resnet18: 512 CIFAR images
    python -m benchmarks.step --device cuda --row step-vit-s16   the row that others have published
    python -m benchmarks.step --device cpu --encoder resnet_small --batch-size 32 --precision fp32 --window 2

The step is the trainer's own. Times are of windows of ten steps between two marks, because a training never waits for
the device between two steps: a wait there would show launches that a training hides. Windows of whole steps, of the
bare encoder and of steps with a mark after each part take turns, so that a busy machine slows all alike. Figures are
medians of the windows: by CUDA events on a GPU, by the host's clock elsewhere. Data wait is the share of a run with the
real loader. The rate is the floating-point operations of the bare encoder over the time of the whole step, and as a
share of what a large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from simclr_dist.config import Config, ModelConfig, Precision
from simclr_dist.data import Batch
from simclr_dist.network.encoders import register, remove_class_layer
from simclr_dist.network.precision import assumed_precision, autocast, autocast_dtype
from simclr_dist.network.simclr import build_encoder
from simclr_dist.training.trainer import Trainer


@dataclass(frozen=True)
class Row:
    """What is measured, and what benchmarks/rehearsal.py predicts."""

    encoder: str
    stem: str
    image_size: int
    batch_size: int
    optimizer: str = "lars"


ROWS = {
    "step-resnet18": Row("resnet18", "cifar", 32, 512),
    "step-resnet50": Row("resnet50", "imagenet", 224, 256),
    "step-vit-s16": Row("vit_s_16", "imagenet", 224, 256, "adamw"),  # as stable-pretraining has published it
}


def vit_s_16(config: ModelConfig) -> tuple[nn.Module, int]:
    """ViT-S/16 (Touvron et al. 2021, arXiv:2012.12877) of torchvision's parts; torchvision itself begins with ViT-B."""
    network = VisionTransformer(
        image_size=config.image_size or 224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return network, remove_class_layer(network)


def configuration(row: Row, runs_dir: str, **train: Any) -> Config:
    if row.encoder == "vit_s_16":
        with suppress(ValueError):  # registered before
            register("vit_s_16", vit_s_16)
    return Config.model_validate(
        {
            "name": "step",
            "runs_dir": runs_dir,
            "data": {"train": "synthetic", "image_size": row.image_size},
            "augment": {"preset": f"simclr_{row.stem}"},
            "model": {"encoder": row.encoder, "stem": row.stem},
            "optim": {"optimizer": row.optimizer},
            "train": {"global_batch_size": row.batch_size, "epochs": 100, "precision": "bf16", **train},
        }
    )


class Stopwatch:
    """Time marks in the order of the device's work; on CUDA the host waits only in `laps_ms`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.names: list[str] = []
        self.marks: list[Any] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        self.names.append(name)

    def laps_ms(self) -> dict[str, float]:
        """Milliseconds from each mark to the next, summed by the name of the latter."""
        if self.cuda:
            torch.cuda.synchronize()
        laps: dict[str, float] = {}
        for name, (a, b) in zip(self.names[1:], itertools.pairwise(self.marks), strict=True):
            laps[name] = laps.get(name, 0.0) + (a.elapsed_time(b) if self.cuda else 1e3 * (b - a))
        return laps


def window_ms(work: Callable[[], Any], device: torch.device, window: int) -> float:
    """Milliseconds of one `work`, of `window` of them between two marks."""
    watch = Stopwatch(device)
    for _ in range(window):
        work()
    watch.mark("work")
    return watch.laps_ms()["work"] / window


def window_in_parts_ms(trainer: Trainer, batches: Iterator[Batch], window: int) -> dict[str, float]:
    """Milliseconds of each part of a training step, of `window` of them with a mark after each part."""
    watch = Stopwatch(trainer.parts.device)
    for _ in range(window):
        batch = next(batches)
        views = trainer.augment(batch)
        watch.mark("augment")
        trainer.parts.optimizer.zero_grad(set_to_none=True)
        _, z = trainer.parts.model(views.flatten(0, 1))
        watch.mark("forward")
        loss = trainer.nt_xent(z, batch.sample_ids)
        watch.mark("loss")
        trainer.parts.accelerator.backward(loss)
        watch.mark("backward")
        trainer.parts.optimizer.step()
        watch.mark("optimizer")
    return {name: ms / window for name, ms in watch.laps_ms().items()}


def bare_encoder(config: Config, views: Tensor, encoder: nn.Module | None = None) -> Callable[[], None]:
    """Forward and backward of the encoder alone, on views that are already on the device. encoder: None: a new one."""
    encoder = encoder or build_encoder(config.model)[0].to(views.device)
    if config.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.compile:
        encoder.compile()
    precision = assumed_precision(config.train.precision, views.device.type)

    def run() -> None:
        encoder.zero_grad(set_to_none=True)
        with autocast(views.device, precision):
            h = encoder(views)
        h.float().square().mean().backward()

    return run


def matrix_product_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large product of random matrices: the practical maximum of this machine."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=autocast_dtype(precision)) for _ in range(2))
    times = [window_ms(lambda: a @ b, device, 10) for _ in range(4)][1:]
    return 2 * n**3 / (statistics.median(times) / 1e3)


def wait_share(trainer: Trainer, batches: Any, steps: int) -> float:
    """Share of the time that the training waits for the loader."""
    for batch in itertools.islice(batches, 2):
        trainer.train_step(batch)
    synchronise(trainer.parts.device)
    begin, waited = time.perf_counter(), trainer.parts.loader.wait_s
    for batch in itertools.islice(batches, steps):
        trainer.train_step(batch)
    synchronise(trainer.parts.device)
    return (trainer.parts.loader.wait_s - waited) / (time.perf_counter() - begin)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: Config, windows: int, window: int) -> dict[str, Any]:
    trainer = Trainer(config)
    device = trainer.parts.device
    with trainer.parts.loader, trainer.parts.monitor:
        batches = trainer.parts.loader.batches(0)
        few = list(itertools.islice(batches, 3))  # several, so that no cache holds the input of the next step
        with torch.no_grad():
            views = trainer.augment(few[0]).flatten(0, 1).clone(memory_format=torch.preserve_format)
        floor = bare_encoder(config, views)
        with FlopCounterMode(display=False) as counter:
            bare_encoder(
                config.model_copy(update={"train": config.train.model_copy(update={"compile": False})}), views
            )()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: dict[str, list[float]] = {"step": [], "floor": []}
        parts: list[dict[str, float]] = []
        endless = itertools.cycle(few)
        for i in range(-1, windows):  # the first one warms up
            step_ms = window_ms(lambda: trainer.train_step(next(endless)), device, window)
            floor_ms = window_ms(floor, device, window)
            laps = window_in_parts_ms(trainer, endless, window)
            if i >= 0:
                times["step"].append(step_ms)
                times["floor"].append(floor_ms)
                parts.append(laps)
        waiting = wait_share(trainer, batches, windows * window)
        batches.close()
    step_s, floor_s = (statistics.median(times[name]) / 1e3 for name in ("step", "floor"))
    part_ms = {name: statistics.median(lap[name] for lap in parts) for name in parts[0]}
    ceiling = matrix_product_flops(device, assumed_precision(config.train.precision, device.type))
    return {
        "computed_by": dict(trainer.parts.implementations),
        "images_per_s": config.train.global_batch_size / step_s,
        "step_ms": 1e3 * step_s,
        "floor_ms": 1e3 * floor_s,
        "floor_share": floor_s / step_s,
        "parts_ms": part_ms,
        "augment_share": part_ms["augment"] / sum(part_ms.values()),
        "data_wait_share": waiting,
        "tflops": counter.get_total_flops() / step_s / 1e12,
        "matrix_product_tflops": ceiling / 1e12,
        "share_of_matrix_product": counter.get_total_flops() / step_s / ceiling,
        "memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def table(found: dict[str, Any]) -> str:
    parts = found["parts_ms"]
    whole = sum(parts.values())
    lines = [
        f"{found['images_per_s']:,.0f} images/s: {found['step_ms']:.2f} ms a step; bare encoder "
        f"{found['floor_ms']:.2f} ms, {found['floor_share']:.1%} of it (aim: 92 % or more)",
        "  ".join(f"{name} {ms:.2f} ms ({ms / whole:.1%})" for name, ms in parts.items())
        + "  (aim: augment 5 % or less)",
        f"waiting for data {found['data_wait_share']:.2%} (aim: 1 % or less)",
        "computed by " + ", ".join(f"{name}: {part}" for part, name in found["computed_by"].items()),
        f"{found['tflops']:.2f} TFLOP/s, {found['share_of_matrix_product']:.1%} of a large matrix product",
    ]
    if found["memory_peak_gib"] is not None:
        lines.append(f"memory peak {found['memory_peak_gib']:.2f} GiB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", default="synthetic", help="a .beton file; synthetic images need no decoding")
    parser.add_argument("--row", choices=list(ROWS), default="step-resnet18", help="the following, where not given:")
    for field in fields(Row):
        kind = int if field.type == "int" else str
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    parser.add_argument("--preset", default=None, help="of the augmentation; default: by --stem")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--windows", type=int, default=5, help="how many are timed")
    parser.add_argument("--window", type=int, default=10, help="steps in each")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.cuda.is_available = lambda: False  # the trainer uses a GPU if there is one
    warnings.simplefilter("ignore")
    given = {field.name: value for field in fields(Row) if (value := getattr(args, field.name)) is not None}
    row = replace(ROWS[args.row], **given)
    with tempfile.TemporaryDirectory() as runs:
        config = configuration(
            row, runs, precision=args.precision, compile=args.compile, channels_last=args.channels_last
        )
        data = config.data.model_copy(update={"train": args.data})
        augment = config.augment.model_copy(update={"preset": args.preset or config.augment.preset})
        config = config.model_copy(update={"data": data, "augment": augment})
        found = measure(config, args.windows, args.window)
    print(table(found))
    if args.out:
        settings = {name: str(value) for name, value in (vars(args) | asdict(row)).items() if name != "out"}
        settings["data"] = Path(args.data).name  # where it lay on that machine is nobody's business
        args.out.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
