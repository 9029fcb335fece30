"""The only module that uses torch.distributed. Every function also works in a single process.

Letters: W the world size, n rows of this rank, N = W*n rows of all.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_dist.parallel.host_copy import copy_to_host
from simclr_dist.parallel.neighbours import Combine, Door, Neighbours

T = TypeVar("T")
MOST_BYTES_OF_A_TEXT = 1024
_BYTES_A_MESSAGE = 64 * 2**20
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_met: tuple[object, Neighbours] | None = None
"""A process group, and the connections of its processes."""


@dataclass(frozen=True)
class World:
    """The rank of this process, and how many there are. local_*: among the processes of this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> World:
    """From the process group if there is one, else from the launcher's environment variables, else one process."""
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), *local)
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), *local)


def rank() -> int:
    return dist.get_rank() if is_initialized() and not _ALONE.get() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() and not _ALONE.get() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process computes for itself: the other functions do what they do in a single process."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def group() -> object | None:
    """The process group, to be told from another; None if there is none."""
    return dist.group.WORLD if is_initialized() else None


def meet_neighbours(timeout_s: float) -> None:
    """From now on CPU processes that share one machine exchange tensors by sockets of their own (neighbours.py).

    All ranks call it together, once there is a process group. timeout_s: of every collective. Where one rank cannot
    reach another so, all stay with gloo, whose results are the same, and the main process warns.
    """
    global _met
    here = world()
    on_one_machine = sys.platform == "linux" and 1 < here.size == here.local_size
    if not is_initialized() or not on_one_machine or dist.get_backend() != "gloo" or _neighbours() is not None:
        return
    meeting = broadcast_text_from_main(secrets.token_hex(16), torch.device("cpu"))
    door, failure = _attempt(lambda: Door(here.rank, meeting))
    failed = first_text(failure, "cpu")
    if door is not None and failed is None:
        found, failure = _attempt(lambda: door.meet(here.size))
        failed = first_text(failure, "cpu")
        if found is not None and failed is None:
            found.timeout_s = timeout_s
            _met = group(), found
        elif found is not None:
            found.close()
    if door is not None:
        door.close()
    if failed is not None and here.is_main:
        warnings.warn(f"collectives go through gloo, which is slower: rank {failed[0]} {failed[1]}", stacklevel=2)


def _attempt(build: Callable[[], T]) -> tuple[T | None, str | None]:
    """What was built, or why not."""
    try:
        return build(), None
    except OSError as error:
        return None, f"cannot reach the others by sockets: {error}"


def _neighbours() -> Neighbours | None:
    """Those of the process group there is."""
    return _met[1] if _met is not None and _met[0] is group() else None


def _direct(x: Tensor) -> Neighbours | None:
    """What exchanges x, if it is not torch.distributed."""
    return _neighbours() if x.device.type == "cpu" else None


