"""CPU processes of one machine exchange tensors by themselves: as torch.distributed does, and failing as loudly."""

from __future__ import annotations

import os
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from benchmarks.traffic import CountTraffic
from simclr_dist.parallel import distributed, neighbours
from simclr_dist.parallel.neighbours import Door, Neighbours
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed

BEYOND_A_SOCKETS_BUFFER = 1_000_003


def meet(world_size: int, timeout_s: float = 60) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    distributed.meet_neighbours(timeout_s)


def samples(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(5, 3, generator=generator)
    return {
        "rows": rows,
        "a number": torch.tensor(7 * rank),
        "one of 0 rows": torch.empty(0, 3),
        "a view": rows.T[1:],
        "float64": rows.double(),
        "bfloat16": rows.bfloat16(),
        "int64": torch.tensor([2**40 + rank, -rank]),
        "large": torch.randn(BEYOND_A_SOCKETS_BUFFER, generator=generator),
    }


def _collectives(rank: int, world_size: int) -> tuple[dict[str, list[Tensor]], list[object]]:
    meet(world_size)
    found = {}
    with CountTraffic(world_size) as traffic:
        for name, x in samples(rank).items():
            gathered = distributed.all_gather(x) if x.dim() else x
            found[name] = [gathered, distributed.all_reduce_sum_(x.clone()), distributed.all_reduce_max_(x.clone())]
        found["by a tree"] = [distributed.all_reduce_tree(samples(rank)["rows"].flatten())] if world_size != 3 else []
        found["agreed"] = [torch.tensor(distributed.agree_on_max(rank, torch.device("cpu"))())]
    return found, list(traffic.collectives)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gathers_and_sums_are_those_of_all_ranks_in_their_order(world_size: int) -> None:
    answers = run_ranks(world_size, _collectives)
    inputs = [samples(rank) for rank in range(world_size)]
    for found, by_torch in answers:
        assert not by_torch
        assert found["agreed"] == [world_size - 1]
        rows = [one["rows"].flatten() for one in inputs]
        if world_size == 4:
            assert torch.equal(found["by a tree"][0], (rows[0] + rows[1]) + (rows[2] + rows[3]))
        for name, x in inputs[0].items():
            each = [one[name] for one in inputs]
            gathered, total, largest = found[name]
            if x.dim():
                assert torch.equal(gathered, torch.cat(each))
            expected = each[0]
            for one in each[1:]:
                expected = expected + one
            assert torch.equal(total, expected), name
            assert torch.equal(largest, torch.stack(each).amax(0) if x.numel() else x), name


def _gradients(rank: int, world_size: int, directly: bool) -> list[Tensor]:
    if directly:
        meet(world_size)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 3)))
    if directly:
        distributed.average_gradients_directly(model)
    x = torch.arange(float(world_size * 8)).view(world_size, 8)
    with CountTraffic(world_size) as traffic:
        model(x[rank : rank + 1]).square().sum().backward()
    assert bool(traffic.collectives) is not directly
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradients_are_averaged_as_ddp_averages_them() -> None:
    for own, torchs in zip(run_ranks(2, _gradients, True), run_ranks(2, _gradients, False), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(own, torchs, strict=True))


def _one_ends(rank: int, world_size: int) -> str | None:
    meet(world_size)
    if rank == 1:
        distributed._neighbours().close()  # type: ignore[union-attr]  # what Linux does for a process that ends
        return None
    with pytest.raises(ConnectionError) as error:
        distributed.all_gather(torch.ones(1))
    return str(error.value)


def test_a_rank_that_has_ended_is_named() -> None:
    assert run_ranks(2, _one_ends)[0] == "rank 0: Connection closed by peer: rank 1 has ended"


def _one_is_late(rank: int, world_size: int) -> str | None:
    meet(world_size)
    distributed.set_timeout(0.5)
    said = None
    if rank == 1:
        time.sleep(2)
    else:
        with pytest.raises(TimeoutError) as error:
            distributed.all_gather(torch.ones(1))
        said = str(error.value)
    distributed.set_timeout(60)
    return said


