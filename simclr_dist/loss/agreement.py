"""What all ranks agree on before one of them believes the result of a loss, and how the host waits for it once only.

Every rank brings a header of its batch and its settings, so that a fault on any rank is raised on all of them, and
nobody waits for ever. The host must not wait for the headers before it has queued the loss, or the device runs dry:

    header    ──▶  gathered on the device  ──▶  copied to the host ┄┄┄┄┄┄┄┐
    the loss, queued under the terms that are assumed                     ▼
                                            the host waits; a fault?  ──▶  raised on every rank, before any backward
                                            the terms as assumed?     ──▶  the result is good
                                            other terms?              ──▶  the loss again, under these

Inside `checked_after_the_backward` the host queues the backward too before it waits, so that the device never is idle.

Terms are the part of a header that the collectives of the loss depend on. One process takes its own. Several on GPUs
assume those on which all agreed the last time: so all queue the same collectives, whatever one of them brings now. A
rank whose batch has other terms takes part with zeros. The first time, and on CPUs, the headers are read first.
"""

from __future__ import annotations

import math
import struct
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch, computing_dtype, gather_batch, row_lengths
from simclr_dist.loss.enumeration import PAIRS, Pairs
from simclr_dist.loss.implementations import CODES, Choice, check_name, choose
from simclr_dist.loss.tiled import LARGEST_EXPONENT
from simclr_dist.parallel import distributed
from simclr_dist.parallel.host_copy import copy_to_host

T = TypeVar("T")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NonFiniteError(ValueError):
    """Rows of z are NaN or infinite. Raised on every rank, with `bad_rows`: {rank: (how many, the first)}."""

    def __init__(self, message: str, bad_rows: dict[int, tuple[int, int]]) -> None:
        super().__init__(message)
        self.bad_rows = bad_rows


@dataclass(frozen=True)
class Settings:
    """Of a loss: what its user has asked for."""

    num_views: int
    implementation: str
    gather_dtype: torch.dtype
    row_dtype: torch.dtype
    grad_reduction: str = "mean"
    pairs: Pairs = "within"
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_name(self.implementation)
        if self.pairs not in PAIRS:
            raise ValueError(f"unknown pairs {self.pairs!r}; known: {', '.join(PAIRS)}")
        if self.pairs == "across" and self.num_views != 2:
            raise ValueError(f"pairs='across' compares view 0 with view 1; num_views must be 2, found {self.num_views}")
        for name, dtype in (("gather_dtype", self.gather_dtype), ("row_dtype", self.row_dtype)):
            if dtype not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, found {dtype}")

    @property
    def rounding(self) -> torch.dtype:
        """What unit rows are rounded to; four bytes and more: they are not."""
        if self.row_dtype.itemsize < 4 or distributed.world_size() == 1:
            return self.row_dtype
        return self.gather_dtype

    def choose(
        self, device: torch.device, *, dtype: torch.dtype, width: int, temperature: float, num_rows: int
    ) -> Choice:
        """The code for z [num_rows, width] that computes in `dtype`, as this rank would have it."""
        return choose(
            self.implementation,
            device,
            dtype=dtype,
            width=width,
            temperature=temperature,
            num_all_rows=num_rows * distributed.world_size(),
            row_dtype=self.rounding,
            pairs=self.pairs,
        )


def check_types(z: object, temperature: object) -> None:
    """Mistakes that are in the code, and so the same on every rank. Raises TypeError."""
    if not isinstance(z, Tensor):
        hint = "; the views go together: torch.cat([z0, z1])" if isinstance(z, tuple | list) else ""
        raise TypeError(f"z must be a tensor [views * B, K], found a {type(z).__name__}{hint}")
    if not isinstance(temperature, Tensor | Real):
        raise TypeError(f"the temperature must be a number, found {temperature!r}")


