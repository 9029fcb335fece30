"""The rows of a global batch: checked on all ranks, normalised to length one, gathered.

Letters: B images per device, V views, n = V*B rows of this rank, W ranks, N = n*W rows, G = B*W images, K the width
of z. Rank r holds the global rows r*n .. r*n + n - 1, view after view:

          rank 0            rank 1
    ┌───────┬───────┬───────┬───────┐
    │ view 0│ view 1│ view 0│ view 1│       row r*n + v*B + b is view v of image b of rank r;
    └───────┴───────┴───────┴───────┘       rows whose numbers differ by a multiple of B *inside*
      B rows  B rows  B rows  B rows        one rank show the same image
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_dist.parallel import distributed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHORTEST_ROW = 1e-12  # F.normalize's; a shorter row has no direction


class NonFiniteError(ValueError):
    """Rows of z are NaN or infinite. Raised on every rank, with `bad_rows`: {rank: (how many, the first)}."""

    def __init__(self, message: str, bad_rows: dict[int, tuple[int, int]]) -> None:
        super().__init__(message)
        self.bad_rows = bad_rows


@dataclass
class GlobalBatch:
    """The unit rows of this rank, and a function that waits for those of all ranks."""

    z: Tensor  # [n, K], unit rows of this rank, float32 or float64, differentiable
    all_rows: Callable[[], Tensor]  # waits for the rows [N, K] of all ranks
    ids: Tensor | None  # [G], the id of each image of the global batch
    duplicates: Tensor  # [], int64: how many images have an id that occurs earlier in the batch
    temperature: float
    num_views: int
    rank: int
    world_size: int
    grad_scale: float = 1.0  # factor on this rank's gradients: W where the training loop averages over ranks

    @property
    def num_rows(self) -> int:
        return self.z.shape[0]

    @property
    def num_all_rows(self) -> int:
        return self.z.shape[0] * self.world_size

    @property
    def num_images(self) -> int:
        return self.z.shape[0] // self.num_views

    @property
    def own(self) -> slice:
        """The rows of this rank within those of all ranks."""
        return slice(self.rank * self.num_rows, (self.rank + 1) * self.num_rows)

    def per_row(self, per_image: Tensor) -> Tensor:
        """[G] -> [N]: the value of each image, for each of its rows."""
        by_rank = per_image.view(self.world_size, 1, self.num_images)
        return by_rank.expand(-1, self.num_views, -1).reshape(-1)


def gather_batch(
    z: Tensor,
    temperature: float | Tensor,
    ids: Tensor | Sequence[int] | None,
    *,
    num_views: int,
    gather_dtype: torch.dtype,
    grad_reduction: str,
    implementation: int,
) -> GlobalBatch:
    """Checks z [V*B, K] and ids [B] with all ranks, and starts gathering them. ids: a tensor, a list or an array.

    One collective of a few numbers comes first, so that every rank learns of a fault on any rank and raises instead
    of waiting for ever. The host reads its result: the only time that the loss waits for the device.
    """
    ids = _as_tensor(ids, z.device)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    sound = z.ndim == 2 and z.dtype in DTYPES
    lengths = (
        torch.linalg.vector_norm(z.detach(), dim=1, dtype=dtype) if sound and z.numel() else z.new_zeros(0, dtype=dtype)
    )
    headers = distributed.all_gather(_header(z, lengths, temperature, ids, num_views, implementation)[None]).tolist()
    _raise_faults([Header(*row) for row in headers])
    own = Header(*headers[distributed.rank()])

    all_ids, duplicates = None, torch.zeros((), dtype=torch.int64, device=z.device)
    wait_for_ids = None
    if ids is not None:
        # int32 halves the bytes; a dataset of more than two billion images needs int64.
        small = all(Header(*row).ids_fit_int32 for row in headers)
        wait_for_ids = distributed.all_gather_async(ids.to(torch.int32 if small else torch.int64))
    rounds = gather_dtype.itemsize < torch.float32.itemsize and distributed.world_size() > 1
    sent_dtype = gather_dtype if rounds else dtype
    unit: Tensor = _UnitRows.apply(z, lengths[:, None], sent_dtype)  # type: ignore[no-untyped-call]
    wait_for_rows = distributed.all_gather_async(
        unit.detach().to(sent_dtype) if sent_dtype.itemsize < dtype.itemsize else unit
    )
    if wait_for_ids is not None:
        all_ids = wait_for_ids()
        in_order = all_ids.sort().values
        duplicates = (in_order[1:] == in_order[:-1]).sum()
    return GlobalBatch(
        unit,
        lambda: wait_for_rows().to(dtype),
        all_ids,
        duplicates,
        own.temperature,
        num_views,
        distributed.rank(),
        distributed.world_size(),
        grad_scale=distributed.world_size() if grad_reduction == "mean" else 1,
    )


def _as_tensor(ids: Tensor | Sequence[int] | None, device: torch.device) -> Tensor | None:
    """What is no list of numbers becomes a tensor that the check of all ranks refuses."""
    if ids is None or isinstance(ids, Tensor):
        return ids
    try:
        return torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0, 0, device=device)


def check_types(z: object, temperature: object) -> None:
    """Mistakes that are in the code, and so the same on every rank. Raises TypeError."""
    if not isinstance(z, Tensor):
        hint = "; the views go together: torch.cat([z0, z1])" if isinstance(z, tuple | list) else ""
        raise TypeError(f"z must be a tensor [views * B, K], found a {type(z).__name__}{hint}")
    if not isinstance(temperature, Tensor | Real):
        raise TypeError(f"the temperature must be a number, found {temperature!r}")


class _UnitRows(torch.autograd.Function):
    """x / |x|, rounded to the dtype that is sent, so that every rank computes with the same numbers.

    A row of zeros has no direction: it stays zero and receives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, sent_dtype: torch.dtype) -> Tensor:
        scale = torch.where(lengths > SHORTEST_ROW, 1 / lengths, 0)
        unit = x * scale
        unit = unit.to(sent_dtype).to(unit.dtype)
        ctx.save_for_backward(unit, scale)
        ctx.dtype = x.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        unit, scale = ctx.saved_tensors
        along = (unit * grad).sum(1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale).to(ctx.dtype), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Checks that all ranks make together


