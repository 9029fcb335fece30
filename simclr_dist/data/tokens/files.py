"""Opens files of text, packed by gzip or not, and reads their lines within bounds."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simclr_dist.errors import DataError

MOST_BYTES_OF_LINE = 16 << 20


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if its name ends with .gz. Raises DataError, also while it is being read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name one file") from None
    except FileNotFoundError:
        raise DataError(f"{path}: does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of each line, without its end (\\n or \\r\\n). Raises DataError."""
    with opened(path) as file:
        number = 0
        while line := file.readline(MOST_BYTES_OF_LINE + 1):
            number += 1
            if len(line) > MOST_BYTES_OF_LINE:
                raise DataError(f"{path}, line {number:,}: has more than {MOST_BYTES_OF_LINE:,} bytes; is it text?")
            yield number, line.rstrip(b"\r\n")


def text_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The same as text. A mark of UTF-8 at the beginning of a file is no part of it. Raises DataError."""
    for number, line in byte_lines(path):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number:,}: is not {encoding} (byte {error.start + 1} is 0x{line[error.start]:02x}); "
                "name another with --encoding, such as latin-1"
            ) from None
        if "\0" in text:
            raise DataError(f"{path}, line {number:,}: holds a zero byte; is it text?")
        yield number, text


def plain_suffix(path: Path) -> str:
    """`.fasta` of x.fasta and x.FASTA.gz."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
