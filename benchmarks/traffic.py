"""Counts the bytes that code sends in collectives."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountTraffic(TorchDispatchMode):
    """Records every collective with the bytes that a rank sends for it in a ring."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.collectives: list[tuple[str, float]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name, others = function._opname, self.world_size - 1
            if name == "_allgather_base_":
                sent = others * args[1].nbytes
            elif name == "alltoall_base_":
                sent = others / self.world_size * args[1].nbytes
            elif name == "allreduce_":
                sent = 2 * others / self.world_size * sum(x.nbytes for x in args[0])
            else:
                raise AssertionError(f"an unexpected collective: {name}")
            self.collectives.append((name, sent))
        return function(*args, **(kwargs or {}))

    @property
    def sent(self) -> float:
        return sum(sent for _, sent in self.collectives)
