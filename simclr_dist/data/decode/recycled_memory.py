"""Memory for batches, used again when no tensor refers to it any more."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_BLOCKS = 16


class RecycledMemory:
    """Makes tensors whose memory is used again when they and all views of them are deleted.

    New memory costs a page fault every 4 KiB: 40 MB take eight times longer to fill the first time. A tensor made from
    a numpy array holds a reference to it until its last view is deleted, autograd's included, so the array's reference
    count says whether it is free. For one thread at a time.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Like torch.empty, on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        block = next((b for b in self._blocks if b.nbytes == num_bytes and sys.getrefcount(b) == _UNUSED), None)
        if block is None:
            block = np.empty(num_bytes, np.uint8)
            # The oldest blocks are dropped: their size is no longer asked for, or a caller keeps them.
            self._blocks = [*self._blocks[1 - _MAX_BLOCKS :], block]
        return torch.from_numpy(block).view(dtype).view(shape)


def _references_when_unused() -> int:
    """sys.getrefcount, as called in `empty`, for a block that only the list holds: differs between Python versions."""
    blocks = [np.empty(0, np.uint8)]
    return next(sys.getrefcount(b) for b in blocks)


_UNUSED = _references_when_unused()
