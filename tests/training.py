"""Starts trainings as users do, in processes of their own, and reads what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_dist.data.beton.prepare import prepare
from tests.conftest import REPOSITORY
from tests.fork_server import ModuleProcess

TINY = (
    "data.test=null",
    "evaluation.knn_every_epochs=null",
    "train.epochs=3",
    "train.global_batch_size=64",
    "model.width=16",
    "model.head_hidden_dim=128",
    "optim.base_lr=0.001",
    "monitor.log_every_steps=1",
)
STEPS = 24  # of TINY: 512 images, 8 steps an epoch


def write_images(path: Path) -> Path:
    """A .beton file of coloured noise. Noise, because flat areas make ties at ReLU's kink: there two correct runs that
    round differently part ways for good, and no curve could be compared with another.
    """
    generator = np.random.default_rng(0)
    folder = path.with_suffix("")
    for i in range(512):
        pixels = generator.normal(generator.uniform(60, 200, 3), 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        (folder / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class{i % 4}" / f"{i}.png")
    prepare(folder, path, num_workers=1)
    return path


class Training:
    """One start of a run with `world_size` processes on this machine; `fresh`: no forks, see fork_server.py."""

    def __init__(
        self,
        images: Path,
        runs_dir: Path,
        name: str,
        *overrides: str,
        world_size: int = 1,
        module: str = "simclr_dist.train",
        fresh: bool = False,
        config: Path = REPOSITORY / "configs" / "smoke.yaml",
        **env: str,
    ) -> None:
        self.run_dir = runs_dir / name
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        arguments = [str(config), *TINY, f"data.train={images}"]
        arguments += [f"name={name}", f"runs_dir={runs_dir}", *overrides]
        shared = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            **env,
        }
        if world_size == 1:
            del shared["WORLD_SIZE"]
        self.ranks = [
            ModuleProcess(
                module,
                arguments,
                {**shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})},
                fresh=fresh,
            )
            for rank in range(world_size)
        ]
        self.output: list[str] = []

    def wait(self, timeout_s: float = 200) -> list[int]:
        """Exit codes of the ranks; kills them all if they take longer."""
        deadline = time.monotonic() + timeout_s
        try:
            codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in self.ranks]
        finally:
            self.kill()
        self.output = [rank.output() for rank in self.ranks]
        assert None not in codes, self.output
        return codes

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 100) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or any(rank.poll() is not None for rank in self.ranks):
                self.kill()
                raise AssertionError("".join(rank.output() for rank in self.ranks))
            time.sleep(0.02)

    def has_logged(self, step: int) -> bool:
        log = self.run_dir / "log.jsonl"
        return log.exists() and f'"step": {step},' in log.read_text()

    def losses(self) -> list[float]:
        """By step, each step once."""
        lines = [json.loads(line) for line in (self.run_dir / "log.jsonl").read_text().splitlines()]
        found = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        assert [step for step, _ in found] == list(range(1, len(found) + 1))
        return [loss for _, loss in found]

    def status(self) -> dict[str, object]:
        return json.loads((self.run_dir / "status.json").read_text())

    def final_bytes(self) -> dict[str, str]:
        """SHA-256 of the parameters, buffers and optimiser state in the newest checkpoint.

        Digests, because pytest takes minutes to show how two long byte strings differ.
        """
        newest = sorted((self.run_dir / "checkpoints").glob("step_*"))[-1]
        names = ("model.safetensors", "optimizer.safetensors")
        return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in names}
