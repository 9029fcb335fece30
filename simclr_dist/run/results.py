"""Where the results of a run go, and what becomes of those that cannot be written. Imports no torch.

A result belongs into the run's folder, and goes where --out says instead. What a command was asked for (an export, a
classifier) must be kept: whether it can be is found out before the work begins. Caches and records are kept where that
is possible, for a run may be somebody else's and read-only: the figure comes first, then one warning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from simclr_dist.atomic import new_file_beside
from simclr_dist.errors import ConfigError
from simclr_dist.run.layout import RunDir


def results_dir(checkpoint: Path | None, out: Path | None) -> RunDir | None:
    """The folder `out`, laid out like a run, or that of the checkpoint's run; None where there is neither."""
    if out is not None:
        return RunDir(out)
    return None if checkpoint is None else RunDir.of_checkpoint(checkpoint)


def require_writable(folder: Path, remedy: str = "name another place with --out") -> None:
    """Makes `folder` if it is not there. Raises ConfigError where no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new_file_beside(folder / "probe").unlink()
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be written to ({error.strerror or error}); {remedy}"]) from None


class Keeping:
    """Writes what may be lost, and says once what was."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lost: list[tuple[str, OSError]] = []

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._lost.append((what, error))

    def warn(self) -> None:
        """The one warning, if there is reason for it."""
        if self._lost:
            what, error = ", ".join(dict.fromkeys(what for what, _ in self._lost)), self._lost[0][1]
            where = f": {os.fspath(error.filename)!r}" if error.filename is not None else ""
            self._say(
                f"warning: not kept: {what} ({error.strerror or error}{where}); --out FOLDER keeps them elsewhere"
            )
            self._lost.clear()
