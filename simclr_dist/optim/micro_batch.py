"""The exact gradient of a contrastive loss over a batch whose activations do not fit into memory at once.

Ordinary accumulation would shrink the set of negatives to a micro-batch. Here the loss always sees the whole global
batch; only the network's passes are cut (gradient caching: Gao et al. 2021, arXiv:2101.06983):

    pass 1   for each micro-batch: forward without a graph, keep z and the generators' states
    loss     once on all of z: its value, and dL/dz
    pass 2   for each micro-batch: the same forward again, now with a graph; backward from its rows of dL/dz

Memory: the activations of one micro-batch and three times z. Time: one forward more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def backward_in_micro_batches(
    model: nn.Module,
    views: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    micro_batch_size: int,
    row_keys: Tensor | None = None,
    loss_parameters: Iterable[Tensor] = (),
    backward: Callable[[Tensor], Any] = Tensor.backward,
    observe: Callable[[Any], None] | None = None,
) -> Tensor:
    """Adds the gradient of loss_fn(z of all views) to the parameters, and returns the loss, detached.

    model: [V*b, ...] -> z [V*b, K], or a tuple that ends with z. May be wrapped by DistributedDataParallel, whose
        gradients are then averaged once, in the last micro-batch.
    views: [V, B, ...]; a micro-batch holds all V views of `micro_batch_size` images (the last one of what is left).
    loss_fn: z [V*B, K], view after view, in float32 at least -> scalar.
    row_keys: [V, B, ...], cut like the views and given to the model beside them (network/keyed_dropout.py).
    loss_parameters: those of `model` that `loss_fn` uses, such as a learnt temperature: DDP has to hear of them.
    backward: how to call backward on the loss: `accelerator.backward`, or one that multiplies by a GradScaler's
        scale. dL/dz carries the scale on into the network.
    observe: called with the model's output for each micro-batch, in order, without a graph.

    Dropout and its like draw the same numbers in both passes: by key, or because the generators' states come back.
    Without batch statistics in the network this is the full batch's gradient. BatchNorm normalises each micro-batch by
    its own statistics: the gradient is exactly that of *this* network, not of the one that sees the full batch. Its
    running statistics move once a call, by the mean over the micro-batches. All ranks need equally many micro-batches.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, found {micro_batch_size}")
    num_views = views.shape[0]
    parts = [x.split(micro_batch_size, dim=1) for x in (views, row_keys) if x is not None]
    micro_batches = list(zip(*parts, strict=True))

    def project(micro_batch: tuple[Tensor, ...]) -> Tensor:
        """[V, b, ...] each -> z [V, b, K]."""
        output = model(*(x.flatten(0, 1) for x in micro_batch))
        if observe is not None and not torch.is_grad_enabled():
            observe(output)
        z: Tensor = output[-1] if isinstance(output, tuple) else output
        return z.unflatten(0, (num_views, -1))

    random_states, z_parts = [], []
    with torch.no_grad(), _running_statistics_move_once(model) as begin_pass:
        for micro_batch in micro_batches:
            begin_pass()
            random_states.append(_random_state(views.device))
            z_parts.append(project(micro_batch))
    torch.clear_autocast_cache()  # its copies of the weights were made without a graph

    z = torch.cat(z_parts, dim=1).flatten(0, 1)
    # Float32 at least, so that dL/dz is scaled before it is rounded to float16, as in a single pass.
    z = z.to(torch.promote_types(z.dtype, torch.float32)).requires_grad_()
    loss = loss_fn(z)
    backward(loss)
    assert z.grad is not None
    gradients = z.grad.unflatten(0, (num_views, -1)).split(micro_batch_size, dim=1)

    no_sync = getattr(model, "no_sync", nullcontext)
    with running_statistics_stay(model):
        for i, micro_batch in enumerate(micro_batches):
            _set_random_state(views.device, random_states[i])
            is_last = i + 1 == len(micro_batches)
            with nullcontext() if is_last else no_sync():
                z_part = project(micro_batch)
                if is_last:  # DDP now averages what the loss has left in its own parameters, too
                    for p in loss_parameters:
                        p.view_as(p).backward(torch.zeros_like(p))
                z_part.backward(gradients[i].to(z_part.dtype))
    return loss.detach()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def tracking_norms(model: nn.Module) -> list[BatchNorm]:
    """Those whose running statistics move in a forward pass."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats]


@contextmanager
def _running_statistics_move_once(model: nn.Module) -> Iterator[Callable[[], None]]:
    """However many forward passes are made inside, running statistics move by one step, to the passes' mean.

    Call what it yields before each pass. The k-th pass moves them by 1/k: a mean, whose step the host need not read.
    """
    before = []
    for norm in tracking_norms(model):
        before.append((norm, norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]))
    passes = 0

    def begin_pass() -> None:
        nonlocal passes
        passes += 1
        for norm, _, _ in before:
            norm.momentum = 1 / passes

    try:
        yield begin_pass
    finally:
        for norm, momentum, (mean, var, count) in before:
            norm.momentum = momentum
            count += 1
            step = (1 / count).to(mean.dtype) if momentum is None else momentum
            for buffer, moved in zip(norm.buffers(recurse=False), (mean, var, count), strict=True):
                buffer.copy_(moved if moved is count else moved.lerp_(buffer, step))


@contextmanager
def running_statistics_stay(model: nn.Module) -> Iterator[None]:
    """Whatever forward passes are made inside."""
    norms = tracking_norms(model)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
