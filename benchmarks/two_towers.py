"""Two towers: time and memory of pairs across two views, against logits that are stored, as in open_clip's ClipLoss.

    python -m benchmarks.two_towers                              8,192 and 16,384 rows; ours alone at 65,536
    python -m benchmarks.two_towers --rows 2048 --ours-alone

N rows are N/2 pairs. The two contenders compute the same number: both are checked against each other first. That of
open_clip is written here from its description: a matrix of logits for each direction, cross-entropy of both. Contenders
take turns; times are CPU seconds of a forward and backward, one thread unless --threads says more, the least of the
repetitions. Memory is the peak above the inputs, each in a process of its own. Writes a table and a JSON to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss import CLOCKS, PeakMemory, by_clock, in_own_process, random_rows
from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.loss import NTXentLoss
from simclr_dist.loss.memory import workspace_bytes

TEMPERATURE, WIDTH = 0.1, 128  # WIDTH of random_rows
FORECAST = 65536  # rows; CLIP was trained with 32,768 pairs


def ours(z: Tensor) -> Tensor:
    return NTXentLoss(TEMPERATURE, pairs="across")(z)


def stored_logits(z: Tensor) -> Tensor:
    """A matrix [G, G] for each direction."""
    a, b = F.normalize(z, dim=1).chunk(2)
    target = torch.arange(len(a))
    of_a, of_b = a @ b.T / TEMPERATURE, b @ a.T / TEMPERATURE
    return (F.cross_entropy(of_a, target) + F.cross_entropy(of_b, target)) / 2


CONTENDERS: dict[str, Callable[[Tensor], Tensor]] = {"ours": ours, "stored logits": stored_logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--ours-alone", type=int, nargs="*", default=[FORECAST], help="rows: our memory only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    when = circumstances(vars(args))
    check()
    rows = [
        {"rows": n, "cpu_s": times(n, args.repetitions), "peak_mib": {name: peak(name, n, args) for name in CONTENDERS}}
        for n in args.rows
    ]
    rows += [{"rows": n, "cpu_s": {}, "peak_mib": {"ours": peak("ours", n, args)}} for n in args.ours_alone]
    rows.append({"rows": FORECAST, "cpu_s": {}, "peak_mib": forecast(rows), "computed": True})
    lines = [
        f"Two towers, K = {WIDTH}, float32, {args.threads} thread(s) of {when['device']}, commit {when['commit']}.",
        "",
        "| N | pairs | ours: CPU s | stored logits: CPU s | ours: MiB | stored logits: MiB |",
        "|---:|---:|---:|---:|---:|---:|",
        *(line(row) for row in rows),
    ]
    print("\n".join(lines))
    write("two_towers", args.out, {**when, "rows": rows}, lines)


def check() -> None:
    """That both compute the same value and gradient."""
    found = []
    for loss in CONTENDERS.values():
        z = random_rows(600, "cpu", "float32")
        value = loss(z)
        value.backward()
        assert z.grad is not None
        found.append((value.detach(), z.grad))
    for x, y in zip(*found, strict=True):
        if (x - y).norm() > 1e-5 * y.norm():
            raise SystemExit("the contenders do not compute the same: nothing is measured")


def times(rows: int, repetitions: int) -> dict[str, float]:
    z, step_s = random_rows(rows, "cpu", "float32"), by_clock(CLOCKS["cpu"])
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repetitions):
        for name, loss in CONTENDERS.items():
            found[name].append(step_s(lambda x, loss=loss: loss(x).backward(), z))
    return {name: min(seconds) for name, seconds in found.items()}


def peak(name: str, rows: int, args: argparse.Namespace) -> float:
    return float(in_own_process(peak_mib, name, rows, args.threads))


def peak_mib(name: str, rows: int, threads: int) -> float:
    torch.set_num_threads(threads)
    loss = CONTENDERS[name]
    loss(random_rows(256, "cpu", "float32")).backward()  # loads libraries, which must not count
    z = random_rows(rows, "cpu", "float32")
    with PeakMemory(z.device) as memory:
        loss(z).backward()
    return memory.mib


def forecast(rows: list[dict[str, Any]]) -> dict[str, float]:
    """At FORECAST rows: ours by the formula of `simclr-dist plan`, stored logits by as many matrices as measured."""
    largest = max((row for row in rows if "stored logits" in row["peak_mib"]), key=lambda row: row["rows"])
    by_pairs_squared = largest["peak_mib"]["stored logits"] * (FORECAST / largest["rows"]) ** 2
    formula = workspace_bytes(FORECAST, WIDTH, world_size=1, device_type="cpu", pairs="across")
    return {"ours": formula / 2**20, "stored logits": by_pairs_squared}


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['rows']:,}" + (", computed" if "computed" in row else ""), f"{row['rows'] // 2:,}"]
    cells += [f"{row['cpu_s'][name]:.2f}" if name in row["cpu_s"] else "" for name in CONTENDERS]
    cells += [f"{row['peak_mib'][name]:,.0f}" if name in row["peak_mib"] else "" for name in CONTENDERS]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
