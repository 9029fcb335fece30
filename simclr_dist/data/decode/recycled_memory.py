"""Memory for batches that is used again once nobody looks at it."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST_BLOCKS = 16


class RecycledMemory:
    """Tensors whose memory comes back when they, and all views of them, are gone.

    Fresh memory costs a page fault every 4 KiB: 40 MB take eight times longer to fill the first time. A tensor made
    of a numpy array holds a reference to it until the last view is gone, autograd's included, so that the array's
    reference count tells whether it is free. For one thread at a time.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Like torch.empty, on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        block = next((b for b in self._blocks if b.nbytes == num_bytes and sys.getrefcount(b) == _UNUSED), None)
        if block is None:
            block = np.empty(num_bytes, np.uint8)
            # The oldest blocks go first: of a size no longer asked for, or held by someone for long.
            self._blocks = [*self._blocks[1 - _MOST_BLOCKS :], block]
        return torch.from_numpy(block).view(dtype).view(shape)


def _references_when_unused() -> int:
    """What sys.getrefcount says, within `empty`, of a block that only the list holds: differs between Pythons."""
    blocks = [np.empty(0, np.uint8)]
    return next(sys.getrefcount(b) for b in blocks)


_UNUSED = _references_when_unused()
