"""Values of the device on their way to the host, while both go on working."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
    """Starts copying x; call the result to wait for the copy.

    On CUDA that waits for what was queued on the current stream before this call, however much has been queued since.
    """
    x = x.detach()
    if not x.is_cuda:
        copied = x.clone()
        return lambda: copied
    # Into page-locked memory: any other copy would make the host wait here.
    on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return on_host

    return wait


def on_host(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each of them, in ordinary memory of the host. The device may compute the next one meanwhile."""
    before: Callable[[], Tensor] | None = None
    for x in tensors:
        arriving = copy_to_host(x)
        if before is not None:
            yield _unlocked(before())
        before = arriving
    if before is not None:
        yield _unlocked(before())


def _unlocked(x: Tensor) -> Tensor:
    return x.clone() if x.is_pinned() else x
