"""Compressed archives, decompressed to a temporary file within a limit."""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from simclr_dist.errors import DataError

_MOST_EXPANDED, _EXPANSION = 1 << 30, 100  # bytes without compression; beyond them, times the compressed ones

# What the damage of a compressed file raises, by the names of classes: lzma and zstd may not be imported.
_DAMAGE = frozenset({"LZMAError", "ZstdError"})


def most_expanded(path: Path) -> int:
    """Bytes that an archive may hold. Images hardly shrink: what expands a hundredfold is made to fill the disk."""
    return max(_MOST_EXPANDED, _EXPANSION * os.path.getsize(path))


def expands_too_far(path: Path, advice: str) -> DataError:
    return DataError(
        f"{path}: expands to more than {most_expanded(path):,} bytes, {_EXPANSION} times its size; if that is right, "
        f"{advice}"
    )


def decompressed(path: Path) -> Any:
    """The archive without its compression, in a temporary file that is deleted when it is closed; None if it is plain.

    The content tells how it is compressed, whatever the name says. Raises DataError.
    """
    opener = _opener(path)
    if opener is None:
        return None
    keep = tempfile.NamedTemporaryFile(prefix="simclr-", suffix=".tar")  # noqa: SIM115 - lives as long as the source
    try:
        with opener(path, "rb") as compressed:
            _expand(path, compressed, keep)
        keep.flush()
    except Exception as error:
        keep.close()
        if isinstance(error, DataError):
            raise
        if isinstance(error, OSError) and error.errno is not None:  # no space left, for example
            raise DataError(f"{path}: cannot be decompressed to {keep.name}: {error.strerror}; set TMPDIR") from None
        if isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ in _DAMAGE:
            raise DataError(f"{path}: cannot be decompressed, it is cut off or damaged: {error}") from None
        raise
    return keep


def _opener(path: Path) -> Callable[..., Any] | None:
    with open(path, "rb") as file:
        start = file.read(6)
    opener: Callable[..., Any]
    if start.startswith(b"\x1f\x8b"):
        from gzip import open as opener
    elif start.startswith(b"\xfd7zXZ\0"):
        from lzma import open as opener
    elif start.startswith(b"BZh"):
        from bz2 import open as opener
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_open(path)
    else:
        return None
    return opener


def _zstd_open(path: Path) -> Callable[..., Any]:
    try:
        if sys.version_info >= (3, 14):
            from compression.zstd import open as opener
        else:
            from backports.zstd import open as opener
    except ImportError:
        raise DataError(
            f"{path}: is compressed with zstd, which needs a package: pip install backports.zstd; or unpack it with "
            "`zstd -d`"
        ) from None
    return opener


def _expand(path: Path, compressed: IO[bytes], to: IO[bytes]) -> None:
    most = most_expanded(path)
    while part := compressed.read(1 << 20):
        if to.tell() + len(part) > most:
            raise expands_too_far(path, "decompress it beforehand")
        to.write(part)