def over_all_ranks(
    loss: str,
    compute: Callable[[GlobalBatch], T],
    z: Tensor,
    temperature: float | Tensor,
    ids: Tensor | Sequence[int] | None,
    settings: Settings,
) -> tuple[T, Choice]:
    """`compute` of the global batch, and the code that it was to use. All ranks together.

    loss: a name for `compute`. z [V*B, K]; ids [B]: a tensor, a list or an array. A temperature that is a tensor on the
    device is read by the host first. Raises ValueError or NonFiniteError, on all ranks alike.
    """
    ids = _as_tensor(ids, z.device)
    own, choice = _own_header(z, temperature, ids, settings)
    lengths = row_lengths(z) if own.ndim == 2 and own.dtype >= 0 and z.numel() else z.new_zeros(0)
    read_headers = _gather_headers(own, lengths)

    def run(terms: Header) -> T:
        return compute(_batch_under(terms, own, z, lengths, ids, settings))

    assumed = _assumed_terms(loss, own, z.device)
    if _checks and assumed is not None and assumed == own.terms():
        _checks[-1].append(lambda: _check_assumed(assumed, _agree(read_headers())))
        return run(assumed), _say_what_runs(choice, CODES[assumed.code])
    result = None if assumed is None else run(assumed)
    terms = _agree(read_headers())
    if result is None or terms != assumed:
        result = run(terms)
        _remember(loss, terms)
    return result, _say_what_runs(choice, CODES[terms.code])


_checks: list[list[Callable[[], None]]] = []  # of each open `checked_after_the_backward`


@contextmanager
def checked_after_the_backward() -> Iterator[None]:
    """What is wrong with a batch of a loss inside is raised at the end of the block, on all ranks alike.

    For a block that holds the backward too, but not the optimiser's step. A rank whose batch has another form than the
    last one still checks before its backward.
    """
    _checks.append([])
    try:
        yield
        for check in _checks[-1]:
            check()
    finally:
        _checks.pop()


def _check_assumed(assumed: Header, terms: Header) -> None:
    if terms != assumed:
        raise ValueError(f"contrastive loss: another rank's batch has changed its form: {assumed} before, {terms} now")


def settle(settings: Settings, device: torch.device, *, num_rows: int, width: int, temperature: float) -> Choice:
    """The code that all ranks will use for float32 z [num_rows, width]. All ranks together."""
    own = settings.choose(device, dtype=torch.float32, width=width, temperature=temperature, num_rows=num_rows)
    first = distributed.first_text(own.reason or None, device)
    if first is None:
        return own
    rank, reason = first
    return replace(own, code="tiled" if own.code == "triton" else own.code, reason=_by_rank(rank, reason))


def _by_rank(rank: int, reason: str) -> str:
    return f"rank {rank}: {reason}" if distributed.world_size() > 1 else reason


def _say_what_runs(choice: Choice, code: str) -> Choice:
    if code != choice.code:
        choice = replace(choice, code=code, reason="another rank cannot use the kernels; its own warning says why")
    if choice.reason:
        warnings.warn(f"the loss uses {choice}", stacklevel=2)
    return choice


