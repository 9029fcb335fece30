"""How a training scales to 1,024 GPUs, projected from a model: the tables and the plot of docs/scaling.md.

    python -m benchmarks.scaling      some seconds; needs matplotlib

The model is scaling_model.py; the figures of devices and networks are below, each with its source.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.loss_designs import FULL, GATHERED, OURS_ON_GPU, Design
from benchmarks.scaling_model import Device, Network, step
from simclr_dist.config import Config, load_config
from simclr_dist.loss.memory import workspace_bytes
from simclr_dist.plan.memory import device_memory

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "imagenet_resnet50_100ep.yaml"
WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES = 128  # of a device where the batch grows with the devices
STRONG_BATCH = 4096

# ResNet-50 in mixed precision: 2,470 images/s on one A100 80 GB (NVIDIA/DeepLearningExamples, resnet50v1.5, README),
# half for two views. H100: vision networks about twice an A100
# (lambdalabs.com/blog/nvidia-h100-gpu-deep-learning-performance-analysis). Memory bandwidth and TF32 rate: NVIDIA's
# data sheets; a product as exact as float32 takes three of TF32, at half the rate of the sheet (assumed). Assumed by
# us: 10 ms of launches a step, 40 us of augmentation an image and 0.3 ms of launches of the loss (docs/gpu.md).
A100 = Device("A100", (10e-3, 2 / 2470), (0.0, 40e-6), (0.3e-3, 3 * 2 / 156e12, 1 / 2.0e12), 80e9)
H100 = Device("H100", (10e-3, 1 / 2470), (0.0, 20e-6), (0.3e-3, 3 * 2 / 494e12, 1 / 3.35e12), 80e9)


def _network(name: str, nvlink: float, node: float, hop_s: float, tree_hop_s: float) -> Network:
    """Hops and starts: NCCL's table for its LL protocol (NVIDIA/nccl, src/graph/tuning.cc: 3.6 us to start; ring 0.47
    us on NVLink, x 1.8 among nodes, 2.7 us on the network; tree 5 us). TCP's 25 us a hop is assumed. Bandwidths: 8
    adapters of 200 or 400 Gbit/s a node, or one of 100 or 25; NVLink 300 and 450 GB/s each way; 80 % of all, assumed.
    """
    return Network(name, 8, 3.6e-6, 1.8 * 0.47e-6, 0.8 * nvlink, hop_s, 0.8 * node, tree_hop_s)


SYSTEMS: tuple[tuple[Device, Network], ...] = (
    (H100, _network("NVLink + 8 NDR", 450e9, 400e9, 2.7e-6, 5e-6)),
    (A100, _network("NVLink + 8 HDR", 300e9, 200e9, 2.7e-6, 5e-6)),
    (A100, _network("NVLink + 100 GbE", 300e9, 12.5e9, 25e-6, 25e-6)),
    (A100, _network("NVLink + 25 GbE", 300e9, 3.125e9, 25e-6, 25e-6)),
)

# ---------------------------------------------------------------------------------------------------------------------
# Projecting


def projected_config(W: int, G: int) -> Config:
    return load_config(CONFIG, [f"train.global_batch_size={G}"], world_size=W, check_data=False)


def loss_bytes(design: Design, config: Config, W: int) -> float:
    """Bytes that the loss holds on a GPU, above its input."""
    n, K = 2 * config.train.global_batch_size // W, config.model.head_out_dim
    if design is OURS_ON_GPU:
        return workspace_bytes(n, K, world_size=W, device_type="cuda")
    return design.held_bytes(n, W, K)


def project() -> dict[str, list[dict[str, Any]]]:
    """By table: rows of plain values."""
    tables: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": [], "loss": []}
    config = projected_config(8, 8 * IMAGES)
    sections = {name: getattr(config, name) for name in ("data", "model", "loss", "optim", "train")}
    memory = device_memory(**sections, world_size=8, device_type="cuda")
    without_loss = memory.total - memory.loss
    for W in WORLD_SIZES:
        weak, strong = projected_config(W, W * IMAGES), projected_config(W, STRONG_BATCH)
        for device, network in SYSTEMS:
            system = {"devices": W, "system": f"{device.name}, {network.name}"}
            one = step(projected_config(1, IMAGES), 1, device, None)
            for table, config in (("weak", weak), ("strong", strong)):
                found = step(config, W, device, network)
                row = {**system, "global_batch_size": found.G, "images_per_s": found.images_per_s}
                if table == "weak":
                    row["efficiency"] = found.images_per_s / (W * one.images_per_s)
                tables[table].append(row | {f"{name}, ms": 1e3 * s for name, s in found.parts.items()})
            for design in (OURS_ON_GPU, GATHERED, FULL):
                found, held = step(weak, W, device, network, design), loss_bytes(design, weak, W)
                row = {**system, "rows": 2 * found.G, "design": design.name, "images_per_s": found.images_per_s}
                row |= {"loss_ms": 1e3 * found.loss_s, "loss_gib": held / 2**30}
                tables["loss"].append(row | {"fits": without_loss + held < 0.9 * device.memory_bytes})
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def report(tables: dict[str, list[dict[str, Any]]]) -> str:
    titles = {
        "weak": f"{IMAGES} images a device",
        "strong": f"Global batch {STRONG_BATCH:,}",
        "loss": f"Three designs of the loss, {IMAGES} images a device",
    }
    sections = [f"## {title}\n\n{markdown(tables[name])}" for name, title in titles.items()]
    return "\n\n".join(["# Scaling, projected", *sections]) + "\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    rules = ["---" if isinstance(value, str) else "---:" for value in rows[0].values()]
    names = [name.replace("_", " ") for name in rows[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, rules, *(map(cell, row.values()) for row in rows)))


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((weak, strong), (time, memory)) = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
    hdr = [row for row in tables["loss"] if "HDR" in row["system"]]
    for axes, rows, group, y in (
        (weak, tables["weak"], "system", "efficiency"),
        (strong, tables["strong"], "system", "images_per_s"),
        (time, hdr, "design", "loss_ms"),
        (memory, hdr, "design", "loss_gib"),
    ):
        for label in dict.fromkeys(row[group] for row in rows):
            x_and_y = [(row["devices"], row[y]) for row in rows if row[group] == label]
            axes.plot(*zip(*x_and_y, strict=True), "o-", ms=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 16, 32, 64, 128, 256, 512, 1024], labels=[8, 16, 32, 64, 128, 256, 512, "1,024"])
    weak.set(title="128 images a GPU: efficiency", xlabel="GPUs", ylim=(0, 1.05))
    weak.set(ylabel="images/s over those of as many single GPUs")
    strong.set(title="global batch 4,096: throughput", xlabel="GPUs", ylabel="images/s", yscale="log")
    time.set(title=f"the loss: time a step ({hdr[0]['system']})", xlabel="GPUs, 128 images each")
    time.set(ylabel="time [ms]", yscale="log")
    memory.axhline(80e9 / 2**30, color="k", ls="--", lw=1, label="all of an A100, 80 GB")
    memory.set(title="the loss: memory of a GPU", xlabel="GPUs, 128 images each", ylabel="memory [GiB]", yscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("PROJECTED, not measured: ResNet-50, 224 px, global BatchNorm")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    tables = project()
    text = report(tables)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling_projected.md").write_text(text)
    plot(tables, args.plots / "scaling_projected.png")
    print(text)


if __name__ == "__main__":
    main()
