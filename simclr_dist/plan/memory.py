"""Bytes that a training will hold: on a device, on the host, in a checkpoint. Computed, without holding them.

Letters: B images per device, W devices, n = 2B rows of a device, N = n*W, K the width of z, S the side of a view.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_dist.config import Config, OptimConfig
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.lars import parameter_order

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}  # the same bytes; CPUs know bf16 everywhere
_SAFETENSORS = {torch.float32: "F32", torch.int64: "I64"}
_REST_OF_STATE_JSON = 650  # step, fingerprint, versions


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the fullest moment of a step. Left out: the CUDA context, cuDNN's workspaces, and what the
    allocator cannot use (together a GiB, and a tenth)."""

    parameters: int  # and buffers
    gradients: int
    optimizer: int
    activations: int  # the peak of forward and backward, above all else; torch.compile may need less
    views: int  # the batch as uint8 and as float32
    loss: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def device_memory(config: Config, world_size: int, device_type: str) -> DeviceMemory:
    """What each of `world_size` devices will hold."""
    images = config.train.global_batch_size // world_size
    model = shape_of_model(config)
    floats = 2 * images * 3 * config.data.image_size**2
    return DeviceMemory(
        parameters=sum(x.nbytes for x in model.state_dict().values()),
        gradients=sum(p.nbytes for p in model.parameters()),
        optimizer=sum(x.nbytes for x in optimizer_state(model, config.optim).values()),
        activations=step_activations(config, config.train.micro_batch_size or images),
        views=4 * floats + (2 * floats if device_type == "cuda" else 0),
        loss=loss_workspace(config, world_size, device_type),
    )


def shape_of_model(config: Config) -> SimCLR:
    """The network without its numbers."""
    with torch.device("meta"):
        return build_model(config.model)


def optimizer_state(model: nn.Module, config: OptimConfig) -> dict[str, Tensor]:
    """What the optimiser will remember, under its names in a checkpoint."""
    parameters = dict(model.named_parameters())
    states = {
        "lars": ["velocity"],
        "sgd": ["momentum_buffer"] if config.momentum else [],
        "adamw": ["step", "exp_avg", "exp_avg_sq"],
    }[config.optimizer]
    return {
        f"{name}/{state}": torch.empty((), device="meta") if state == "step" else parameters[name]
        for name in parameter_order(model)
        for state in states
    }


def step_activations(config: Config, images: int) -> int:
    """Peak bytes of a forward and backward over two views of `images` images, besides parameters, gradients and views.

    Runs the network on tensors that have shapes but no numbers, and follows each storage from its making to its end.
    """
    dtype = _AUTOCAST.get(config.train.precision)
    with FakeTensorMode():
        model = build_model(config.model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        views = torch.empty(2 * images, 3, config.data.image_size, config.data.image_size)
        with LiveBytes() as live:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                _, z = model(views)
            z.backward(torch.empty_like(z))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors made inside: `live` bytes now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        # What an operation is given may be what it returns: that was there before.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._follow(x, made_here=False)
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._follow(x, made_here=True)
        return result

    def _follow(self, x: Tensor, *, made_here: bool) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes() if made_here else 0
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def loss_workspace(config: Config, world_size: int, device_type: str) -> int:
    """Bytes of NT-Xent above its input z: O(N K), two tiles, and a few numbers a row. tests/test_plan.py compares."""
    n = 2 * config.train.global_batch_size // world_size
    N, K = n * world_size, config.model.head_out_dim
    if config.loss.implementation == "plain":
        return PLAIN_COPIES * 4 * N * N + 3 * N * K * 4
    gathered = 4 * N * K if world_size > 1 else 0
    if world_size > 1 and config.loss.gather_dtype == "bfloat16":
        gathered += 2 * (N + n) * K
    tiles = 0
    if device_type == "cpu" or config.loss.implementation == "tiled":
        size = min(n, 4096 if device_type != "cpu" else 256 if n <= 1024 else 512)
        tiles = 2 * 4 * size * size
        if device_type == "cpu" and n <= 1024:  # those of the own block stay
            parts = -(-n // size)
            tiles += parts * (parts + 1) // 2 * 4 * size * size
    # Unit rows, and two products of all rows with their positives while the value is computed.
    return (n + 2 * N) * K * 4 + gathered + tiles + NUMBERS_A_ROW * 4 * N


PLAIN_COPIES = 6  # N x N matrices at once, masks among them
NUMBERS_A_ROW = 6


def loader_bytes(config: Config, world_size: int) -> int:
    """Host memory of the batches that a process decodes ahead (docs/data.md)."""
    images = config.train.global_batch_size // world_size
    return (config.data.batches_ahead + 2) * images * 2 * 3 * config.data.image_size**2


def checkpoint_bytes(config: Config) -> int:
    """The size of one checkpoint on disk."""
    model = shape_of_model(config)
    state = {"parameter_order": parameter_order(model), "config": config.model_dump(mode="json")}
    return (
        safetensors_bytes(model.state_dict())
        + safetensors_bytes(optimizer_state(model, config.optim))
        + len(json.dumps(state, indent=1))
        + _REST_OF_STATE_JSON
    )


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """The size of a file with these tensors: 8 bytes, a header in JSON, filled up to 8 bytes, the numbers."""
    header, at = {}, 0
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        header[name] = {
            "dtype": _SAFETENSORS[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [at, at + x.nbytes],
        }
        at += x.nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at