def test_a_rank_that_does_not_come_is_named_when_time_is_up() -> None:
    assert run_ranks(3, _one_is_late)[0] == "Timed out waiting for rank 1 after 0.5 s"


def _another_call(rank: int, world_size: int, elsewhere: str) -> str:
    meet(world_size)
    numbers = torch.ones(4)
    calls = {
        "more": lambda: distributed.all_reduce_sum_(torch.ones(300)),
        "of another type": lambda: distributed.all_reduce_sum_(numbers.int()),
        "another": lambda: distributed.all_reduce_tree(numbers.repeat(2)),
    }
    with pytest.raises((RuntimeError, ConnectionError)) as error:
        calls[elsewhere]() if rank else distributed.all_gather(numbers)
    distributed._neighbours().close()  # type: ignore[union-attr]
    return str(error.value)


@pytest.mark.parametrize(
    ("elsewhere", "found"),
    [
        ("more", "all_gather of 300 float32"),
        ("of another type", "all_gather of 4 int32"),
        ("another", "all_to_all of 4 float32"),
    ],
)
def test_bytes_of_another_call_are_not_taken(elsewhere: str, found: str) -> None:
    answers = run_ranks(2, _another_call, elsewhere)
    assert answers[0] == (
        f"rank 0 calls all_gather of 4 float32, rank 1 {found}: all ranks must make the same calls in the same order"
    )


def _cannot_meet(rank: int, world_size: int) -> tuple[Tensor, list[str], bool]:
    if rank == 1:

        def refuse(*_: object) -> Door:
            raise OSError("no such sockets here")

        distributed.Door = refuse  # type: ignore[misc, assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meet(world_size)
    said = [str(one.message) for one in caught]
    with CountTraffic(world_size) as traffic:
        total = distributed.all_reduce_sum_(torch.tensor([1.0 + rank]))
    return total, said, bool(traffic.collectives)


def test_where_one_cannot_reach_the_others_gloo_does_all_and_it_is_said() -> None:
    answers = run_ranks(2, _cannot_meet)
    assert all(total == 3 and by_gloo for total, _, by_gloo in answers)
    assert answers[0][1] == [
        "collectives go through gloo, which is slower: rank 1 cannot reach the others by sockets: no such sockets here"
    ]
    assert answers[1][1] == []


def _on_two_machines(rank: int, world_size: int) -> bool:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    distributed.meet_neighbours(60)
    with CountTraffic(world_size) as traffic:
        distributed.all_reduce_sum_(torch.ones(1))
    return bool(traffic.collectives)


def test_processes_of_several_machines_do_not_try() -> None:
    assert run_ranks(2, _on_two_machines) == [True, True]


def test_a_process_of_another_user_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    users = iter([os.geteuid() + 1, os.geteuid()])
    monkeypatch.setattr(neighbours, "_user_of", lambda _: next(users))
    doors = [Door(rank, "a test's meeting") for rank in range(2)]
    with socket.socket(socket.AF_UNIX) as stranger, ThreadPoolExecutor() as pool:
        stranger.connect(neighbours._address("a test's meeting", 0))
        stranger.sendall((1).to_bytes(4, "big"))
        met: list[Neighbours] = list(pool.map(lambda door: door.meet(2), doors))
        for one in met:
            one.timeout_s = 5  # or the test would wait for the stranger
        both = list(pool.map(lambda one, x: one.all_gather(torch.tensor([x])).tolist(), met, (5, 6)))
    for one in (*doors, *met):
        one.close()
    assert both == [[5, 6], [5, 6]]


def _listening(rank: int, world_size: int) -> list[str]:
    meet(world_size)
    distributed.barrier()
    with open("/proc/net/unix") as table:
        return [line for line in table if "simclr_dist-" in line and line.split()[3] == "00010000"]


def test_nobody_listens_once_all_have_met() -> None:
    """00010000 in Linux's table: a socket that listens."""
    assert run_ranks(2, _listening)[0] == []


def test_an_answer_of_no_rank_is_refused() -> None:
    door = Door(0, "another meeting")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(neighbours._address("another meeting", 0))
        stranger.sendall((7).to_bytes(4, "big"))
        with pytest.raises(OSError, match="answers as rank 7"):
            door.meet(2)
    door.close()
