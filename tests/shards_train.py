"""What `train.virtual_shards` must make the same on any number of processes, one after the other in the same ones.

Arguments as for `simclr_dist.train`; a name ends with that of its variant. See test_virtual_shards.py.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import PartialState

import simclr_dist
from simclr_dist.config import load_config
from simclr_dist.parallel.accelerator import join_process_group
from simclr_dist.parallel.distributed import world
from tests import random_layers_train  # noqa: F401 - registers its encoder

STEPS = 3
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lars, clipped, whitened, head's BatchNorm, the probe": {
        "model": {"first_layer": "whitened", "head_batch_norm": "all"},
        "optim": {"optimizer": "lars", "base_lr": 1.0, "max_grad_norm": 0.5},
        "evaluation": {"online_probe": True},
    },
    "muon, three views, plain dcl, bf16": {
        "data": {"num_views": 3},
        "loss": {"kind": "dcl", "implementation": "plain"},
        "optim": {"optimizer": "muon", "muon_ns_steps": 3},
        "train": {"precision": "bf16"},
    },
    "adamw, dropout, a learnt temperature": {
        "model": {"encoder": "mixed", "head_batch_norm": "none"},
        "loss": {"learn_temperature": True},
        "optim": {"optimizer": "adamw", "layer_decay": 0.8},
    },
    "supcon of rounded rows, views by torch, fp16": {
        "loss": {"kind": "supcon", "gather_dtype": "bfloat16"},
        "augment": {"implementation": "torch", "blur_p": 0.5},
        "optim": {"optimizer": "sgd"},
        "train": {"precision": "fp16", "on_non_finite": "skip"},
    },
}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a fork does not look at it
    if world().size > 1:
        join_process_group()  # a process may have evaluated before it trains
        assert PartialState().num_processes == world().size
    base = load_config(sys.argv[1], sys.argv[2:])
    for at, settings in enumerate(VARIANTS.values()):
        simclr_dist.pretrain(base, name=f"{base.name}-{at}", **settings)
