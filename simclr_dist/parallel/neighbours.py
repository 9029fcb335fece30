"""Collectives among CPU processes of one machine, over sockets between each two of them. Linux.

gloo hands each collective to threads of its own. They wait for a core while every core computes: nearly half of the
demo's step on two cores (benchmarks/cpu_step.py). A step with global BatchNorm makes two calls for each such layer.
Here the calling thread sends and receives by itself.

Letters as in distributed.py.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

_GREETING_S = 60.0
_YIELDS = 50
"""How often a waiting process lets others go first before it sleeps: waking up takes longer than most waits."""
_FEW_BYTES = 64 * 2**10
_HEAD_BYTES = 48
Combine = Callable[[Tensor, Tensor], Tensor]
Transfer = Callable[[socket.socket, list[memoryview]], int]


class Neighbours:
    """Open connections to the other ranks. As for all collectives, every rank makes the same calls in the same order.

    Raises RuntimeError where they do not, ConnectionError when a rank ends, TimeoutError when one does not come.
    """

    def __init__(self, own_rank: int, peers: Mapping[int, socket.socket]) -> None:
        self.timeout_s = float("inf")
        self._rank, self._W = own_rank, len(peers) + 1
        self._peers = dict(peers)
        for peer in self._peers.values():
            peer.setblocking(False)

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of every rank as [W*n, ...]."""
        x = x.contiguous()
        gathered = x.new_empty((self._W, *x.shape))
        gathered[self._rank] = x
        self._exchange("all_gather", dict.fromkeys(self._peers, x), {peer: gathered[peer] for peer in self._peers})
        return gathered.flatten(0, 1)

    def all_to_all(self, parts: Tensor) -> Tensor:
        """parts [W, ...], one for each rank, to what each rank had for this one, [W, ...]."""
        received = parts.clone(memory_format=torch.contiguous_format)
        outgoing = {p: parts[p].contiguous() for p in self._peers}
        self._exchange("all_to_all", outgoing, {p: received[p] for p in self._peers})
        return received

    def all_reduce_(self, x: Tensor, combine: Combine = torch.add) -> Tensor:
        """Combines x of all ranks in the order of ranks, in place: the same bytes on each.

        Large tensors travel as in a ring, 2 (W-1)/W times their bytes from each rank, small ones in one round.
        """
        flat = x.reshape(-1)
        if self._W == 2 or flat.nbytes <= _FEW_BYTES:
            total = _in_order(self.all_gather(flat).view(self._W, -1), combine)
        else:
            parts = torch.nn.functional.pad(flat, (0, -len(flat) % self._W)).view(self._W, -1)
            total = self.all_gather(_in_order(self.all_to_all(parts), combine))[: len(flat)]
        return x.copy_(total.view_as(x))

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _exchange(self, name: str, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Sends to and fills from each peer, both at once: no two ranks can wait for each other's buffers.

        A head before each tensor says what it is: where ranks call different collectives, bytes would be taken for what
        they are not. Whoever expects the fewer then knows.
        """
        to_send = {p: [memoryview(_head(name, x)), *_bytes_of(x)] for p, x in outgoing.items()}
        heads = {p: bytearray(_HEAD_BYTES) for p in incoming}
        to_fill = {p: [memoryview(heads[p]), *_bytes_of(x)] for p, x in incoming.items()}
        deadline, yields = time.monotonic() + self.timeout_s, 0
        while to_send or to_fill:
            if self._move(to_send, socket.socket.sendmsg) + self._move(to_fill, _receive):
                yields = 0
            elif yields < _YIELDS:
                yields += 1
                os.sched_yield()
            else:
                self._wait(to_send, to_fill, deadline)
        for peer, head in heads.items():
            own, others = (text.decode().strip() for text in (_head(name, incoming[peer]), head))
            if own != others:
                raise RuntimeError(
                    f"rank {self._rank} calls {own}, rank {peer} {others}: all ranks must make the same calls in the "
                    "same order"
                )

    def _move(self, left: dict[int, list[memoryview]], transfer: Transfer) -> int:
        """Sends or receives what can be at once, and takes it from `left`; how many bytes."""
        moved = 0
        for peer, views in list(left.items()):
            try:
                n = transfer(self._peers[peer], views)
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                n = 0
            if n == 0:
                raise ConnectionError(f"rank {self._rank}: Connection closed by peer: rank {peer} has ended")
            moved += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if views:
                views[0] = views[0][n:]
            else:
                del left[peer]
        return moved

    def _wait(self, to_send: Collection[int], to_fill: Collection[int], deadline: float) -> None:
        """Until something can be sent or has come."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            slow = ", ".join(map(str, sorted({*to_send, *to_fill})))
            raise TimeoutError(f"Timed out waiting for rank {slow} after {self.timeout_s:g} s")
        events = select.poll()
        for peer in {*to_send, *to_fill}:
            events.register(self._peers[peer], (peer in to_send) * select.POLLOUT | (peer in to_fill) * select.POLLIN)
        events.poll(min(1000 * left_s, 2**30))


def _in_order(rows: Tensor, combine: Combine) -> Tensor:
    """rows [W, n] to [n], from rank 0 on."""
    total = rows[0]
    for row in rows[1:]:
        total = combine(total, row)
    return total


def _receive(peer: socket.socket, views: list[memoryview]) -> int:
    return peer.recvmsg_into(views)[0]


def _head(name: str, x: Tensor) -> bytes:
    return f"{name} of {x.numel()} {str(x.dtype).removeprefix('torch.')}".encode().ljust(_HEAD_BYTES)


def _bytes_of(x: Tensor) -> list[memoryview]:
    """The memory of a contiguous x, in one piece; none where it has no elements."""
    return [x.reshape(-1).view(torch.uint8).numpy().data] if x.numel() else []


# ---------------------------------------------------------------------------------------------------------------------
# Meeting


class Door:
    """Where the other ranks knock. meeting: a name for this group alone. Other users of the machine are turned away."""

    def __init__(self, own_rank: int, meeting: str) -> None:
        self._rank, self._meeting = own_rank, meeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_address(meeting, own_rank))
        self._listener.listen()

    def meet(self, world_size: int) -> Neighbours:
        """Connects all ranks, whose doors must be open. Raises OSError."""
        peers: dict[int, socket.socket] = {}
        with ExitStack() as stack:
            for rank in range(self._rank):
                peers[rank] = stack.enter_context(socket.socket(socket.AF_UNIX))
                peers[rank].settimeout(_GREETING_S)
                peers[rank].connect(_address(self._meeting, rank))
                peers[rank].sendall(self._rank.to_bytes(4, "big"))
            self._listener.settimeout(_GREETING_S)
            while len(peers) < world_size - 1:
                peer = self._listener.accept()[0]
                if _user_of(peer) != os.geteuid():
                    peer.close()
                    continue
                stack.enter_context(peer).settimeout(_GREETING_S)
                rank = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
                if rank in peers or not self._rank < rank < world_size:
                    raise OSError(f"a process that is none of the training's answers as rank {rank}")
                peers[rank] = peer
            stack.pop_all()  # they stay open
        return Neighbours(self._rank, peers)

    def close(self) -> None:
        self._listener.close()


def _address(meeting: str, rank: int) -> bytes:
    """In Linux's abstract namespace: no file to find, to protect or to remove."""
    return f"\0simclr_dist-{meeting}-{rank}".encode()


def _user_of(peer: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)
