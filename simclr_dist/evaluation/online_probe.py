"""A linear classifier that learns beside the encoder and never touches it: how good is h by now?

It sees h without a gradient, so that pretraining with it is, byte for byte, pretraining without. What it says of
training images is an early sign: they are augmented, and h moves on while it learns. docs/evaluation.md has the way to
results.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.optim.virtual_shards import TreeSum
from simclr_dist.parallel import distributed

LEARNING_RATE = 1e-3


class ProbeError(Exception):
    """An update has failed on one of the ranks."""


class OnlineProbe:
    """softmax(h W^T + b), fitted by Adam to the labels of every global batch; the same on every rank.

    Letters: B images of a rank, V views, D width of h, C classes. All ranks must call `update` together. It never
    fails on one rank alone: the others learn of it by the same sum, and `recent_accuracy` tells them all.
    """

    def __init__(
        self, feature_dim: int, num_classes: int, device: torch.device | str, images_of_shard: int | None = None
    ) -> None:
        """images_of_shard: add up in shards, so that the sums do not depend on W (optim/virtual_shards.py)."""
        self.weight = nn.Parameter(torch.zeros(num_classes, feature_dim, device=device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device))
        self._optimizer = torch.optim.Adam([self.weight, self.bias], lr=LEARNING_RATE)
        self._counts = torch.zeros(3, device=device)  # labelled views, hits of the first, of the first five
        self._failures = torch.zeros(1, device=device)  # updates that failed on some rank
        self._failure: Exception | None = None  # of this rank
        self._images_of_shard = images_of_shard
        self.has_failed = False

    @torch.no_grad()
    def update(self, h: Tensor, labels: Tensor) -> None:
        """One step on h [V*B, D], view after view; labels int64 [B], those of -1 take no part."""
        try:
            own = self._own_sums(h, labels)
        except Exception as error:
            self._failure = error
            own = self.weight.new_zeros(self.weight.numel() + self.weight.shape[0] + 4)
            own[-1] = 1
        add_up = distributed.all_reduce_tree if self._images_of_shard else distributed.all_reduce_sum_
        sums = add_up(own)
        self._counts += sums[-4:-1]
        self._failures += sums[-1]
        mean = sums[:-4] / sums[-4].clamp_min(1)
        self.weight.grad = mean[: self.weight.numel()].view_as(self.weight)
        self.bias.grad = mean[self.weight.numel() :]
        self._optimizer.step()

    def _own_sums(self, h: Tensor, labels: Tensor) -> Tensor:
        """Of this rank: the gradient of weight and bias, labelled views, hits of the first and of the first five, 0."""
        size = self._images_of_shard or len(labels)
        sums = TreeSum()
        for rows, known_as in zip(
            h.unflatten(0, (-1, len(labels))).split(size, dim=1), labels.split(size), strict=True
        ):
            sums.add(self._sums(rows.flatten(0, 1), known_as))
        return sums.of_rank()

    def _sums(self, h: Tensor, labels: Tensor) -> Tensor:
        h, y = h.detach().float(), labels.to(h.device).repeat(len(h) // len(labels))
        known = y >= 0
        logits = self._logits(h)
        # The cross-entropy's gradient is written out: summed over the ranks it is that of the global batch, however
        # its labelled images are spread.
        slope = (logits.softmax(1) - F.one_hot(y.clamp_min(0), len(self.bias))) * known[:, None]
        counts = torch.stack([known.sum(), *_hits(logits, y).sum(0), torch.zeros_like(known.sum())])
        return torch.cat([(slope.T @ h).flatten(), slope.sum(0), counts])

    def recent_accuracy(self) -> tuple[float, float]:
        """Top-1 and top-5 share of the labelled views since the last call, each seen before it was learnt from.

        NaN where there were none. All ranks call it together; raises ProbeError on all if an update failed on one.
        """
        labelled, first, first_five, failures = torch.cat([self._counts, self._failures]).tolist()
        self._counts.zero_()
        if failures:
            reason = None if self._failure is None else f"{type(self._failure).__name__}: {self._failure}"
            rank, said = distributed.first_text(reason, self._counts.device) or (0, "")
            self.has_failed = True
            raise ProbeError(f"on rank {rank}: {said}" if distributed.world_size() > 1 else said)
        return (first / labelled, first_five / labelled) if labelled else (float("nan"), float("nan"))

    @torch.no_grad()
    def top1(self, h: Tensor, labels: Tensor) -> float:
        """Share of the labelled rows of h [n, D] that are classified as labels int64 [n] says; NaN if none is."""
        known = labels >= 0
        logits = self._logits(h[known].to(self.weight))
        return float(_hits(logits, labels[known].to(logits.device))[:, 0].float().mean())

    def _logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight, self.bias)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "weight": self.weight.detach(),
            "bias": self.bias.detach(),
            "counts": self._counts,
            **{
                f"{name}/{key}": value
                for at, name in enumerate(("weight", "bias"))
                for key, value in moments.get(at, {}).items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the state is that of other classes or another width of h."""
        own = {"weight": self.weight.data, "bias": self.bias.data, "counts": self._counts}
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"{name} of the online probe: expected the shape {tuple(tensor.shape)}, found {found}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for at, name in enumerate(("weight", "bias")):
            mine = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            if mine:  # there are none before the first step
                moments[at] = mine
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is first, and among the first five, bool [n, 2]; -1 never is."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([found[:, 0], found.any(1)], dim=1)
