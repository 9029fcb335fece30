"""Output that cannot end a program: closed, a pipe without reader, a full disk, a lost terminal. And fit text."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class _Forgiving(io.FileIO):
    """Writes what can be written. What cannot is lost, and that is no error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def open_closed_descriptors() -> None:
    """Opens a closed standard descriptor on the null device, so that no other file takes its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def make_output_safe() -> None:
    """From now on printing never raises. For programs whose work counts more than their words."""
    open_closed_descriptors()
    sys.stdout, sys.stderr = _safe(sys.stdout, 1), _safe(sys.stderr, 2)


def _safe(stream: TextIO | None, number: int) -> TextIO:
    try:
        number = stream.fileno() if stream is not None else number
        raw = _Forgiving(number, "w", closefd=False)
    except (OSError, ValueError):  # not a file, such as a test's or a notebook's
        return stream or open(os.devnull, "w", encoding="utf-8")
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def printable(text: str) -> str:
    r"""The text with undecodable bytes of file names and control characters as \xNN, so that it can be printed."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
