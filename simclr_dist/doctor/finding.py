"""A row of the doctor's table. Imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """level: `problem` means that a training cannot work, `warning` that it works worse or otherwise than expected."""

    level: Level
    what: str
    found: str
    advice: str = ""