def _batch_under(
    terms: Header, own: Header, z: Tensor, lengths: Tensor, ids: Tensor | None, settings: Settings
) -> GlobalBatch:
    temperature, pairs = own.temperature, settings.pairs
    if own.terms_without_choices() != terms.terms_without_choices():
        temperature, pairs = 1.0, "within"
        z = torch.zeros(terms.rows, terms.width, dtype=DTYPES[terms.dtype], device=z.device)
        lengths = row_lengths(z)
        ids = None if terms.num_ids < 0 else torch.zeros(terms.num_ids, dtype=torch.int64, device=z.device)
    return gather_batch(
        z,
        lengths,
        ids,
        temperature=temperature,
        num_views=terms.num_views,
        row_dtype=DTYPES[terms.row_dtype],
        wide_ids=bool(terms.wide_ids),
        grad_reduction=settings.grad_reduction,
        code=CODES[terms.code],
        pairs=pairs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The terms of the last time


_last_terms: dict[str, tuple[Callable[[], object], Header]] = {}  # by loss; in which process group


def _assumed_terms(loss: str, own: Header, device: torch.device) -> Header | None:
    """What to begin with before any header was read. The same on every rank, except for a process on its own."""
    if distributed.world_size() == 1:
        return own.terms() if _fault_in(own) is None else None
    if not _host_runs_ahead(device) or loss not in _last_terms:
        return None
    group, terms = _last_terms[loss]
    return terms if group() is distributed.group() else None


def _remember(loss: str, terms: Header) -> None:
    if distributed.world_size() > 1:
        _last_terms[loss] = weakref.ref(distributed.group()), terms


def _host_runs_ahead(device: torch.device) -> bool:
    return device.type != "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Headers


@dataclass(frozen=True)
class Header:
    """What a rank tells the others about its z and its settings, as integers."""

    ndim: int
    rows: int
    width: int
    dtype: int  # index in DTYPES; -1: another dtype
    num_views: int
    num_ids: int  # -1: no ids; else negative: see _FAULTS_OF_IDS
    row_dtype: int  # index in DTYPES: what rows are rounded to
    code: int  # index in CODES: this rank's choice
    pairs: int  # index in PAIRS
    decoupled: int  # 0 or 1
    temperature_bits: int  # of the float64
    wide_ids: int  # whether they are int64
    # Known to the device alone:
    num_bad_rows: int = 0
    first_bad_row: int = 0

    @property
    def temperature(self) -> float:
        value: float = struct.unpack("<d", struct.pack("<q", self.temperature_bits))[0]
        return value

    def terms(self) -> Header:
        """What the collectives depend on. Temperature, pairs and decoupled are not among it: they may change from step
        to step.
        """
        return replace(self, temperature_bits=0, pairs=0, decoupled=0, num_bad_rows=0, first_bad_row=0)

    def terms_without_choices(self) -> Header:
        """What a rank cannot do otherwise than it is."""
        return replace(self.terms(), code=0, wide_ids=0)


HEADER_BYTES = 8 * len(fields(Header))
_KNOWN_TO_THE_DEVICE = 2


def _as_tensor(ids: Tensor | Sequence[int] | None, device: torch.device) -> Tensor | None:
    """What is no list of numbers becomes a tensor that the check of all ranks refuses."""
    if ids is None or isinstance(ids, Tensor):
        return ids
    try:
        return torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0, 0, device=device)


def _own_header(
    z: Tensor, temperature: float | Tensor, ids: Tensor | None, settings: Settings
) -> tuple[Header, Choice]:
    """What the host knows of this rank's batch, and the code for it."""
    seems_a_view = [isinstance(x, Tensor) and x.ndim > 1 and x.shape == z.shape for x in (ids, temperature)]
    is_a_number = not isinstance(temperature, Tensor) or temperature.numel() == 1
    if any(seems_a_view):
        num_ids = _SECOND_VIEW
    elif not is_a_number:
        num_ids = _MANY_TEMPERATURES
    elif ids is None:
        num_ids = -1
    elif ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        num_ids = _NO_IDS
    else:
        num_ids = ids.shape[0] if ids.device == z.device else _ON_ANOTHER_DEVICE
    tau = float(temperature.detach() if isinstance(temperature, Tensor) else temperature) if is_a_number else math.nan
    rows, width = (*z.shape, 0, 0)[:2]
    header = Header(
        ndim=z.ndim,
        rows=rows,
        width=width,
        dtype=DTYPES.index(z.dtype) if z.dtype in DTYPES else -1,
        num_views=settings.num_views,
        num_ids=num_ids,
        row_dtype=DTYPES.index(settings.rounding),
        code=CODES.index("plain"),  # of what no code can compute; any other is refused at low temperatures
        pairs=PAIRS.index(settings.pairs),
        decoupled=int(settings.decoupled),
        temperature_bits=struct.unpack("<q", struct.pack("<d", tau))[0],
        wide_ids=int(num_ids > 0 and ids is not None and ids.dtype == torch.int64),
    )
    if _fault_in(header) is not None:
        return header, Choice("plain")
    choice = settings.choose(
        z.device, dtype=computing_dtype(z), width=header.width, temperature=tau, num_rows=header.rows
    )
    return replace(header, code=CODES.index(choice.code)), choice


