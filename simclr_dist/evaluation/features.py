"""Features: h of images from a frozen encoder, computed once and shared by all evaluations.

Letters: n images, D width of h, W world size.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from simclr_dist.config import Precision
from simclr_dist.errors import DataError
from simclr_dist.network.precision import autocast
from simclr_dist.parallel import distributed
from simclr_dist.parallel.host_copy import on_host
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

ImageBatch = tuple[Tensor, Tensor, Tensor]  # images uint8 [b, H, W, 3], labels int64 [b], sample ids int64 [b]
Normalize = Callable[[Tensor], Tensor]  # uint8 [b, H, W, 3] -> float [b, 3, H, W]

GATHER_ROWS = 16_384  # rows of a rank on the device at once: 2 GiB over 16 ranks at D = 2048


@dataclass(frozen=True)
class Features:
    """h [n, D], float32 or float16; labels int64 [n] (-1: none), sample_ids int64 [n]; on the CPU, by image."""

    h: Tensor
    labels: Tensor
    sample_ids: Tensor

    def __post_init__(self) -> None:
        n = self.h.shape[0]
        if self.h.ndim != 2 or self.labels.shape != (n,) or self.sample_ids.shape != (n,):
            shapes = tuple(self.h.shape), tuple(self.labels.shape), tuple(self.sample_ids.shape)
            raise ValueError(f"h [n, D], labels [n] and sample_ids [n] do not fit together: {shapes}")

    def __len__(self) -> int:
        return self.h.shape[0]

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(self.h[rows], self.labels[rows], self.sample_ids[rows])


def digest(module: nn.Module) -> str:
    """A hash of every parameter and buffer with its name, type and shape: equal only if bit-identical."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, because numpy has no bfloat16; flat first, because a scalar has no last axis to split.
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[nn.Module]:
    """The encoder in evaluation mode, afterwards in the modes of before.

    Raises RuntimeError when a parameter or a BatchNorm buffer has changed inside.
    """
    modes = {module: module.training for module in encoder.modules()}
    before = digest(encoder)
    encoder.eval()
    try:
        yield encoder
    finally:
        for module, training in modes.items():
            module.training = training
    if digest(encoder) != before:
        raise RuntimeError("the encoder changed while it was evaluated: a parameter or BatchNorm buffer was written to")


def extract_features(
    encoder: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    normalize: Normalize,
) -> Features:
    """h of all images in `batches`, in their order. The encoder must be on `device` already.

    Raises DataError when there are no images or when h is not finite.
    """
    features = _extract(encoder, batches, device=device, precision=precision, normalize=normalize)
    if features is None:
        raise DataError("there are no images to compute features of")
    return features


def _extract(
    encoder: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device | str,
    precision: Precision,
    normalize: Normalize,
) -> Features | None:
    """None where there are no images."""
    with frozen(encoder), torch.no_grad(), autocast(device, precision):
        parts = list(encode(encoder, batches, device=device, normalize=normalize))
    if not parts:
        return None
    labels, sample_ids = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    h_parts = [h for h, *_ in parts]
    parts.clear()
    features = Features(_joined(h_parts), labels, sample_ids)
    bad_rows = ~torch.isfinite(features.h).all(dim=1)
    if bad_rows.any():
        refuse_non_finite(int(bad_rows.sum()), len(features), int(features.sample_ids[bad_rows][0]), precision)
    return features


