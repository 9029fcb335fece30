"""Output that cannot end a program: closed, a pipe without reader, a full disk, a lost terminal.

And output of which a terminal obeys nothing but what is meant: what a command prints, and its tables.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from simclr_dist.safe_text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


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


# ---------------------------------------------------------------------------------------------------------------------
# Output that is safe to show (safe_text.py)


class _Escaping:
    """A stream that shows control characters instead of obeying them, but for new lines and tabs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Inside, whatever `print` writes is safe to show. A `console` still draws."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Escaping(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def console(*, stderr: bool = False, **options: Any) -> Console:
    """rich's, for the terminal itself. Hand it `rich_text`, tables and bars, and no text that it would interpret."""
    from rich.console import Console

    stream: Any = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, _Escaping) else stream
    return Console(file=file, markup=False, emoji=False, highlight=False, **options)


def rich_text(text: str, style: str = "") -> Text:
    """As it is: names may look like rich's markup."""
    from rich.text import Text

    return Text(printable(text), style)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    *,
    texts: int = 1,
    width: int = 120,
) -> None:
    """On standard output. texts: of the first so many columns; the others are numbers, and end on the right.

    width: of the table where there is no terminal.
    """
    from rich.table import Table

    table = Table(title=rich_text(title), caption=rich_text(caption), title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(rich_text(column), justify="left" if i < texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(rich_text, row))
    console(width=None if sys.stdout.isatty() else width).print(table)