def _gather_headers(own: Header, lengths: Tensor) -> Callable[[], list[Header]]:
    """Starts gathering the headers of all ranks; call the result to wait for them."""
    found = lengths.new_zeros(_KNOWN_TO_THE_DEVICE, dtype=torch.int64)
    if len(lengths):
        bad = lengths.isfinite().logical_not_()
        found = torch.stack([bad.sum(), bad.byte().argmax()])
    if distributed.world_size() == 1:
        read = copy_to_host(found)
        return lambda: [_with(own, read().tolist())]
    known = torch.tensor(astuple(own)[:-_KNOWN_TO_THE_DEVICE])
    # From page-locked memory: an ordinary copy would make the host wait until the GPU has done the whole forward.
    known = known.pin_memory().to(found.device, non_blocking=True) if found.is_cuda else known.to(found.device)
    read = copy_to_host(distributed.all_gather(torch.cat([known, found])[None]))
    return lambda: [Header(*row) for row in read().tolist()]


def _with(own: Header, found: list[int]) -> Header:
    return Header(*astuple(own)[:-_KNOWN_TO_THE_DEVICE], *found)


def _agree(headers: list[Header]) -> Header:
    """The terms of all ranks. Raises, with the same message on every rank, if anything is wrong on any of them."""
    faults = [f"rank {r}: {fault}" for r, header in enumerate(headers) if (fault := _fault_in(header))]
    if faults:
        raise ValueError("the contrastive loss cannot use this batch.\n  " + "\n  ".join(faults))
    first = headers[0]
    for r, header in enumerate(headers):
        for name, unit in _MUST_AGREE.items():
            here, there = _in_words(first, name), _in_words(header, name)
            if here != there:
                raise ValueError(
                    f"contrastive loss: the ranks disagree about {unit}: {here} on rank 0, {there} on rank {r}. "
                    "All ranks need batches of the same shape and the same settings; drop an incomplete last batch."
                )
    bad = {r: (h.num_bad_rows, h.first_bad_row) for r, h in enumerate(headers) if h.num_bad_rows}
    if bad:
        where = [_by_rank(r, f"{count} of {first.rows} rows, first row {row}") for r, (count, row) in bad.items()]
        raise NonFiniteError(
            f"z is NaN or infinite ({'; '.join(where)}). The network has diverged or an image is broken: "
            "lower the learning rate, or lengthen the warm-up.",
            bad,
        )
    # The kernels are for ranks that all can; ids are as wide as the widest.
    return replace(first.terms(), code=min(h.code for h in headers), wide_ids=max(h.wide_ids for h in headers))


_MUST_AGREE = {
    "rows": "the rows of z",
    "width": "the width of z",
    "dtype": "the dtype of z",
    "num_views": "num_views",
    "num_ids": "the number of sample ids or labels (-1: none)",
    "row_dtype": "what the rows of z are rounded to",
    "temperature": "the temperature",
    "pairs": "pairs",
    "decoupled": "decoupled",
    "code": "the implementation",
}


def _in_words(header: Header, name: str) -> Any:
    value = getattr(header, name)
    if name in ("dtype", "row_dtype"):
        return DTYPES[value]
    if name == "pairs":
        return PAIRS[value]
    if name == "decoupled":
        return bool(value)
    if name == "code":  # tiles on one rank, kernels on another: all take tiles
        return "plain" if CODES[value] == "plain" else "another than plain"
    return value


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
    if not 0 < header.temperature < math.inf:
        return f"the temperature is {header.temperature}; it must be a positive number"
    exponent = 1 / header.temperature + math.log(header.rows * distributed.world_size())
    if CODES[header.code] != "plain" and exponent > LARGEST_EXPONENT[torch.float64]:
        return (
            f"temperature {header.temperature:g} is too low for exp() in float64; use at least 0.0015, or "
            "implementation='plain'"
        )
    return None
