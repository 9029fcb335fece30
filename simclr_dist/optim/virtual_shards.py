"""The same bytes on any number of processes: the global batch is cut into shards, and each is always computed alone.

Floating-point sums depend on their order, and so on how many rows a process has. Here nothing does: a shard is as large
on one process as on many, and whatever is added up over the batch is added shard by shard, along one binary tree.

    shard        0     1     2     3     4     5     6     7          S = 8
    W = 2        └───── rank 0 ────┘     └───── rank 1 ────┘
                 └──+──┘     └──+──┘     └──+──┘     └──+──┘
                    └─────+─────┘           └─────+─────┘             inside a rank
                          └───────────+───────────┘                   between ranks

S and W are powers of two. The passes are those of micro_batch.py, with a shard for a micro-batch. The loss is that of
the global batch: every rank computes the whole of it from the rows of all, as one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dist.optim.micro_batch import running_statistics_stay, tracking_norms
from simclr_dist.parallel import distributed


class TreeSum:
    """The sum of a vector over the shards of all ranks. Every rank adds the vectors of its shards, in their order."""

    def __init__(self) -> None:
        self._subtrees: list[tuple[int, Tensor]] = []

    def add(self, x: Tensor) -> None:
        """x [n] is kept, and may be changed."""
        shards = 1
        while self._subtrees and self._subtrees[-1][0] == shards:
            x = self._subtrees.pop()[1].add_(x)
            shards *= 2
        self._subtrees.append((shards, x))

    def of_rank(self) -> Tensor:
        """[n]: of the vectors that this rank has added, a power of two of them."""
        ((_, own),) = self._subtrees
        return own

    def total(self) -> Tensor:
        """[n], the same on every rank. All ranks together."""
        return distributed.all_reduce_tree(self.of_rank())


class VirtualShards:
    """The gradient of `network`, not wrapped by DDP, over a global batch that is cut into `num_shards`."""

    def __init__(self, network: nn.Module, num_shards: int) -> None:
        self.network = network
        self.num_shards = num_shards

    def backward(
        self,
        views: Tensor,
        ids: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        begin_shard: Callable[[int], None],
        row_keys: Tensor | None = None,
        loss_parameters: Iterable[Tensor] = (),
        backward: Callable[[Tensor], Any] = Tensor.backward,
        observe: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """Sets the gradient of loss_fn(z of the global batch) on every rank, and returns the loss, detached.

        views: [V, B, ...], this rank's images. ids: [B], given to the loss beside z. All ranks have equally many.
        loss_fn: z [V*G, K], view after view, in float32 at least, and ids [G] -> scalar.
        begin_shard: called with a shard's number before each of its two passes: to seed what draws from a generator.
        loss_parameters: those of the network that `loss_fn` uses; their gradient is whole on every rank.
        row_keys, backward, observe: as in `backward_in_micro_batches`.
        """
        shards = self._cut(views, row_keys)
        z_parts = []
        with torch.no_grad(), self._statistics_of_shards() as end_shard:
            for number, rows in shards:
                begin_shard(number)
                output = self.network(*rows)
                end_shard()
                z_parts.append(_z_of(output).unflatten(0, (len(views), -1)))
                if observe is not None:
                    observe(output)
        torch.clear_autocast_cache()  # its copies of the weights were made without a graph

        loss, z_gradients = _loss_of_all_rows(z_parts, ids, loss_fn, backward)
        of_loss = {id(p) for p in loss_parameters}
        parameters = [p for p in self.network.parameters() if p.requires_grad and id(p) not in of_loss]
        gradient = TreeSum()
        with running_statistics_stay(self.network):
            for (number, rows), z_gradient in zip(shards, z_gradients, strict=True):
                begin_shard(number)
                z = _z_of(self.network(*rows))
                z.backward(z_gradient.flatten(0, 1).to(z.dtype))
                gradient.add(_take_gradients(parameters))
        _set_gradients(parameters, gradient.total())
        return loss

    def _cut(self, views: Tensor, row_keys: Tensor | None) -> list[tuple[int, list[Tensor]]]:
        """This rank's shards, numbered among all: rows [V*b, ...], laid out alike in memory whatever W is."""
        own = self.num_shards // distributed.world_size()
        size = views.shape[1] // own
        parts = [x.split(size, dim=1) for x in (views, row_keys) if x is not None]
        rows = [[x.flatten(0, 1).contiguous() for x in shard] for shard in zip(*parts, strict=True)]
        return list(enumerate(rows, start=own * distributed.rank()))

    @contextmanager
    def _statistics_of_shards(self) -> Iterator[Callable[[], None]]:
        """Running statistics move by one step, to the mean of the shards'. Call what it yields after each shard."""
        norms = tracking_norms(self.network)
        if not norms:
            yield lambda: None
            return
        momenta = [norm.momentum for norm in norms]
        before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
        moments = [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]
        sums = TreeSum()
        for norm in norms:
            norm.momentum = 1.0  # running statistics are then those of the last pass
        try:
            yield lambda: sums.add(torch.cat(moments))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        means = iter((sums.total() / self.num_shards).split([len(x) for x in moments]))
        for norm, old in zip(norms, before, strict=True):
            count = old[-1] + 1
            step = norm.momentum if norm.momentum is not None else (1 / count).to(old[0].dtype)
            new = [x.lerp_(next(means), step) for x in old[:-1]]
            for buffer, value in zip(norm.buffers(recurse=False), (*new, count), strict=True):
                buffer.copy_(value)


def _z_of(output: Any) -> Tensor:
    z: Tensor = output[-1] if isinstance(output, tuple) else output
    return z


def _loss_of_all_rows(
    z_parts: Sequence[Tensor],
    ids: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    backward: Callable[[Tensor], Any],
) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss, detached, and dL/dz like z_parts, [V, b, K] each. All rows stand in the order of images."""
    own = torch.cat(list(z_parts), dim=1)  # [V, B, K]
    V, B = own.shape[:2]
    z = distributed.all_gather(own.transpose(0, 1)).transpose(0, 1).flatten(0, 1)  # [V*G, K]
    z = z.to(torch.promote_types(z.dtype, torch.float32)).contiguous().requires_grad_()
    ids = distributed.all_gather(ids)
    first = B * distributed.rank()
    with distributed.alone():
        loss = loss_fn(z, ids)
        backward(loss)
    assert z.grad is not None
    return loss.detach(), z.grad.unflatten(0, (V, -1))[:, first : first + B].split(z_parts[0].shape[1], dim=1)


def _take_gradients(parameters: Sequence[Tensor]) -> Tensor:
    """All in one vector; afterwards there are none."""
    taken = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return taken


def _set_gradients(parameters: Sequence[Tensor], gradient: Tensor) -> None:
    """Each laid out in memory like its parameter, since norms are summed in that order."""
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = torch.empty_like(p, requires_grad=False).copy_(part.view_as(p))
