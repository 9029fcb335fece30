"""How a training scales, on paper: parts of a step measured here, a model fitted to them, projections to 1,024 GPUs.

    python -m benchmarks.scaling                      some minutes on 2 cores: JSON, tables, plots of docs/scaling.md
    python -m benchmarks.scaling --from FILE.json     tables and plots again, without measuring

Measured on this machine (gloo, 1, 2 and 4 ranks): CPU seconds of augmentation, encoder, head and of three designs of
the loss; wall seconds of collectives; the bytes they send, counted; whole steps, to hold the fitted model to.
Projected: the same model with the figures of devices and networks below, each with its source. docs/scaling.md says
what to believe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling_measure as measure
from benchmarks.loss_designs import FULL, GATHERED, OURS, OURS_ON_GPU, Design
from benchmarks.scaling_model import (
    Device,
    Network,
    TimedCollective,
    TimedLoss,
    collectives_of,
    fit_line,
    fit_loss,
    fit_network,
    step,
)
from simclr_dist.config import Config, load_config
from simclr_dist.loss.memory import workspace_bytes
from simclr_dist.plan.memory import device_memory
from simclr_dist.run.provenance import git_id

ROOT = Path(__file__).resolve().parent.parent
MEASURED_CONFIG = ROOT / "configs" / "cifar10_demo.yaml"
PROJECTED_CONFIG = ROOT / "configs" / "imagenet_resnet50_100ep.yaml"
WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES = 128  # of a device where the batch grows with the devices
STRONG_BATCH = 4096

# ResNet-50 in mixed precision: 2,470 images/s on one A100 80 GB (NVIDIA/DeepLearningExamples, resnet50v1.5, README),
# half for two views. H100: vision networks about twice an A100
# (lambdalabs.com/blog/nvidia-h100-gpu-deep-learning-performance-analysis). Memory bandwidth and TF32 rate: NVIDIA's
# data sheets; a product as exact as float32 takes three of TF32, at half the rate of the sheet (assumed). Assumed by
# us: 10 ms of launches a step, 40 us of augmentation an image and 0.3 ms of launches of the loss (docs/gpu.md).
A100 = Device("A100", 10e-3, 2 / 2470, 0.0, 40e-6, 0.3e-3, 156e12 / 3 / 2, 2.0e12, 80 * 10**9)
H100 = Device("H100", 10e-3, 1 / 2470, 0.0, 20e-6, 0.3e-3, 494e12 / 3 / 2, 3.35e12, 80 * 10**9)

# Hops and starts: NCCL's table for its LL protocol (NVIDIA/nccl, src/graph/tuning.cc: 3.6 us to start; ring 0.47 us on
# NVLink, x 1.8 among nodes, 2.7 us on the network; tree 5 us). TCP's 25 us a hop is assumed. Bandwidths: 8 adapters of
# 200 or 400 Gbit/s a node, or one of 100 or 25; NVLink 300 and 450 GB/s each way; of all of them 80 %, assumed.
_USE = 0.8


def _network(name: str, nvlink: float, node: float, hop_s: float, tree_hop_s: float) -> Network:
    return Network(name, 8, 3.6e-6, 1.8 * 0.47e-6, _USE * nvlink, hop_s, _USE * node, tree_hop_s)


SYSTEMS: tuple[tuple[Device, Network], ...] = (
    (H100, _network("NVLink + 8 NDR", 450e9, 400e9, 2.7e-6, 5e-6)),
    (A100, _network("NVLink + 8 HDR", 300e9, 200e9, 2.7e-6, 5e-6)),
    (A100, _network("NVLink + 100 GbE", 300e9, 12.5e9, 25e-6, 25e-6)),
    (A100, _network("NVLink + 25 GbE", 300e9, 3.125e9, 25e-6, 25e-6)),
)
DESIGNS = (OURS_ON_GPU, GATHERED, FULL)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and fitting


def measured_config(W: int, images: int) -> Config:
    overrides = [f"train.global_batch_size={images * W}", "data.train=synthetic", "data.test=null"]
    overrides += ["evaluation.knn_every_epochs=null"]
    return load_config(MEASURED_CONFIG, overrides, world_size=W)


def measure_here(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_id(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": f"{os.cpu_count()} CPUs, {cpu_name()}",
        "load_average": os.getloadavg(),
        "config": MEASURED_CONFIG.name,
        "parts": {},
        "copies_of_logits": {d.name: measure.copies_of_logits(d.name, 2048) for d in (GATHERED, FULL)},
        "collectives": [],
        "losses": [],
        "steps": [],
    }
    for W in args.ranks:
        config = measured_config(W, args.images[0])
        found["parts"][W] = measure.on_ranks(W, measure.parts, config, args.images, args.repetitions)[0]
        if W > 1:
            by_rank = measure.on_ranks(W, measure.collective_seconds, args.bytes, 10 * args.repetitions)
            for same in zip(*by_rank, strict=True):  # a collective has ended when its last rank has
                found["collectives"].append((*same[0][:2], W, max(seconds for *_, seconds in same)))
        for name in measure.DESIGNS:
            rows = [n for n in args.rows if n * W <= args.most_rows]
            by_rank = measure.on_ranks(W, measure.loss_on_ranks, name, rows, args.repetitions)
            for n in rows:
                seconds = max(answer[n][0] for answer in by_rank)
                found["losses"].append((name, n, W, seconds, by_rank[0][n][1]))
        for B in args.images:
            by_rank = measure.on_ranks(W, measure.whole_step, measured_config(W, B), args.repetitions)
            wall, cpu = (max(answer[i] for answer in by_rank) for i in range(2))
            found["steps"].append((W, B, wall, cpu, by_rank[0][2]))
    return found


def fitted(found: dict[str, Any]) -> tuple[dict[int, Device], Network]:
    """One device for each number of ranks that share this machine, and the network between them."""
    losses = [TimedLoss(measure.DESIGNS[d], n, W, measure.K, s) for d, n, W, s, _ in found["losses"]]
    loss = fit_loss(losses)
    devices = {}
    for W, parts in found["parts"].items():
        points = {name: {int(B): s for B, s in of_part.items()} for name, of_part in parts.items()}
        augment, encoder, head = (fit_line(points[name]) for name in ("augment", "encoder", "head"))
        name = f"{found['machine']}, {W} at once"
        devices[int(W)] = Device(name, encoder[0] + head[0], encoder[1] + head[1], *augment, *loss)
    return devices, fit_network([TimedCollective(*row) for row in found["collectives"]], "gloo")


def compare(found: dict[str, Any], devices: dict[int, Device], network: Network) -> dict[str, list[tuple]]:
    """Rows of (what, measured, model), seconds or bytes, by kind."""
    rows: dict[str, list[tuple]] = {"collectives": [], "losses": [], "steps, CPU": [], "steps, wall": [], "bytes": []}
    for operation, num_bytes, W, seconds in found["collectives"]:
        timed = TimedCollective(operation, num_bytes, W, seconds)
        rows["collectives"].append(((operation, num_bytes, W), seconds, network.seconds(timed.as_collective(), W)))
    for name, n, W, seconds, sent in found["losses"]:
        design = measure.DESIGNS[name]
        rows["losses"].append(((name, n, W), seconds, devices[W].loss(design, n, W, measure.K)))
        predicted = sum(c.sent(W) for c in design.collectives(n, W, measure.K))
        rows["bytes"].append(((f"loss: {name}", n, W), sent, predicted))
    for W, B, wall, cpu, sent in found["steps"]:
        config = measured_config(W, B)
        predicted = step(config, W, devices[W], network, OURS)
        compute = sum(predicted.parts[part] for part in ("augment", "encoder and head", "loss: compute"))
        taking_turns = max(1.0, W / found["cpus"])  # more ranks than cores
        rows["steps, CPU"].append(((W, B), cpu, compute))
        rows["steps, wall"].append(((W, B), wall, predicted.seconds + (taking_turns - 1) * compute))
        rows["bytes"].append((("step", B, W), sent, sum(c.sent(W) for c in collectives_of(config, W))))
    return rows


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# Projecting


def projected_config(W: int, G: int) -> Config:
    overrides = [f"train.global_batch_size={G}"]
    return load_config(PROJECTED_CONFIG, overrides, world_size=W, check_data=False)


def loss_bytes(design: Design, config: Config, W: int, copies: dict[str, float]) -> float:
    """Bytes that the loss holds on a GPU, above its input."""
    n, K = 2 * config.train.global_batch_size // W, config.model.head_out_dim
    if design is OURS_ON_GPU:
        return workspace_bytes(n, K, world_size=W, device_type="cuda")
    return design.held_bytes(n, W, K, copies[design.name])


def project(copies: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """By table: rows of plain values."""
    tables: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": [], "loss": []}
    config = projected_config(8, 8 * IMAGES)
    memory = device_memory(
        data=config.data,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        world_size=8,
        device_type="cuda",
    )
    without_loss = memory.total - memory.loss
    for W in WORLD_SIZES:
        weak, strong = projected_config(W, W * IMAGES), projected_config(W, STRONG_BATCH)
        for device, network in SYSTEMS:
            system = f"{device.name}, {network.name}"
            one = step(projected_config(1, IMAGES), 1, device, network)
            for table, config in (("weak", weak), ("strong", strong)):
                found = step(config, W, device, network)
                row = {"devices": W, "global_batch_size": found.G, "system": system} | {
                    f"{name}, ms": 1e3 * seconds for name, seconds in found.parts.items()
                }
                row["images_per_s"] = found.images_per_s
                if table == "weak":
                    row["efficiency"] = found.images_per_s / (W * one.images_per_s)
                tables[table].append(row)
            for design in DESIGNS:
                found = step(weak, W, device, network, design)
                held = loss_bytes(design, weak, W, copies)
                tables["loss"].append(
                    {
                        "devices": W,
                        "rows": 2 * found.G,
                        "system": system,
                        "design": design.name,
                        "loss_ms": 1e3 * found.loss_s,
                        "images_per_s": found.images_per_s,
                        "loss_gib": held / 2**30,
                        "device_gib": (without_loss + held) / 2**30,
                        "fits": without_loss + held < 0.9 * (device.memory_bytes or 0),
                    }
                )
    return tables


# ---------------------------------------------------------------------------------------------------------------------


def worst(rows: list[tuple]) -> tuple[float, float]:
    """Median and largest relative error of the model."""
    errors = sorted(abs(model / measured - 1) for _, measured, model in rows if measured)
    return (errors[len(errors) // 2], errors[-1]) if errors else (0.0, 0.0)


def report(found: dict[str, Any], devices: dict[int, Device], network: Network, rows: dict, tables: dict) -> str:
    alone = devices[1]
    lines = [
        f"# Scaling, {found['date'][:10]}",
        "",
        f"Measured on {found['machine']}, load {found['load_average'][0]:.1f}, torch {found['torch']}, commit "
        f"{found['commit']}; `{found['config']}`.",
        "",
        "## Fitted here (measured)",
        "",
        "| | |",
        "|---|---:|",
        *(
            f"| encoder and head, {W} ranks, ms of CPU | {1e3 * d.step_s:.1f} + {1e3 * d.image_s:.3f} an image |"
            for W, d in devices.items()
        ),
        f"| augment, ms of CPU | {1e3 * alone.augment_step_s:.2f} + {1e3 * alone.augment_image_s:.4f} an image |",
        f"| loss | {1e3 * alone.loss_s:.2f} ms + FLOP / {alone.loss_flops_per_s / 1e9:.0f} GFLOP/s + bytes / "
        f"{alone.memory_bytes_per_s / 1e9:.1f} GB/s |",
        f"| gloo | {1e6 * network.start_s:.0f} us + {1e6 * network.local_hop_s:.0f} us a hop + bytes / "
        f"{network.local_bytes_per_s / 1e9:.2f} GB/s |",
        f"| copies of the logits held | {', '.join(f'{d} {c:.2f}' for d, c in found['copies_of_logits'].items())} |",
        "",
        "| the model's relative error | median | largest | points |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {worst(part)[0]:.1%} | {worst(part)[1]:.1%} | {sum(bool(m) for _, m, _ in part)} |"
            for name, part in rows.items()
        ),
        "",
        "| whole step: ranks | images a rank | CPU of a rank, measured, ms | model | wall, measured, ms | model |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {W} | {B} | {1e3 * cpu:.1f} | {1e3 * cpu_model:.1f} | {1e3 * wall:.1f} | {1e3 * wall_model:.1f} |"
            for ((W, B), cpu, cpu_model), (_, wall, wall_model) in zip(
                rows["steps, CPU"], rows["steps, wall"], strict=True
            )
        ),
    ]
    for name, title in (("weak", f"{IMAGES} images a device"), ("strong", f"global batch {STRONG_BATCH:,}")):
        lines += ["", f"## {title} (projected)", "", *markdown(tables[name])]
    few = [row for row in tables["loss"] if row["devices"] in (8, 64, 256, 1024)]
    lines += ["", f"## Three designs of the loss, {IMAGES} images a device (projected)", "", *markdown(few)]
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    names = list(rows[0])
    numbers = ["---" if isinstance(rows[0][name], str) else "---:" for name in names]
    return [
        f"| {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|{'|'.join(numbers)}|",
        *(f"| {' | '.join(cell(row[name]) for name in names)} |" for row in rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="measurements of before")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64, 128], help="of a rank")
    parser.add_argument("--rows", type=int, nargs="+", default=[1536, 2048, 3072], help="n, of a rank")
    parser.add_argument("--most-rows", type=int, default=6144, help="N: full logits of 4 ranks then need 3 GB")
    parser.add_argument("--bytes", type=int, nargs="+", default=[2**i for i in (8, 12, 16, 18, 20, 22)])
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    found = json.loads(args.source.read_text()) if args.source else measure_here(args)
    devices, network = fitted(found)
    rows = compare(found, devices, network)
    tables = project(found["copies_of_logits"])
    text = report(found, devices, network, rows, tables)
    args.out.mkdir(exist_ok=True)
    path = args.out / f"scaling_{found['date'][:10]}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)
    from benchmarks import scaling_plots  # matplotlib: pip install matplotlib

    drawn = [
        scaling_plots.measured(rows, args.plots / "scaling_measured.png"),
        scaling_plots.projected(tables, A100, args.plots / "scaling_projected.png"),
    ]
    print(f"written: {path}, {path.with_suffix('.md')}, {', '.join(map(str, drawn))}")


if __name__ == "__main__":
    main()
