"""What can go wrong outside the program: one base class, and what each kind is called in status.json.

Code that meets a UserError shows its message and nothing else; every other exception is a fault of the program and
keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar, Literal

_MOST_LETTERS = 10_000
Reason = Literal["config_error", "data_error", "checkpoint_error", "nan_abort", "hang", "crash"]


class UserError(Exception):
    """Something that the reader of the message can put right. str() says what, where it came from, and what to do."""

    reason: ClassVar[Reason | None] = None
    """What status.json says of a training that ends with it. None: it says nothing, the run is not ours to judge."""

    def __str__(self) -> str:
        """Without the middle of what nobody reads: a name in foreign data may be as long as its file."""
        text, half = super().__str__(), _MOST_LETTERS // 2
        if len(text) <= _MOST_LETTERS:
            return text
        return f"{text[:half]} … {len(text) - 2 * half:,} letters are left out … {text[-half:]}"


class ConfigError(UserError):
    """The configuration cannot be used. `problems` holds one line each; str() is the whole message."""

    reason = "config_error"

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"configuration: {head}", *(f"  - {line}" for line in problems)]))


class DataError(UserError):
    """A data set cannot be read or used."""

    reason = "data_error"


class CheckpointError(UserError):
    """A checkpoint cannot be used, or cannot go on with this configuration."""

    reason = "checkpoint_error"


class NonFiniteAbortError(UserError):
    """Training met NaN or infinity, and `train.on_non_finite` says stop."""

    reason = "nan_abort"


class OwnershipError(UserError):
    """The run directory belongs to another training; nothing in it may be touched, its status included."""


class FailedElsewhereError(UserError):
    """Another rank has failed and reports it; this one only leaves."""


class ExportError(UserError):
    """An encoder cannot be exported as asked."""


class StoppedError(UserError):
    """Stopped on request; the same command goes on from what has been saved."""