def encode(
    encoder: nn.Module, batches: Iterable[ImageBatch], *, device: torch.device | str, normalize: Normalize
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """h float32 [b, D], labels and sample ids of each batch on the CPU, while the device computes the next one."""
    facts: deque[tuple[Tensor, Tensor]] = deque()

    def encoded() -> Iterator[Tensor]:
        for images, labels, sample_ids in batches:
            h = encoder(normalize(images.to(device, non_blocking=True))).float()
            facts.append((labels.cpu(), sample_ids.cpu()))
            yield h

    for h in on_host(encoded()):
        yield h, *facts.popleft()


def refuse_non_finite(
    count: int, n: int, first: int, precision: Precision, dtype: torch.dtype = torch.float32
) -> NoReturn:
    """Raises DataError. first: the sample id of one of the `count` images."""
    raise DataError(
        f"the encoder gives NaN or infinite features for {count} of {n} images (first: sample {first}); "
        + ("" if precision == "fp32" else "evaluate with precision fp32, or ")
        + ("" if dtype == torch.float32 else "keep features in float32, or ")
        + "take an earlier checkpoint"
    )


def check_given(ids: np.ndarray, found: np.ndarray) -> None:
    """Raises DataError unless a loader that was asked for `ids` gave these, or some of them, in their order."""
    if not np.array_equal(found, ids[np.isin(ids, found)]):
        raise DataError(f"asked for {len(ids)} samples from {ids[0]} on, the loader gave {len(found)} others")


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat that empties `parts` as it copies: the rows are in memory once, not twice."""
    rows = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    end = len(rows)
    while parts:
        last = parts.pop()
        rows[end - len(last) : end] = last
        end -= len(last)
    return rows


def part_of_rank(num_samples: int, rank: int, world_size: int) -> np.ndarray:
    """The contiguous ids int64 that a rank computes; all but the last ranks get ceil(n / W)."""
    share = -(-num_samples // world_size)
    return np.arange(min(rank * share, num_samples), min((rank + 1) * share, num_samples), dtype=np.int64)


def extract_features_distributed(
    encoder: nn.Module,
    load: Callable[[np.ndarray], Iterable[ImageBatch]],
    samples: int | np.ndarray,
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    normalize: Normalize,
) -> Features:
    """h of samples 0..samples-1, or of the ids int64 in `samples`, on every rank; each has computed a contiguous part.

    `load(ids)` yields the images of these ids in order, and may leave out some: their rows are missing then.
    If a rank fails, all raise: the first of them its own exception, the others FailedElsewhereError. Raises DataError
    when no image is left.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    everything = np.arange(samples, dtype=np.int64) if isinstance(samples, int) else samples
    ids = everything[part_of_rank(len(everything), rank, world_size)]
    share = -(-len(everything) // world_size)

    def extract() -> Features | None:
        own = (
            _extract(encoder, load(ids), device=device, precision=precision, normalize=normalize) if len(ids) else None
        )
        check_given(ids, own.sample_ids.numpy() if own else ids[:0])
        return own

    own = run_on_all_ranks(extract, device, catch=Exception)
    width = int(distributed.all_reduce_max_(torch.tensor([own.h.shape[1] if own else 0], device=device)))
    if width == 0:
        raise DataError(f"none of {len(everything):,} images can be read")
    if world_size == 1:
        assert own is not None
        return own

    def make_room() -> list[tuple[Tensor, Tensor]]:
        """The rows of this rank, padded, and room for those of all; rows without an image have the number -1."""
        mine = own or Features(torch.empty(0, width), *torch.empty(2, 0, dtype=torch.int64))
        return [
            (
                torch.cat([x, x.new_full((share - len(mine), *x.shape[1:]), -1)]),
                x.new_empty(world_size, share, *x.shape[1:]),
            )
            for x in (mine.h, mine.labels, mine.sample_ids)
        ]

    h, labels, sample_ids = (
        _gather_rows(padded, room, device) for padded, room in run_on_all_ranks(make_room, device, catch=Exception)
    )
    found = sample_ids >= 0
    return Features(h, labels, sample_ids) if found.all() else Features(h[found], labels[found], sample_ids[found])


def gather_facts(facts: Iterable[Tensor], share: int, device: torch.device | str) -> Iterator[Tensor]:
    """int64 [n_r] of each rank, without negative numbers in the last of them, joined. share: the most of a rank."""
    padded = [torch.cat([x, x.new_full((share - len(x),), _NONE)]) for x in facts]
    gathered = [distributed.all_gather(x.to(device)).cpu() for x in padded]
    return (x[gathered[-1] != _NONE] for x in gathered)


_NONE = -(2**62)


def _gather_rows(padded: Tensor, room: Tensor, device: torch.device | str) -> Tensor:
    """The rows of all ranks on the CPU, [W*n, ...]; a few at a time, so that the device never holds them all.

    padded: this rank's, [n, ...]. room: where they go, [W, n, ...].
    """
    for start in range(0, len(padded), GATHER_ROWS):
        part = padded[start : start + GATHER_ROWS].to(device)
        gathered = distributed.all_gather(part).unflatten(0, (len(room), part.shape[0]))
        room[:, start : start + GATHER_ROWS] = gathered.cpu()
    return room.flatten(0, 1)
