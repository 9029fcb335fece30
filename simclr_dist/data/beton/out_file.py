"""The file that `prepare` writes: what it may replace, and that it appears complete or not at all."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from simclr_dist.atomic import flush, replace_text
from simclr_dist.bounded_json import read_json
from simclr_dist.data.beton.reader import LONGEST_SIDECAR, VERSION, next_sidecar_path, sidecar_path
from simclr_dist.errors import DataError


def choose_target(out: Path, sources: Sequence[str | Path], overwrite: bool) -> Path:
    """The file to write: `out`, or what `out` links to.

    Raises DataError unless nothing is there, or with `overwrite` a .beton file that is none of the sources.
    """
    if out.parent.parent.is_dir():  # makes `data/` in a fresh checkout, but no longer path: that is a typing error
        out.parent.mkdir(exist_ok=True)
    if out.is_dir() or not out.parent.is_dir():
        raise DataError(f"{out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")
    if out.suffix != ".beton":
        raise DataError(f"{out}: the file to write must be called something.beton")
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        raise DataError(f"{out}: links to {target}, and there is no folder {target.parent}")
    if target.exists():
        if any(os.path.exists(source) and os.path.samefile(source, target) for source in sources):
            raise DataError(f"{out}: is {'the' if len(sources) == 1 else 'a'} source itself; write to another file")
        if not _is_beton(target):
            raise DataError(f"{out}: holds something other than a .beton file, which is not replaced; move it away")
        if not overwrite:
            raise DataError(f"{out}: exists already; --overwrite replaces it")
    _check_sidecar(sidecar_path(target))
    _check_sidecar(next_sidecar_path(target))
    return target


def _is_beton(path: Path) -> bool:
    """Also a damaged or an empty one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) in (b"", VERSION.to_bytes(2, "little"))


def _check_sidecar(path: Path) -> None:
    if not os.path.lexists(path):
        return
    try:
        ours = "num_samples" in read_json(path, most_bytes=LONGEST_SIDECAR)
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise DataError(f"{path}: is needed for class names, but holds something else; move it away")


@contextmanager
def unfinished(target: Path) -> Iterator[IO[bytes]]:
    """A hidden file beside `target`, deleted when the block fails; `commit` gives it its name."""
    _remove_abandoned(target)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=_prefix(target), delete=False) as file:
        try:
            # Released when this process ends: a free lock marks an abandoned file. Some file systems have no locks;
            # there abandoned files stay.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, deleted when the block ends; rename it to keep it."""
    _remove_abandoned(target)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Gives an unfinished folder, whose files are on disk, its name. Raises OSError: another is there by now."""
    folder.chmod(0o777 & ~_umask())
    flush(folder)
    os.rename(folder, target)
    flush(target.parent)


def commit(file: IO[bytes], target: Path, sidecar: dict[str, Any]) -> None:
    """Flushes the unfinished file to disk and gives it its name. Raises OSError.

    No kill can part it from its sidecar: that lies beside it, under a name at which readers look, before the file gets
    its own; until then the old file has its old one.
    """
    with suppress(OSError):  # some file systems have no permissions to set
        os.fchmod(file.fileno(), 0o666 & ~_umask())
    file.flush()
    os.fsync(file.fileno())
    replace_text(next_sidecar_path(target), json.dumps(sidecar, indent=1) + "\n")
    flush(target.parent)
    os.replace(file.name, target)
    with suppress(FileNotFoundError):  # another `prepare` of the same file has just done it
        os.replace(next_sidecar_path(target), sidecar_path(target))
    flush(target.parent)


def _prefix(target: Path) -> str:
    return f".{target.name}.part-"


def _remove_abandoned(target: Path) -> None:
    """Deletes unfinished files and folders for `target` whose writer was killed."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
