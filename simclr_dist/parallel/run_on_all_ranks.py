"""Runs a function on every rank; if it fails on one rank, all ranks raise, and one reports the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from simclr_dist.errors import FailedElsewhereError, UserError
from simclr_dist.parallel import distributed

T = TypeVar("T")


def run_on_all_ranks(
    build: Callable[[], T],
    device: torch.device | str,
    catch: type[Exception] | tuple[type[Exception], ...] = (UserError, OSError),
) -> T:
    """`build()` on every rank; if it fails on one, every rank raises.

    The first failing rank raises its own exception, the others raise FailedElsewhereError. Exceptions that are not in
    `catch` are errors of the program and are raised at once. Work between two collectives that may fail on one rank
    alone goes through here: a rank that skips a collective would leave the others waiting in it.
    """
    result, failure = None, None
    try:
        result = build()
    except catch as error:
        failure = error
    first = distributed.first_failing_rank(failure is not None, device)
    if first is None:
        return result  # type: ignore[return-value]
    if failure is not None and first == distributed.rank():
        raise failure
    raise FailedElsewhereError(f"rank {first} has failed; see its own message")
