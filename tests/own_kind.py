"""A kind of one's own, points in space, and an encoder for it; then the training of a file, or a command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from simclr_dist import cli, kinds, train
from simclr_dist.config import ModelConfig
from simclr_dist.data.randomness import uniform
from simclr_dist.errors import DataError
from simclr_dist.kinds.arrays import ArrayKind, Rows
from simclr_dist.network import encoders


class Points(ArrayKind):
    noun = "point"

    def open(self, source: str) -> Rows:
        try:
            with np.load(source) as found:
                return Rows(found["points"].astype(np.float32), found["classes"])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{source}: no file of points: {error}") from None

    def draw_views(self, values: NDArray, view_keys: NDArray[np.uint64]) -> NDArray:
        noise = uniform(view_keys[..., None], 1000 + np.arange(values.shape[1])) - 0.5
        return values + float(self.data.options.get("noise", 1.0)) * noise


def perceptron(config: ModelConfig) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16)), 16


kinds.register("points", Points)
encoders.register("of_points", perceptron)


def write_points(path: Path, n: int, seed: int) -> Path:
    """n points of four clusters in twelve dimensions."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(0, 1, (4, 12))
    labels = generator.integers(0, 4, n)
    points = centres[labels] + generator.normal(0, 0.7, (n, 12))
    np.savez(path, points=points.astype(np.float32), classes=np.array([f"cluster{label}" for label in labels]))
    return path


if __name__ == "__main__":
    (train if sys.argv[1].endswith(".yaml") else cli).main()
