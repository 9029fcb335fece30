"""Exit codes of the launcher, and its error that is printed without a traceback."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0  # finished, stopped on request, requeued, or cancelled by the user
    USAGE = 2  # the command line or the configuration is wrong; nothing was started
    PREFLIGHT = 3  # a machine is not fit for the run
    FAILED = 4  # the training failed
    GAVE_UP = 5  # too many failures, or attempts that make no progress
    PREEMPTED = 75  # saved and stopped; to be continued by hand (EX_TEMPFAIL)


class LaunchError(Exception):
    """A launch that cannot go on. str() says what is wrong, with the value, and what to do."""

    def __init__(self, message: str, exit_code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
