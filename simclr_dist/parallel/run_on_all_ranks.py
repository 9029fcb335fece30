"""How processes fail together: what fails on one rank is known on all, and one rank tells why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from simclr_dist.checkpoint.files import CheckpointError
from simclr_dist.config import ConfigError
from simclr_dist.data import DataError
from simclr_dist.parallel import distributed
from simclr_dist.run.owner import OwnershipError

T = TypeVar("T")

EXPECTED = (ConfigError, DataError, CheckpointError, OwnershipError, OSError)  # all that a user can cause


class NonFiniteAbortError(Exception):
    """Training met NaN or infinity and its policy says stop."""


class FailedElsewhereError(Exception):
    """Another rank has failed and tells about it; this one only leaves."""


def together(build: Callable[[], T], device: torch.device) -> T:
    """`build()` on every rank; if it fails on any, no rank goes on, and one rank tells why.

    Raises what `build` raised (one of EXPECTED) on the first failing rank, and
    FailedElsewhereError on the others.
    """
    result, failure = None, None
    try:
        result = build()
    except EXPECTED as error:
        failure = error
    first = distributed.first_failing_rank(failure is not None, device)
    if first is None:
        return result  # type: ignore[return-value]
    if failure is not None and first == distributed.rank():
        raise failure
    raise FailedElsewhereError
