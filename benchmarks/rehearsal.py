"""A training step on a GPU that is not there: which work it launches, and where the host waits for it.

    python -m benchmarks.rehearsal                what docs/gpu.md predicts from, counted
    python -m benchmarks.rehearsal step-vit-s16   of one row of benchmarks/step.py

Tensors are torch's fake ones: they have a device (`cuda:0`), a shape and a dtype, but no values and no memory, and no
driver is needed. The trainer is built by its own code and takes its own steps. A `Trace` stands between it and torch,
and records each operation on the device, and each time the host waits: for a value, for a copy from or to memory that
is not page-locked, or for an event.

What is left out: the loader, the process group, and time. torch's engine for backward needs a driver, so a small one
walks through the graph instead: it calls the same nodes.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.step import ROWS, bare_encoder, configuration
from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.parallel import distributed
from simclr_dist.training.trainer import Trainer

DEVICE = torch.device("cuda", 0)
# No work for the device: another look at the same memory, or memory alone.
_NO_WORK = {"alias", "as_strided", "detach", "device", "diagonal", "empty", "empty_like", "empty_strided", "expand"}
_NO_WORK |= {"is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "permute", "_pin_memory", "_reshape_alias"}
_NO_WORK |= {"select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold"}
_NO_WORK |= {"_unsafe_view", "unsqueeze", "view", "view_as_real"}
_KEEPS_VALUES = {"alias", "clone", "copy_", "detach", "lift_fresh", "_pin_memory", "_to_copy", "unsqueeze", "view"}
# How often they go through their input beside the one time that every operation reads it: statistics, then normalise.
_FURTHER_PASSES = {"native_batch_norm": 1, "cudnn_batch_norm": 1, "_batch_norm_with_update": 1}
_FURTHER_PASSES |= {"native_batch_norm_backward": 2, "cudnn_batch_norm_backward": 2, "batch_norm_backward": 2}
_FURTHER_PASSES |= {"convolution_backward": 1}
# Kernels of which torch's fake tensors know nothing, and what each returns.
_SHAPES: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, *_: _per_channel(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: _per_channel(x, 2),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda _, x, *__: _per_channel(x, 4),
    "batch_norm_backward_elemt": lambda dy, *_: torch.empty_like(dy),
}
_TENSORS_OF_A_FOREACH_KERNEL = 40


@dataclass(frozen=True)
class Launch:
    """An operation on the device. One operation may be several kernels; a foreach over many tensors is counted so."""

    name: str
    phase: str
    stream: str
    kernels: int = 1
    bytes: int = 0
    """Read and written, as if no cache held anything."""
    flops: int = 0
    is_mixed: bool = False
    """It takes a tensor from the host, other than a copy does or a single number."""


@dataclass(frozen=True)
class Wait:
    """The host waits until the device has done what was launched."""

    name: str
    phase: str
    place: str
    """Where in simclr_dist, as file:line."""
    stream: str = "compute"


@dataclass
class _Event:
    trace: Trace
    recorded: tuple[str, int] | None = None

    def record(self, stream: _Stream | None = None) -> None:
        stream = stream or self.trace.streams[-1]
        self.recorded = stream.name, self.trace.launched[stream.name]

    def synchronize(self) -> None:
        if self.recorded is not None:
            self.trace.wait_until(*self.recorded, "event")


@dataclass(frozen=True)
class _Stream:
    trace: Trace = field(repr=False)
    name: str

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None:
        self.trace.wait_until(self.name, self.trace.launched[self.name], "stream")


class Trace(TorchDispatchMode):
    """What happens under it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "rest"
        self.records: list[Launch | Wait] = []
        self.streams = [_Stream(self, "compute")]
        self.launched: Counter[str] = Counter()  # by stream
        self._done: Counter[str] = Counter()  # of these, what the host knows to be done
        self._pinned: dict[int, Any] = {}
        self._values = WeakTensorKeyDictionary()

    # What was found

    @property
    def waits(self) -> list[Wait]:
        return [r for r in self.records if isinstance(r, Wait)]

    def launches(self, phase: str | None = None) -> list[Launch]:
        return [r for r in self.records if isinstance(r, Launch) and phase in (None, r.phase)]

    def kernels(self, phase: str | None = None) -> int:
        return sum(launch.kernels for launch in self.launches(phase))

    # What happens

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        before, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = before

    def phased(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.in_phase(name):
                return function(*args, **kwargs)

        return call

    def launch(self, name: str, **facts: Any) -> None:
        stream = self.streams[-1].name
        self.launched[stream] += 1
        self.records.append(Launch(name, self.phase, stream, **facts))

    def wait(self, name: str) -> None:
        """For all that is queued on the current stream."""
        stream = self.streams[-1].name
        self.records.append(Wait(name, self.phase, _place(), stream))
        self._done[stream] = self.launched[stream]

    def wait_until(self, stream: str, count: int, name: str) -> None:
        """For the first `count` launches of a stream; nothing happens if the host has waited for them before."""
        if count > self._done[stream]:
            self.records.append(Wait(name, self.phase, _place(), stream))
            self._done[stream] = count

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._keep(args, self._pin(torch.ops.aten.clone(args[0])))
        if kwargs.pop("pin_memory", False):
            return self._pin(function(*args, **kwargs))
        if name in ("nonzero", "masked_select") or (name == "index" and _masks(args)):
            self.wait(name)  # for the size of the answer
            args, function = _of_all(name, args), torch.ops.aten.index.Tensor
            if name == "nonzero":
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        out = _SHAPES.get(name, function)(*args, **kwargs)
        if name in _KEEPS_VALUES:
            self._keep(args, out)
        elif name.endswith("_"):
            for changed in tree_leaves(args[0]):
                self._values.pop(changed, None)
        if name not in _NO_WORK:
            self._record(function, name, args, kwargs, out)
        return out

    def _record(self, function: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*read, *written)}
        if "cuda" not in devices:
            return
        is_copy = name in ("copy_", "_to_copy")
        if is_copy and "cpu" in devices:
            self._copy(name, args, kwargs, out)
        kernels = -(-len(args[0]) // _TENSORS_OF_A_FOREACH_KERNEL) if name.startswith("_foreach") else 1
        if name.startswith("_foreach") and not _is_fast(args):
            kernels, name = len(args[0]), f"{name} (one by one)"
        flops = flop_registry.get(function.overloadpacket)
        self.launch(
            name,
            kernels=kernels,
            bytes=_bytes(name, read, written),
            flops=0 if flops is None else flops(*args, **kwargs, out_val=out),
            is_mixed=not is_copy and any(t.device.type == "cpu" and t.ndim for t in (*read, *written)),
        )

    def _copy(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
        """Between host and device."""
        source = args[1] if name == "copy_" else args[0]
        non_blocking = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        on_host = source if source.device.type == "cpu" else out
        # torch gives a copy to the host that need not be waited for page-locked memory.
        pinned = self._is_pinned(on_host) or (name == "_to_copy" and on_host is out)
        if not (non_blocking and pinned):
            self.wait("copy to the host" if on_host is out else "copy to the device")

    def _read(self, x: Tensor) -> Any:
        if x.device.type == "cuda":
            self.wait("read")
        [number] = np.ravel(self._numbers(x))
        return float(number) if x.dtype.is_floating_point else bool(number) if x.dtype == torch.bool else int(number)

    def tolist(self, x: Tensor) -> Any:
        """All values are copied to the host at once."""
        if x.device.type == "cuda":
            self.wait("tolist")
        return self._numbers(x)

    def _numbers(self, x: Tensor) -> Any:
        """What was sent there from the host; else 1.0, 0 or False."""
        value = self._values.get(x)
        with _disable_current_modes():
            if value is None:  # False ends a loop that draws again until all numbers fit
                value = torch.full(x.shape, 1.0 if x.dtype.is_floating_point else 0, dtype=x.dtype)
            return value.tolist()

    def _keep(self, args: tuple, out: Any) -> Any:
        """Values that came from the host are remembered, so that reading them back gives what was sent."""
        source = args[-1] if isinstance(args[-1], Tensor) else args[0]
        if not isinstance(source, Tensor) or not isinstance(out, Tensor):
            return out
        known = self._values.get(source) if isinstance(source, FakeTensor) else source
        if known is not None and known.numel() == out.numel():
            with _disable_current_modes():
                self._values[out] = known.detach().reshape(out.shape)
        return out

    def _pin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage._cdata] = storage
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._pinned


def _per_channel(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count))


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/simclr_dist/" in frame.filename and not frame.filename.endswith("/host_copy.py"):
            return f"{frame.filename.rpartition('/simclr_dist/')[-1]}:{frame.lineno}"
    return "outside"


