"""Bytes that a training will hold: on a device, on the host, in a checkpoint. Computed, without holding them."""

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

from simclr_dist.config import DataConfig, LossConfig, ModelConfig, OptimConfig, Precision, TrainConfig
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.loss.build import build_loss
from simclr_dist.loss.memory import workspace_bytes
from simclr_dist.network.inputs import Inputs
from simclr_dist.network.precision import assumed_precision, autocast
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import SimCLR
from simclr_dist.optim.build import optimizer_state

_SAFETENSORS = {torch.float32: "F32", torch.int64: "I64"}
_REST_OF_STATE_JSON = 650  # step, fingerprint, versions


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the fullest moment of a step.

    Left out: the CUDA context and cuDNN's workspaces (about 1 GiB), and what the allocator cannot use (about a tenth).
    """

    parameters: int  # and buffers
    gradients: int
    optimizer: int
    activations: int  # the peak of forward and backward, above all else; torch.compile may need less
    views: int  # the batch as uint8 and as float32
    loss: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def device_memory(
    *,
    data: DataConfig,
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    train: TrainConfig,
    world_size: int,
    device_type: str,
) -> DeviceMemory:
    """What each of `world_size` devices will hold."""
    images = train.global_batch_size // world_size
    network = shape_of_training(model, loss)
    kind = kind_of(data)
    views = data.num_views * images * kind.inputs.example(1).nbytes
    return DeviceMemory(
        parameters=sum(x.nbytes for x in network.state_dict().values()),
        gradients=sum(p.nbytes for p in network.parameters()),
        optimizer=sum(x.nbytes for x in optimizer_state(network, optim).values()),
        activations=step_activations(
            model,
            inputs=kind.inputs,
            images=train.images_of_part or images,
            precision=assumed_precision(train.precision, device_type),
            num_views=data.num_views,
        ),
        views=views + (2 * batch_bytes(kind, images) if device_type == "cuda" else 0),
        loss=workspace_bytes(
            data.num_views * images,
            model.head_out_dim,
            world_size=world_size,
            device_type=device_type,
            implementation=loss.implementation,
            gather_dtype=loss.gather_dtype if loss.row_dtype == "float32" else loss.row_dtype,
            num_views=data.num_views,
            supervised=loss.kind == "supcon",
            pairs=loss.pairs,
        ),
    )


def shape_of_training(model: ModelConfig, loss: LossConfig) -> SimCLR:
    """What DDP wraps and a checkpoint holds, without values: the network, and the loss where it has a parameter."""
    network = shape_of_model(model)
    if loss.learn_temperature:
        network.add_module("loss", build_loss(loss, num_views=2).to("meta"))
    return network


def step_activations(
    model: ModelConfig, *, inputs: Inputs, images: int, precision: Precision, num_views: int = 2
) -> int:
    """Peak bytes of a forward and backward over all views of `images` samples, besides parameters, gradients and views.

    Runs the network on tensors without memory, and follows each storage from its creation to its release.
    """
    network, one = shape_of_model(model), inputs.example(1)
    with FakeTensorMode():
        network._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        views = torch.empty(num_views * images, *one.shape[1:], dtype=one.dtype)
        with LiveBytes() as live:
            # bf16 stands for fp16: as many bytes, and supported by every CPU.
            with autocast("cpu", "fp32" if precision == "fp32" else "bf16"):
                _, z = network(views)
            z.backward(torch.empty_like(z))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors made inside: `live` bytes now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        # An operation may return one of its arguments: that is no new memory.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._follow(x, is_new=False)
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._follow(x, is_new=True)
        return result

    def _follow(self, x: Tensor, *, is_new: bool) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes() if is_new else 0
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def loader_bytes(data: DataConfig, batch_size_per_device: int) -> int:
    """Host memory of the batches that a process decodes ahead (docs/data.md)."""
    return (data.batches_ahead + 2) * batch_bytes(kind_of(data), batch_size_per_device)


def batch_bytes(kind: Kind, samples: int) -> int:
    """Of what the loader yields of that many samples."""
    return samples * kind.example_batch(1).views.nbytes


def checkpoint_bytes(network: nn.Module, optim: OptimConfig, settings: dict[str, Any]) -> int:
    """The size of one checkpoint on disk. network: its shapes suffice. settings: all of them, as plain values."""
    state = {"parameter_order": [name for name, _ in network.named_parameters()], "config": settings}
    return (
        safetensors_bytes(network.state_dict())
        + safetensors_bytes(optimizer_state(network, optim))
        + len(json.dumps(state, indent=1))
        + _REST_OF_STATE_JSON
    )


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """The size of a file with these tensors: 8 bytes, a header in JSON padded to 8 bytes, the data."""
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
