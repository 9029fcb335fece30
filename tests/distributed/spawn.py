"""Runs a function on several ranks of a gloo group on this machine."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from tests.fork_server import context, start


def run_ranks(world_size: int, target: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
    """`target(rank, world_size, *args)` in `world_size` fresh processes; what each returned, in the order of ranks.

    `target` must be importable (defined at a module's top). Raises AssertionError with the first failing rank's
    traceback, or when the ranks are not done after `timeout_s`.
    """
    with TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        store = str(Path(folder) / "store")
        ranks = [
            start(_rank_main, rank, world_size, store, timeout_s, results, target, args) for rank in range(world_size)
        ]
        try:
            answers = _collect(ranks, results, timeout_s + 30)  # 30 s: the first start imports torch
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
    return [answers[rank] for rank in range(world_size)]


def _collect(ranks: list[Any], results: Any, timeout_s: float) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(answers) < len(ranks):
        if not results.empty():
            rank, failure, value = results.get()
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            answers[rank] = pickle.loads(value)
            continue
        dead = [i for i, process in enumerate(ranks) if i not in answers and process.exitcode not in (None, 0)]
        if dead and results.empty():
            raise AssertionError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}")
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(ranks))) - set(answers))
            raise AssertionError(f"no answer from ranks {missing} after {timeout_s:.0f} s")
        time.sleep(0.01)
    return answers


def _rank_main(
    rank: int, world_size: int, store: str, timeout_s: float, results: Any, target: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        value = target(rank, world_size, *args)
        results.put((rank, None, pickle.dumps(value)))  # by value: this process will be gone when it is read
        dist.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
