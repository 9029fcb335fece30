"""A kind of data of your own: cells, and how strongly each expresses its genes. docs/guides/extending.md explains.

pip install scanpy  # for its sample only: 700 blood cells, 765 genes, 10 types
python -c "import numpy as np, scanpy; cells = scanpy.datasets.pbmc68k_reduced();
np.savez('cells.npz', log_counts=cells.raw.X.toarray(), types=cells.obs['bulk_labels'].astype(str))"

python examples/gene_expression.py cells.npz                        # trains, and shows kNN beside baselines
python examples/gene_expression.py evaluate linear runs/cells       # every other command knows cells, too
"""

import sys

import numpy as np
import torch
from torch import nn

import simclr_dist
from simclr_dist import cli, kinds
from simclr_dist.data.randomness import permutation, uniform
from simclr_dist.errors import DataError
from simclr_dist.kinds.arrays import ArrayKind, Rows
from simclr_dist.network import encoders


class Cells(ArrayKind):
    noun = "cell"

    def open(self, source: str) -> Rows:
        """FILE#train: four fifths of its cells; FILE#test: the others."""
        path, _, part = source.partition("#")
        try:
            file = dict(np.load(path))
            counts, types = file["log_counts"].astype(np.float32), file["types"]
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not a file with log_counts [cells, genes] and types [cells]: {error}") from None
        test, train = np.split(permutation(0, 0, 0, len(counts)), [len(counts) // 5])
        chosen = train if part == "train" else test
        return Rows(counts[chosen], types[chosen])

    def draw_views(self, values: np.ndarray, view_keys: np.ndarray) -> np.ndarray:
        u = uniform(view_keys[..., None], 1000 + np.arange(values.shape[1]))  # each view hides other genes
        return values * (u > self.data.options["hidden"])

    def baselines(self, train: str) -> dict[str, nn.Module]:
        """The numbers themselves, and their 20 first principal components."""
        counts = self.rows(train).values
        mean = counts.mean(0)
        directions = torch.from_numpy(np.linalg.svd(counts - mean, full_matrices=False)[2][:20])  # [20, genes]
        pca = nn.Linear(*directions.T.shape)
        pca.load_state_dict({"weight": directions, "bias": -directions @ torch.from_numpy(mean)})
        return {"log counts": nn.Identity(), "20 components": pca}


def perceptron(config: simclr_dist.config.ModelConfig) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(config.width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128)), 128


kinds.register("cells", Cells)
encoders.register("perceptron", perceptron)


def settings(path: str) -> dict:
    return {
        "name": "cells",
        "data": {"kind": "cells", "train": f"{path}#train", "test": f"{path}#test", "options": {"hidden": 0.4}},
        "model": {"encoder": "perceptron", "width": np.load(path)["log_counts"].shape[1], "head_out_dim": 64},
        "loss": {"temperature": 0.2},
        "optim": {"optimizer": "adamw", "base_lr": 1e-3, "lr_scaling": "none", "warmup_epochs": 2.0},
        "train": {"global_batch_size": 280, "epochs": 60},
        "evaluation": {"knn_k": 10},
    }


if __name__ == "__main__":
    if sys.argv[1].endswith(".npz"):
        found = simclr_dist.pretrain(settings(sys.argv[1])).evaluate(baselines=True)
        for name, score in [*found.baselines.items(), ("trained encoder", found)]:
            print(f"{name:20} kNN top-1 {score.top1:.1%}")
    else:
        cli.main()