@dataclass(frozen=True)
class Header:
    """What a rank tells the others about its z and its settings, as integers. The first eight must agree."""

    ndim: int
    rows: int
    width: int
    dtype: int  # index in DTYPES; -1: another dtype
    num_views: int
    num_ids: int  # -1: no ids; else negative: see _FAULTS_OF_IDS
    implementation: int
    temperature_bits: int  # of the float64
    ids_fit_int32: int
    num_bad_rows: int
    first_bad_row: int

    @property
    def temperature(self) -> float:
        value: float = struct.unpack("<d", struct.pack("<q", self.temperature_bits))[0]
        return value


HEADER_BYTES = 8 * len(fields(Header))


def _header(
    z: Tensor, lengths: Tensor, temperature: float | Tensor, ids: Tensor | None, num_views: int, implementation: int
) -> Tensor:
    seems_a_view = [isinstance(x, Tensor) and x.ndim > 1 and x.shape == z.shape for x in (ids, temperature)]
    if any(seems_a_view):
        num_ids = _SECOND_VIEW
    elif isinstance(temperature, Tensor) and temperature.numel() != 1:
        num_ids = _MANY_TEMPERATURES
    elif ids is None:
        num_ids = -1
    elif ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        num_ids = _NO_IDS
    else:
        num_ids = ids.shape[0] if ids.device == z.device else _ON_ANOTHER_DEVICE
    shape = (*z.shape, 0, 0)[:2]
    dtype = DTYPES.index(z.dtype) if z.dtype in DTYPES else -1
    bits = 0 if isinstance(temperature, Tensor) else struct.unpack("<q", struct.pack("<d", temperature))[0]
    header = torch.tensor([z.ndim, *shape, dtype, num_views, num_ids, implementation, bits, 1, 0, 0])
    # From page-locked memory: an ordinary copy would make the host wait until the GPU has done the whole forward.
    header = header.pin_memory().to(z.device, non_blocking=True) if z.is_cuda else header.to(z.device)
    # Values that only the device knows are written there: the host then reads the device once.
    if isinstance(temperature, Tensor) and temperature.numel() == 1:
        header[7] = temperature.detach().to(torch.float64).view(torch.int64)
    if ids is not None and num_ids > 0:
        header[8] = ids.to(torch.int32).eq(ids).all()
    if len(lengths):
        bad = lengths.isfinite().logical_not_()
        header[9], header[10] = bad.sum(), bad.byte().argmax()
    return header