def average_gradients_directly(model: nn.Module) -> None:
    """Of a DistributedDataParallel, where its processes have met; the same sums as its own."""
    if not isinstance(model, nn.parallel.DistributedDataParallel) or (neighbours := _neighbours()) is None:
        return

    def average(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(neighbours.all_reduce_(bucket.buffer().div_(world_size())))
        return done

    model.register_comm_hook(None, lambda _, bucket: average(bucket))  # torch cannot read annotations kept as strings


def all_gather_async(x: Tensor) -> Callable[[], Tensor]:
    """Starts gathering x [n, ...] of every rank; call the result to wait for [W*n, ...], in the order of ranks.

    Carries no gradient. All ranks need the same shape.
    """
    if world_size() == 1:
        return lambda: x
    x = x.detach().contiguous()
    if (neighbours := _direct(x)) is not None:
        found = neighbours.all_gather(x)
        return lambda: found
    gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    handle = dist.all_gather_into_tensor(gathered, x, async_op=True)
    assert handle is not None

    def wait() -> Tensor:
        handle.wait()
        return gathered

    return wait


def all_gather(x: Tensor) -> Tensor:
    """x [n, ...] of every rank as [W*n, ...]; no gradient."""
    return all_gather_async(x)()


def all_reduce_sum_(x: Tensor) -> Tensor:
    """Sums x over all ranks, in place; no gradient."""
    return _all_reduce_(x, torch.add, dist.ReduceOp.SUM)


def _all_reduce_(x: Tensor, combine: Combine, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return x
    if (neighbours := _direct(x)) is not None:
        return neighbours.all_reduce_(x.detach(), combine)
    dist.all_reduce(x, op=op)
    return x


def all_reduce_sum_many_(tensors: Iterable[Tensor]) -> None:
    """Sums each over all ranks, in place, by few messages of some 64 MiB; no gradient. All ranks in the same order."""
    if world_size() == 1:
        return
    parts: list[list[Tensor]] = []
    num_bytes = _BYTES_A_MESSAGE
    for x in tensors:
        if num_bytes + x.nbytes > _BYTES_A_MESSAGE or x.dtype != parts[-1][-1].dtype:
            parts.append([])
            num_bytes = 0
        parts[-1].append(x)
        num_bytes += x.nbytes
    for part in parts:
        flat = all_reduce_sum_(torch.cat([x.reshape(-1) for x in part]))
        for x, summed in zip(part, flat.split([x.numel() for x in part]), strict=True):
            x.copy_(summed.view(x.shape))


def all_reduce_tree(x: Tensor) -> Tensor:
    """The sum of x [n] over all ranks, in the order of a binary tree: ((0 + 1) + (2 + 3)) + ...; no gradient.

    W must be a power of two. Each rank adds up one part of x; it sends as much as for an all-reduce.
    """
    W = world_size()
    if W == 1:
        return x
    parts = torch.nn.functional.pad(x, (0, -len(x) % W)).view(W, -1)
    if (neighbours := _direct(x)) is not None:
        sums = neighbours.all_to_all(parts)
    else:
        sums = torch.empty_like(parts)
        dist.all_to_all_single(sums, parts)
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return all_gather(sums).flatten()[: len(x)]


def all_reduce_max_(x: Tensor) -> Tensor:
    """The elementwise maximum over all ranks, in place; no gradient."""
    return _all_reduce_(x, torch.maximum, dist.ReduceOp.MAX)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """For numbers that must not hold up the device's work."""
    return torch.cuda.Stream(device)


def agree_on_max(value: int, device: torch.device) -> Callable[[], int]:
    """Starts finding the largest `value` of all ranks; call the result to wait for it.

    Nothing of this device's own work waits, nor is waited for: on CUDA the numbers travel on a stream of their own. So
    a host that calls this at the start of a step and waits at the end can be a step ahead of its device.
    """
    if world_size() == 1:
        return lambda: value
    x = torch.tensor([value])
    if device.type != "cuda":
        if _neighbours() is not None:
            largest = int(all_reduce_max_(x))
            return lambda: largest
        handle = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
        assert handle is not None

        def wait() -> int:
            handle.wait()
            return int(x)

        return wait
    with torch.cuda.stream(_side_stream(device)):
        on_device = x.pin_memory().to(device, non_blocking=True)
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX)  # queued; the host does not wait
        answer = copy_to_host(on_device)
    return lambda: int(answer())


def first_failing_rank(failed: bool, device: torch.device | str) -> int | None:
    """The lowest rank with failed=True, the same on every rank; None if no rank failed."""
    distance = torch.tensor([world_size() - rank() if failed else 0], device=device)
    worst = int(all_reduce_max_(distance))
    return world_size() - worst if worst else None


def first_text(text: str | None, device: torch.device | str) -> tuple[int, str] | None:
    """The text of the lowest rank that has one, cut to MOST_BYTES_OF_A_TEXT, and that rank; the same on every rank."""
    first = first_failing_rank(text is not None, device)
    if first is None or world_size() == 1:
        return None if text is None else (0, text)
    content = torch.zeros(MOST_BYTES_OF_A_TEXT, dtype=torch.uint8)
    if first == rank() and text is not None:
        written = text.encode("utf-8", "replace")[:MOST_BYTES_OF_A_TEXT]
        content[: len(written)] = torch.tensor(list(written), dtype=torch.uint8)
    content = content.to(device)
    dist.broadcast(content, src=first)
    return first, bytes(content.tolist()).rstrip(b"\0").decode("utf-8", "ignore")


def set_timeout(seconds: float) -> None:
    """From now on a collective that takes longer fails."""
    if world_size() == 1:
        return
    if (neighbours := _neighbours()) is not None:
        neighbours.timeout_s = seconds
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timedelta(seconds=seconds))
    else:  # torch before 2.15 has no public name for it
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def barrier() -> None:
    """Returns when all ranks have called it: the host waits, also with NCCL."""
    if world_size() > 1:
        # An all-reduce of one number: dist.barrier() would have to guess the device.
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )
        all_reduce_sum_(torch.zeros(1, device=device)).item()


def broadcast_from_main_(x: Tensor) -> Tensor:
    """Overwrites x with rank 0's value, in place."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def broadcast_text_from_main(text: str, device: torch.device) -> str:
    """Rank 0's text, on every rank."""
    if world_size() == 1:
        return text
    content = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    length = int(broadcast_from_main_(torch.tensor([len(content)], device=device)))
    if rank() != 0:
        content = torch.empty(length, dtype=torch.uint8, device=device)
    return bytes(broadcast_from_main_(content).cpu().numpy()).decode()


def shut_down() -> None:
    """Ends the process group after success. Not for use after an error: it waits for the other ranks."""
    global _met
    if is_initialized():
        barrier()
        if (neighbours := _neighbours()) is not None:
            neighbours.close()
            _met = None
        dist.destroy_process_group()


@dataclass(frozen=True)
class AgentEnd:
    """How an agent ended: its exit code, and the first of its workers that failed, if one has."""

    code: int
    failed_rank: int | None = None
    how: str = ""


def run_agent(run: Callable[[], object]) -> AgentEnd:
    """Runs what starts and watches workers (torchrun, `accelerate launch`) without their tracebacks."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return AgentEnd(1, rank, f"rank {rank} {_ended(failure.exitcode)}")
    except subprocess.CalledProcessError as error:  # a single worker
        return AgentEnd(1, 0, f"the training {_ended(error.returncode)}")
    except SignalException as error:
        return AgentEnd(128 + int(error.sigval))
    return AgentEnd(0)


def _ended(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
