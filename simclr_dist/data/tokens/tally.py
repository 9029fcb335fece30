"""Counts what was found and not taken, or is to be known, by reason; the first names are kept."""

from __future__ import annotations

from simclr_dist.data.account import NAMES_SHOWN, LeftOut
from simclr_dist.safe_text import printable

_LONGEST_NAME = 80


class Tally:
    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < NAMES_SHOWN:
            names.append(printable(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"))

    @property
    def groups(self) -> tuple[LeftOut, ...]:
        return tuple(LeftOut(reason, count, tuple(self._names[reason])) for reason, count in self._counts.items())
