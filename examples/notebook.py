# %% [markdown]
# # SimCLR in a notebook
#
# Cells of Python: open this file as a notebook in Jupyter (jupytext), VS Code or PyCharm, or run it as a script. It
# needs no images, no GPU and a minute. docs/guides/python.md says more.

# %%
import tempfile
from pathlib import Path

import torch

import simclr_dist
from simclr_dist.errors import UserError

folder = Path(tempfile.mkdtemp())
settings = {
    "name": "first",
    "runs_dir": folder,
    "data": {"train": "synthetic", "test": "synthetic", "image_size": 32},
    "augment": {"preset": "simclr_cifar"},
    "model": {"encoder": "resnet_small", "width": 8, "head_hidden_dim": 32, "head_out_dim": 16},
    "loss": {"temperature": 0.5},
    "optim": {"optimizer": "sgd", "base_lr": 0.1, "warmup_epochs": 0.5},
    "train": {"global_batch_size": 64, "epochs": 1, "precision": "fp32"},
    "evaluation": {"knn_k": 20},
}

# %% [markdown]
# A mistake is an exception that says what to do. Nothing has started, nothing has to be cleaned up.

# %%
try:
    simclr_dist.pretrain(settings, train={"epoch": 2})
except UserError as error:
    print(error)

# %% [markdown]
# Train. The stop button of the notebook saves and stops; the same call goes on from there.

# %%
run = simclr_dist.pretrain(settings)
print(run)

# %% [markdown]
# More epochs: the run is continued, as its settings say. Another precision: another run.

# %%
run = simclr_dist.pretrain(settings, train={"epochs": 2})
in_bf16 = simclr_dist.pretrain(settings, name="in_bf16", train={"precision": "bf16"})

# %% [markdown]
# What has it learned?

# %%
found = run.evaluate("knn", baselines=True)
print(f"kNN: {found.top1:.1%}; raw pixels: {found.baselines['raw pixels'].top1:.1%}")

# %%
embeddings = run.embed("synthetic", folder / "embeddings.npz")
print(embeddings.h.shape, run.export(format="safetensors").path)

# %% [markdown]
# The encoder is an ordinary module.

# %%
with torch.no_grad():
    print(run.encoder()(torch.zeros(1, 3, 32, 32)).shape)