def _raise_faults(headers: list[Header]) -> None:
    """Raises if anything is wrong on any rank, with the same message on every rank."""
    faults = [f"rank {r}: {fault}" for r, header in enumerate(headers) if (fault := _fault_in(header))]
    if faults:
        raise ValueError("the contrastive loss cannot use this batch.\n  " + "\n  ".join(faults))
    first = headers[0]
    for r, header in enumerate(headers):
        for name, unit in _MUST_AGREE.items():
            here, there = getattr(first, name), getattr(header, name)
            if here != there:
                if name == "dtype":
                    here, there = DTYPES[here], DTYPES[there]
                raise ValueError(
                    f"contrastive loss: the ranks disagree about {unit}: {here} on rank 0, {there} on rank {r}. "
                    "All ranks need batches of the same shape and the same settings; drop an incomplete last batch."
                )
    bad = {r: (h.num_bad_rows, h.first_bad_row) for r, h in enumerate(headers) if h.num_bad_rows}
    if bad:
        where = [f"rank {r}: {count} of {first.rows} rows, first row {row}" for r, (count, row) in bad.items()]
        raise NonFiniteError(
            f"z is NaN or infinite ({'; '.join(where)}). The network has diverged or an image is broken: "
            "lower the learning rate, or lengthen the warm-up.",
            bad,
        )


_MUST_AGREE = {
    "rows": "the rows of z",
    "width": "the width of z",
    "dtype": "the dtype of z",
    "num_views": "num_views",
    "num_ids": "the number of sample ids or labels (-1: none)",
    "implementation": "the implementation",
    "temperature": "the temperature",
}


_NO_IDS, _ON_ANOTHER_DEVICE, _SECOND_VIEW, _MANY_TEMPERATURES = -2, -3, -4, -5
_FAULTS_OF_IDS = {
    _NO_IDS: "the sample ids (or labels) must be int64 or int32 of shape [B]",
    _ON_ANOTHER_DEVICE: "the sample ids (or labels) are on another device than z",
    _MANY_TEMPERATURES: "the temperature must be one number",
}


def _fault_in(header: Header) -> str | None:
    if header.ndim != 2:
        hint = "; of a stack of views [views, B, K] it is z.flatten(0, 1)" if header.ndim == 3 else ""
        return f"z has {header.ndim} dimensions; expected [views * B, K]{hint}"
    if header.num_ids == _SECOND_VIEW:
        return "z has a second argument of its own shape; the views go together: torch.cat([z0, z1])"
    if header.dtype < 0:
        return "z must be float16, bfloat16, float32 or float64"
    if header.num_views < 2:
        return f"num_views is {header.num_views}; a positive needs at least 2 views"
    if header.rows == 0 or header.width == 0 or header.rows % header.num_views:
        return (
            f"z has the shape [{header.rows}, {header.width}]; expected [{header.num_views} * B, K]: "
            f"all rows of view 0, then all of view 1"
        )
    if header.num_ids in _FAULTS_OF_IDS:
        return _FAULTS_OF_IDS[header.num_ids]
    if header.num_ids not in (-1, header.rows // header.num_views):
        return f"{header.num_ids} sample ids (or labels) for {header.rows // header.num_views} images"
    if not 0 < header.temperature < float("inf"):
        return f"the temperature is {header.temperature}; it must be a positive number"
    return None
