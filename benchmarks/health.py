"""What the health check costs: a step with a check compared with one without, and its share of the training time.

    python -m benchmarks.health                                       the demo's network on the CPU: a minute
    python -m benchmarks.health --config configs/cifar10_resnet18_100ep.yaml --device cuda

Both steps are the trainer's parts on the same views (forward, loss, backward, update), and take turns, so that a busy
machine slows both alike. The examined one also watches gradients and BatchNorm, works out all figures and writes them
to TensorBoard and log.jsonl, as the trainer does. Its cost is the median of the differences of neighbours; the share is
that of `every` steps with one check among them. Loading is in neither. The result is a table and
benchmarks/results/health_<date>.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config, MonitorConfig, load_config
from simclr_dist.health.check import HealthCheck, RankFacts
from simclr_dist.loss import NTXentLoss
from simclr_dist.monitor.events import Histograms
from simclr_dist.monitor.monitor import Monitor, open_monitor
from simclr_dist.network.precision import assumed_precision, autocast
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.schedule import set_learning_rate
from simclr_dist.parallel.distributed import World

EVERY = MonitorConfig().health_every_steps or 100  # the shipped default
CHECKED = 1


class Steps:
    """One network and one batch of noise; every step is a real update."""

    def __init__(self, config: Config, device: torch.device, monitor: Monitor) -> None:
        torch.manual_seed(0)
        self.device, self.monitor = device, monitor
        self.precision = assumed_precision(config.train.precision, device.type)
        self.model = build_model(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, config.optim)
        set_learning_rate(self.optimizer, 1e-3)
        self.nt_xent = NTXentLoss(config.loss.temperature)
        self.check = HealthCheck(CHECKED, self.model, World())
        G, S = config.train.global_batch_size, config.data.image_size
        self.views = torch.randn(2 * G, 3, S, S, device=device)
        self.ids = torch.arange(G, device=device)

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            h, z = self.model(self.views)
        self.nt_xent(z, self.ids).backward()
        return h.detach(), z.detach()

    def plain(self) -> None:
        self.forward_backward()
        self.optimizer.step()

    def examined(self, step: int) -> None:
        with self.check.record(CHECKED) as recording:
            h, z = self.forward_backward()
        self.optimizer.step()
        assert recording is not None
        found = self.check.examine(recording, h, z, RankFacts(0.0, 0.0))
        self.monitor.log(found.scalars, step=step, samples_seen=step)
        self.monitor.show(Histograms(found.histograms, samples_seen=step))

    def seconds(self, step: int, examined: bool) -> float:
        self._wait()
        start = time.perf_counter()
        if examined:
            self.examined(step)
        else:
            self.plain()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(config: Config, device: torch.device, repetitions: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_monitor(
            Path(folder), MonitorConfig(terminal="quiet"), total_steps=repetitions, first_step=0, samples_seen=0
        ) as monitor,
    ):
        steps = Steps(config, device, monitor)
        plain, differences = [], []
        for step in range(-1, repetitions):  # the first one warms up
            order = (True, False) if step % 2 else (False, True)
            found = {examined: steps.seconds(step + 1, examined) for examined in order}
            if step >= 0:
                plain.append(found[False])
                differences.append(found[True] - found[False])
    step_s, check_s = statistics.median(plain), statistics.median(differences)
    return {
        "step_ms": 1e3 * step_s,
        "check_ms": 1e3 * check_s,
        "check_ms_quartiles": [1e3 * q for q in statistics.quantiles(differences, n=4)[::2]],
        "every": EVERY,
        "share": check_s / (EVERY * step_s + check_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="*", default=["configs/cifar10_demo.yaml"])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[256, 1024], help="images; 1,024 are examined")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report: dict[str, Any] = circumstances(vars(args), device) | {"found": {}}
    lines = [f"{'configuration':32} {'images':>6} {'step, ms':>9} {'check, ms':>9} {f'share at every {EVERY}':>18}"]
    print(lines[0])
    for path in args.config:
        for batch_size in args.batch_sizes:
            settings = [f"train.global_batch_size={batch_size}", "train.micro_batch_size=null"]
            config = load_config(path, settings, check_data=False)
            found = measure(config, device, args.repetitions)
            report["found"][f"{config.name}, {batch_size} images"] = found
            row = f"{config.name:32} {batch_size:6} {found['step_ms']:9.1f} {found['check_ms']:9.1f}"
            lines.append(f"{row} {found['share']:18.2%}")
            print(lines[-1], flush=True)
    write("health", args.out, report, lines)


if __name__ == "__main__":
    main()