def _masks(args: tuple) -> bool:
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _of_all(name: str, args: tuple) -> tuple:
    """Arguments of an operation that gives the largest answer that this one could give."""
    if name != "index":
        x = args[0]
        return x.reshape(-1), [x.new_empty(x.numel(), dtype=torch.int64)]
    indices: list[Tensor | None] = []
    for i in args[1]:
        is_mask = isinstance(i, Tensor) and i.dtype == torch.bool
        indices += [i.new_empty(i.numel(), dtype=torch.int64) for _ in range(i.ndim)] if is_mask else [i]
    return args[0], indices


def _is_fast(args: tuple) -> bool:
    """Whether a foreach is one kernel for many tensors: all lists are laid out alike."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    return all(
        (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()) or y.ndim == 0
        for others in lists[1:]
        for x, y in zip(lists[0], others, strict=True)
    )


def _bytes(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    new = [t for t in written if not any(t is r for r in read)]
    passes = _FURTHER_PASSES.get(name, int(name.endswith("_")))
    return sum(t.nbytes for t in (*read, *new)) + (passes * read[0].nbytes if read else 0)


# ---------------------------------------------------------------------------------------------------------------------
# The GPU that is not there


@contextmanager
def pretended_gpu() -> Iterator[Trace]:
    """Inside, tensors are fake, `cuda:0` exists, and what happens there is in the trace."""
    trace = Trace()
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3"),
        (torch.cuda, "get_device_properties", lambda *_: mock.Mock(multi_processor_count=132, major=9, minor=0)),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "max_memory_allocated", lambda *_: 0),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "manual_seed_all", lambda *_: None),
        (torch.cuda, "synchronize", lambda *_: trace.wait("synchronize")),
        (torch.cuda, "Event", lambda **_: _Event(trace)),
        (torch.cuda, "Stream", lambda *_, **__: _Stream(trace, f"stream {id(object())}")),
        (torch.cuda, "current_stream", lambda *_: trace.streams[-1]),
        (torch.cuda, "stream", lambda stream: _on_stream(trace, stream)),
        (torch.cuda, "device", lambda _: nullcontext()),
        (sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (FakeTensor, "tolist", trace.tolist),
        (Tensor, "backward", backward),
        (Tensor, "__deepcopy__", lambda x, memo: memo.setdefault(id(x), x.detach().clone())),
        (nn.Module, "_apply", _apply),
        (F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention)),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            if isinstance(owner, type):
                replacement = _as_method(replacement)
            stack.enter_context(mock.patch.object(owner, name, replacement))
        _pretend_triton(trace, stack)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        distributed._side_stream.cache_clear()
        stack.callback(distributed._side_stream.cache_clear)
        yield trace


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


@contextmanager
def _on_stream(trace: Trace, stream: _Stream) -> Iterator[None]:
    trace.streams.append(stream)
    try:
        yield
    finally:
        trace.streams.pop()


def _pretend_triton(trace: Trace, stack: ExitStack) -> None:
    """A Triton kernel is a launch that computes nothing."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        trace.launch(kernel.__name__, bytes=sum(t.nbytes for t in tensors))

    stack.enter_context(mock.patch.object(JITFunction, "run", run))


