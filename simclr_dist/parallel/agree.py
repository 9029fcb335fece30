"""Which program computes a part of the step that several can compute: decided before step 0, by all ranks together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from simclr_dist.errors import ConfigError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks


def agree(
    setting: str,
    wanted: str,
    *,
    best: str,
    fallback: str,
    obstacle: Callable[[str], str | None],
    device: torch.device,
    warn: Callable[[str], None],
) -> str:
    """`wanted`, or for `auto` the best; `fallback` with a warning where that does not work on every rank.

    obstacle: why a name cannot be used by this rank, if so. All ranks call it together. Where a name other than `auto`
    was asked for and cannot be had, raises ConfigError on the first such rank and FailedElsewhereError on the others.
    """

    def refuse_if_impossible() -> None:
        if reason := obstacle(wanted):
            raise ConfigError([f"{setting}: {wanted} does not work here: {reason}; `auto` takes what works"])

    if wanted != "auto":
        run_on_all_ranks(refuse_if_impossible, device)
        return wanted
    found = distributed.first_text(obstacle(best), device)
    if found is None:
        return best
    rank, reason = found
    warn(f"{setting}: {fallback} is used instead of {best}, which does not work on rank {rank}: {reason}")
    return fallback
