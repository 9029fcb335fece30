"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EPERM)


@contextmanager
def replaces(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It becomes `path` when the block ends, and vanishes when it fails.

    It has the permissions of an ordinary new file, whatever writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_file_beside(path)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors puts a file of its own there, closed to others
            os.chmod(temporary, mode)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaces_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write files into. It becomes `path` when the block ends, and vanishes when it
    fails. A folder that is there is moved aside first and deleted at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _free_name_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        old = _free_name_beside(path) if path.exists() else None
        if old is not None:
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old is not None:
                os.replace(old, path)
            raise
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_file_beside(path: Path) -> Path:
    """An empty hidden file that nobody else has, with the permissions of an ordinary one. Raises OSError."""
    temporary = _free_name_beside(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
    return temporary


def _free_name_beside(path: Path) -> Path:
    # A random name: process numbers are the same in two containers or on two hosts.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path`. Raises OSError."""
    with replaces(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder, and say so: there is nothing more to do then.
        if error.errno not in _NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
