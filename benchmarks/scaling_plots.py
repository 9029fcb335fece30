"""The two figures of docs/scaling.md. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.scaling_model import Device


def measured(rows: dict[str, list[tuple]], path: Path) -> Path:
    """Points are measured, lines are the fitted model."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for i, (operation, W) in enumerate(sorted({(key[0], key[2]) for key, *_ in rows["collectives"]})):
        points = [(key[1], m, p) for key, m, p in rows["collectives"] if (key[0], key[2]) == (operation, W)]
        size, seconds, model = zip(*points, strict=True)
        left.loglog(size, [1e3 * s for s in seconds], "o", color=f"C{i}", label=f"{operation}, {W} ranks: measured")
        left.loglog(size, [1e3 * s for s in model], "-", color=f"C{i}", lw=1)
    left.set(title="gloo on one machine", xlabel="bytes that a rank brings", ylabel="time [ms]")
    for i, name in enumerate(dict.fromkeys(key[0] for key, *_ in rows["losses"])):
        points = sorted((key[1] * key[2], key[2], m, p) for key, m, p in rows["losses"] if key[0] == name)
        for W, marker in ((1, "o"), (2, "s"), (4, "^")):
            of_world = [(N, m, p) for N, world, m, p in points if world == W]
            if of_world:
                N, seconds, model = zip(*of_world, strict=True)
                label = f"{name}: measured" if W == 1 else None
                middle.loglog(N, seconds, marker, color=f"C{i}", label=label)
                middle.loglog(N, model, "-", color=f"C{i}", lw=1)
    middle.set(
        title="the loss, forward and backward\n(circle 1, square 2, triangle 4 ranks)",
        xlabel="N, rows of all ranks",
        ylabel="CPU time of a rank [s]",
    )
    for i, W in enumerate(sorted({key[0] for key, *_ in rows["steps, CPU"]})):
        B, seconds, model = zip(*((key[1], m, p) for key, m, p in rows["steps, CPU"] if key[0] == W), strict=True)
        label = f"{W} rank{'s' if W > 1 else ''}: measured"
        right.plot(B, [1e3 * s for s in seconds], "o", color=f"C{i}", label=label)
        right.plot(B, [1e3 * s for s in model], "-", color=f"C{i}", lw=1)
    right.set(title="a whole step", xlabel="images of a rank", ylabel="CPU time of a rank [ms]", ylim=(0, None))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle("MEASURED (points) and the fitted model (lines)")
    return _save(figure, path)


def projected(tables: dict[str, list[dict[str, Any]]], device: Device, path: Path) -> Path:
    figure, ((weak, strong), (time, memory)) = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
    systems = list(dict.fromkeys(row["system"] for row in tables["weak"]))
    for axes, table, title in (
        (weak, "weak", "128 images a GPU: efficiency"),
        (strong, "strong", "global batch 4,096: throughput"),
    ):
        for system in systems:
            of_system = [row for row in tables[table] if row["system"] == system]
            y = [row["efficiency"] if axes is weak else row["images_per_s"] for row in of_system]
            axes.plot([row["devices"] for row in of_system], y, "o-", ms=3, label=system)
        axes.set(title=title, xlabel="GPUs")
    weak.set(ylabel="images/s over those of as many single GPUs", ylim=(0, 1.05))
    strong.set(ylabel="images/s", yscale="log")
    system = next(name for name in systems if "HDR" in name)
    for design in dict.fromkeys(row["design"] for row in tables["loss"]):
        of_design = [row for row in tables["loss"] if (row["design"], row["system"]) == (design, system)]
        devices = [row["devices"] for row in of_design]
        time.loglog(devices, [row["loss_ms"] for row in of_design], "o-", ms=3, label=design)
        memory.loglog(devices, [row["loss_gib"] for row in of_design], "o-", ms=3, label=design)
    time.set(title=f"the loss: time a step ({system})", xlabel="GPUs, 128 images each", ylabel="time [ms]")
    memory.set(title="the loss: memory of a GPU", xlabel="GPUs, 128 images each", ylabel="memory [GiB]")
    if device.memory_bytes:
        memory.axhline(device.memory_bytes / 2**30, color="k", ls="--", lw=1, label=f"all of an {device.name}, 80 GB")
    for axes in (weak, strong, time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 16, 32, 64, 128, 256, 512, 1024], labels=[8, 16, 32, 64, 128, 256, 512, "1,024"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("PROJECTED, not measured: ResNet-50, 224 px, global BatchNorm")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path