def _attention(ordinary: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel that torch would choose on a GPU, where it can."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attn_mask is None and q.is_cuda and q.dtype.itemsize == 2:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, *args, **kwargs)[0]
        return ordinary(q, k, v, attn_mask, *args, **kwargs)

    return attention


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """torch's own exchanges parameters in place, which fake tensors do not allow."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (moved := function(before := parameter.detach())) is not before:
            module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@torch.no_grad()
def backward(root: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """What torch's engine does: each node once, when all that depends on it is done."""
    first = root.grad_fn
    assert first is not None
    waiting_for, met, to_visit = Counter[Any](), {first}, [first]
    while to_visit:
        for node, _index in to_visit.pop().next_functions:
            if node is not None:
                waiting_for[node] += 1
                if node not in met:
                    met.add(node)
                    to_visit.append(node)
    gradients: dict[Any, dict[int, Tensor]] = {
        first: {root.output_nr: torch.ones_like(root) if gradient is None else gradient}
    }
    ready = [first]
    while ready:
        node = ready.pop()
        found = gradients.pop(node, {})
        of_outputs = [_fitted(found.get(i), meta) for i, meta in enumerate(node._input_metadata)]
        for (below, index), gradient in _gradients_of_inputs(node, of_outputs if found else []):
            if gradient is not None:
                sums = gradients.setdefault(below, {})
                sums[index] = sums[index] + gradient if index in sums else gradient
            waiting_for[below] -= 1
            if not waiting_for[below]:
                ready.append(below)


def _gradients_of_inputs(node: Any, of_outputs: list[Tensor | None]) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """By the node of each input that needs one, and which output of that node the input was."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if of_outputs and hasattr(node, "variable"):  # of a parameter
        _accumulate(node.variable, of_outputs[0])
    if not of_outputs or not edges:
        return [(edge, None) for edge in edges]
    written_in_python = isinstance(node, BackwardCFunction)
    found = node.apply(*of_outputs) if written_in_python else node(*of_outputs)
    found = found if isinstance(found, tuple) else (found,)
    if written_in_python:  # it answers for all arguments, and has edges for tensors alone
        wanted = [g for g, needed in zip(found, node.needs_input_grad, strict=True) if needed]
    else:
        wanted = [g for g, edge in zip(found, node.next_functions, strict=False) if edge[0] is not None]
    return list(zip(edges, wanted, strict=True))


def _accumulate(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None and parameter.grad is not None:
        parameter.grad += gradient
    elif gradient is not None:
        # cuDNN writes the gradient of a weight in the weight's layout; fake tensors do not know that.
        parameter.grad = gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter)


def _fitted(gradient: Tensor | None, meta: Any) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.sum_to_size(meta.shape).to(meta.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


class Rehearsal:
    """A trainer on the pretended GPU, with the parts of its step named in the trace."""

    def __init__(self, trace: Trace, config: Config) -> None:
        self.trace = trace
        self.config = config
        self.trainer = trainer = Trainer(config)
        parts = trainer.parts = replace(trainer.parts, steps_per_epoch=1000)  # what ends an epoch is no part of a step
        trainer.augment = trace.phased("augment", trainer.augment)
        trainer.nt_xent = _Loss(trace, trainer.nt_xent)
        parts.model.forward = trace.phased("forward", parts.model.forward)  # type: ignore[method-assign]
        parts.accelerator.backward = trace.phased("backward", parts.accelerator.backward)
        parts.optimizer.step = trace.phased("optimizer", parts.optimizer.step)

    def batch(self) -> Batch:
        V, B, S = self.config.data.num_views, self.trainer.batch_size_per_device, self.config.data.image_size
        views = torch.empty(V, B, S, S, 3, dtype=torch.uint8, device=DEVICE)
        labels = torch.empty(B, dtype=torch.int64, device=DEVICE)
        return Batch(views, torch.empty_like(labels), labels, 0, np.arange(B))

    def fit(self, steps: int = 2) -> Trace:
        """Trains; what the loop did in its last step is in the trace."""
        batch = self.batch()

        def batches() -> Iterator[tuple[Batch, float, float]]:
            for _ in range(steps):
                self.trace.records.clear()
                yield batch, time.monotonic(), 0.0
            raise _EnoughError

        self.trainer._batches = batches  # type: ignore[method-assign]
        with suppress(_EnoughError):
            self.trainer.fit()
        return self.trace


class _EnoughError(Exception):
    pass


class _Loss:
    """The trainer's loss, with its name in the trace."""

    def __init__(self, trace: Trace, loss: Any) -> None:
        self._call = trace.phased("loss", loss)
        self._loss = loss

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


@contextmanager
def rehearsal(config: Config) -> Iterator[Rehearsal]:
    """A trainer of this configuration on a GPU that is not there."""
    states = [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)]

    def join(timeout_s: float) -> torch.device:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True).device = DEVICE
        return DEVICE

    try:
        with (
            pretended_gpu() as trace,
            mock.patch("simclr_dist.training.parts.join_training", join),
            mock.patch("simclr_dist.training.parts.check_together", return_value=()),  # this and the next need no GPU
            mock.patch("simclr_dist.training.parts.forward_flops", return_value=None),
            mock.patch("simclr_dist.loss.implementations.obstacle_to_triton", return_value=None),
            mock.patch("simclr_dist.views.implementations.obstacle", return_value=None),
        ):
            yield Rehearsal(trace, config)
    finally:
        for kind, state in zip((PartialState, AcceleratorState, GradientState), states, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


# ---------------------------------------------------------------------------------------------------------------------
# What is predicted from that


PHASES = ("augment", "forward", "loss", "backward", "optimizer", "rest")
BYTES_PER_S, FLOPS = 3.0e12, 0.7 * 790e12
"""What an H100 reaches at best in long copies, and in large convolutions and products of 16 bits."""
FROM_BOUND = (1.4, 1.6)
"""Assumed: measured times of networks like these over their bounds."""


@dataclass(frozen=True)
class Count:
    kernels: int
    gigabytes: float
    teraflop: float
    bound_ms: float
    """Each launch takes the time of its bytes or of its operations, whichever is longer."""

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> Count:
        return cls(
            sum(launch.kernels for launch in launches),
            sum(launch.bytes for launch in launches) / 1e9,
            sum(launch.flops for launch in launches) / 1e12,
            1e3 * sum(max(launch.bytes / BYTES_PER_S, launch.flops / FLOPS) for launch in launches),
        )

    def cells(self) -> str:
        return f"{self.kernels} | {self.gigabytes:.1f} | {self.teraflop:.2f} | {self.bound_ms:.1f}"


def count_row(name: str) -> dict[str, Count]:
    """Of a step of this row of benchmarks/step.py: its phases, the whole, and the bare encoder."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as runs, redirect_stdout(StringIO()):
        config = configuration(row, runs)
        monitor = config.monitor.model_copy(update={"image_pairs": 0, "log_every_steps": 1000})
        config = config.model_copy(update={"monitor": monitor})
        with rehearsal(config) as it:
            trace = it.fit()
            counts = {phase: Count.of(trace.launches(phase)) for phase in PHASES}
            counts["step"] = Count.of(trace.launches())
            trace.records.clear()
            shape = 2, row.batch_size, row.image_size, row.image_size, 3
            views = torch.empty(shape, device=DEVICE).permute(0, 1, 4, 2, 3).flatten(0, 1)
            bare_encoder(config, views, it.trainer.parts.network.get_submodule("encoder"))()
            counts["bare encoder"] = Count.of(trace.launches())
    return counts


def table(name: str) -> str:
    """Of Markdown, as it stands in docs/gpu.md."""
    counts = count_row(name)
    low, high = (factor * counts["step"].bound_ms for factor in FROM_BOUND)
    slow, fast = (1e3 * ROWS[name].batch_size / ms for ms in (high, low))
    share = counts["bare encoder"].bound_ms / counts["step"].bound_ms
    lines = [
        f"`{name}` (counted) | launches | GB | TFLOP | bound, ms",
        "---|---:|---:|---:|---:",
        *(f"{phase} | {count.cells()}" for phase, count in counts.items()),
    ]
    predicted = (
        f"**Predicted** on an H100: {low:.0f} to {high:.0f} ms a step, "
        f"{round(slow, -2):,.0f} to {round(fast, -2):,.0f} images/s; the bare encoder is {share:.0%} of it."
    )
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines)) + f"\n\n{predicted}\n"


def main() -> None:
    for name in sys.argv[1:] or ROWS:
        print(table(name))


if __name__ == "__main__":
    main()
