"""Runs a function on every rank; if it fails on one rank, all ranks raise, and one reports the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from simclr_dist.errors import FailedElsewhereError, UserError
from simclr_dist.parallel import distributed

T = TypeVar("T")
Kinds = type[Exception] | tuple[type[Exception], ...]


def run_on_all_ranks(build: Callable[[], T], device: torch.device | str, catch: Kinds = (UserError, OSError)) -> T:
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
    if (first := distributed.first_failing_rank(failure is not None, device)) is not None:
        _raise(first, failure)
    return result  # type: ignore[return-value]


def raise_first(failure: Exception | None, device: torch.device | str) -> NoReturn:
    """For ranks that know that one of them has failed: it raises its own exception, the others as above."""
    first = distributed.first_failing_rank(failure is not None, device)
    assert first is not None
    _raise(first, failure)


def _raise(first: int, failure: Exception | None) -> NoReturn:
    if failure is not None and first == distributed.rank():
        raise failure
    raise FailedElsewhereError(f"rank {first} has failed; see its own message")


def run_on_main(build: Callable[[], Any], device: torch.device, catch: Kinds = (UserError, OSError)) -> Any:
    """`build()` on the main process alone: what it returns, plain values that JSON can hold, on every rank.

    For the files that it alone reads and writes. If it fails, every rank raises as above.
    """
    text = run_on_all_ranks(lambda: json.dumps(build()) if distributed.rank() == 0 else "", device, catch)
    return json.loads(distributed.broadcast_text_from_main(text, device))
