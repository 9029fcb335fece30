"""Reads FASTA, strictly: what is no FASTA is an error with its line, and what holds no protein is left out and counted.

>name and whatever else
MKTAYIAKQR
QISFVKSHFS
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.data.tokens.files import byte_lines
from simclr_dist.errors import DataError

SUFFIXES = ".fasta", ".fa", ".faa", ".fas"
MOST_BYTES_OF_RECORD = 64 << 20
_NUCLEOTIDES = b"ACGTUNacgtun"


@dataclass(frozen=True)
class Record:
    header: str
    """Without the sign >."""
    residues: bytes
    line: int
    """Of the header, from 1."""

    @property
    def name(self) -> str:
        return self.header.split(maxsplit=1)[0] if self.header.strip() else f"line {self.line}"


def read_fasta(path: Path) -> Iterator[Record]:
    """Raises DataError for what is no FASTA."""
    header, first, parts, size = None, 0, list[bytes](), 0
    for number, line in byte_lines(path):
        if line.startswith(b">"):
            if header is not None:
                yield Record(header, b"".join(parts), first)
            header, first, parts, size = line[1:].decode("utf-8", "backslashreplace").strip(), number, [], 0
        elif line.startswith(b";"):
            continue  # an old kind of comment
        elif stripped := b"".join(line.split()):
            if header is None:
                raise DataError(f"{path}, line {number}: is no FASTA: a sequence begins with a line >NAME")
            size += len(stripped)
            if size > MOST_BYTES_OF_RECORD:
                raise DataError(f"{path}, line {first}: a sequence of more than {MOST_BYTES_OF_RECORD:,} residues")
            parts.append(stripped)
    if header is None:
        raise DataError(f"{path}: is no FASTA: it has no line >NAME")
    yield Record(header, b"".join(parts), first)


def looks_like_nucleotides(residues: bytes) -> bool:
    """Of a protein, that many A, C, G and T hardly ever happen."""
    return len(residues) >= 60 and not residues.translate(None, _NUCLEOTIDES)


def label_of(header: str, pattern: re.Pattern[str] | None) -> str:
    """The first group of `pattern`, or all that it finds, in a header; empty: nothing is found."""
    found = pattern.search(header) if pattern else None
    return ((found[1] if found.re.groups else found[0]) or "").strip() if found else ""
