"""Page-locked memory for batches on their way to a GPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class PinnedSlots:
    """Page-locked memory that batches are decoded into, and the CUDA stream that copies them to the GPU.

    The copy of a batch runs beside the computation on the one before. A slot is filled again only when its copy has
    ended. The host waits for that: an event on the GPU alone would not keep the decoder from overwriting bytes that
    are still being copied.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._count = count
        self._free: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._made = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._made < self._count:
            self._made += 1
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        slot, copied = self._free.popleft()
        copied.synchronize()
        return slot

    def upload(self, slot: Tensor) -> Tensor:
        """The slot's content on the device, ready for the current stream."""
        consumer = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            views = slot.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        consumer.wait_stream(self._stream)
        views.record_stream(consumer)  # or the allocator could give the memory away while the consumer uses it
        self._free.append((slot, copied))
        return views
