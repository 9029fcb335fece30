"""Every variant of the objective, one after the other in the same processes: whole; on two, also stopped and resumed.

Arguments as for `simclr_dist.train`; a name ends with that of its variant. See test_variants.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import simclr_dist
from simclr_dist.config import load_config
from tests import random_layers_train  # noqa: F401 - registers its encoder
from tests.conftest import REPOSITORY

CONFIGURATIONS = {
    path.stem.removeprefix("cifar10_"): path for path in (REPOSITORY / "configs" / "variants").glob("*.yaml")
}
STEPS, HALF = 4, 2
# Beside what their configurations say.
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "in micro-batches, with dropout": {  # without BatchNorm: its statistics are those of a micro-batch
        "model": {"encoder": "mixed", "head_batch_norm": "none"},
        "data": {"num_views": 4},
        "loss": {"kind": "dcl", "learn_temperature": True},
        "train": {"micro_batch_size": 4},
    },
    "supervised, learnt, three views": {
        "data": {"num_views": 3},
        "loss": {"kind": "supcon", "learn_temperature": True},
        "optim": {"optimizer": "lars", "base_lr": 0.05},
    },
    "adam, a slower encoder, a whitened first layer": {
        "model": {"first_layer": "whitened"},
        "optim": {"optimizer": "adam", "encoder_lr_scale": 0.5},
    },
    "pairs across, learnt, in micro-batches": {
        "model": {"encoder": "mixed", "head_batch_norm": "none"},
        "loss": {"pairs": "across", "learn_temperature": True},
        "train": {"micro_batch_size": 4},
    },
    "nesterov, frozen layers": {
        "model": {"freeze": ["encoder.conv1.*", "encoder.bn1.*", "encoder.layer1.*"]},
        "optim": {"optimizer": "sgd", "nesterov": True, "base_lr": 0.05},
    },
}


def variants() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """By name: what differs from a common training. Of a configuration, the sections that make it a variant."""
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for name, path in sorted(CONFIGURATIONS.items()):
        config = load_config(path, check_data=False)
        settings = {"loss": config.loss.model_dump(), "data": {"num_views": config.data.num_views}}
        if settings not in found.values():  # some are variants of the optimiser only
            found[name] = settings
    return {**found, **MORE}


if __name__ == "__main__":
    base = load_config(sys.argv[1], sys.argv[2:])
    parts = [("parts", HALF), ("parts", STEPS)] if os.environ.get("WORLD_SIZE") == "2" else []
    for at, settings in enumerate(variants().values()):
        for part, end in [("whole", STEPS), *parts]:
            train = {**settings.get("train", {}), "max_steps": end}
            simclr_dist.pretrain(base, name=f"{base.name}-{at}-{part}", **{**settings, "train": train})
