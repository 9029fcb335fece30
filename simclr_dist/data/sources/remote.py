"""Sources that lie elsewhere: files behind `https://`, `s3://`, `gs://` and what else fsspec reads, fetched first.

A URL may hold a password or a signature. It is shown, and written anywhere, without them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simclr_dist.data.sources.listing import Listing
from simclr_dist.data.sources.shards import braces
from simclr_dist.errors import DataError
from simclr_dist.safe_text import mask
from simclr_dist.source_text import is_url

_AT_A_TIME = 4
_TRIES = 3
_SILENCE_S = 60.0  # after which a server counts as gone


def refuse_secrets(source: str) -> None:
    """For what is written into a run's files. Raises DataError."""
    if is_url(source) and mask(source) != source:
        raise DataError(
            f"{mask(source)}: holds a password or a signature, which would be written into the files of the run; use "
            "what fsspec reads instead (environment variables, ~/.config/fsspec, ~/.aws), or `simclr-dist prepare` it"
        )


@dataclass(frozen=True)
class Fetched:
    """Copies of remote files. paths: one file, several, or a folder.

    folder, root: the place of the copies and the URL that it stands for, both with a slash at the end.
    """

    paths: tuple[Path, ...]
    shown: str
    folder: str
    root: str
    keep: Any = field(repr=False)

    def translate(self, text: str) -> str:
        """With the URL in place of the copy."""
        return text.replace(self.folder, self.root)

    def relabel(self, listing: Listing) -> None:
        """Calls everything as the URL does; and keeps the copies as long as the images."""
        listing.origin, listing.prefix = self.shown, self.translate(listing.prefix)
        listing.sentence = self.translate(listing.sentence)
        listing.files = [found._replace(name=self.translate(found.name)) for found in listing.files]
        listing.keep.append(self.keep)
        if listing.labels is not None:
            by_image = {self.translate(name): label for name, label in listing.labels.by_image.items()}
            listing.labels = replace(listing.labels, by_image=by_image)


_fetched: dict[str, Fetched] = {}


def fetch(url: str) -> Fetched:
    """Copies what the URL names to a temporary folder, once a process: a file, a pattern, a range, or a folder.

    Raises DataError, without a secret: nothing is there, no access, no answer, or no room.
    """
    if url not in _fetched:
        _fetched[url] = _fetch(url)
    return _fetched[url]


def _fetch(url: str) -> Fetched:
    system, names, is_folder = _find(url)
    scheme = url.partition("://")[0]
    # In URLs, without what stands behind the path.
    paths = [re.split(r"[?#]", name, maxsplit=1)[0] if "://" in name else name for name in names]
    common = system._strip_protocol(url).rstrip("/") if is_folder else _common_folder(paths)
    folder = _TemporaryFolder()
    copies = [os.path.join(folder.path, *_below(path, common)) for path in paths]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(lambda pair: _copy(system, *pair), zip(names, copies, strict=True)))
    return Fetched(
        (Path(folder.path),) if is_folder else tuple(map(Path, copies)),
        shown=mask(url),
        folder=f"{folder.path}/",
        root=mask(f"{scheme}://{common.rpartition('://')[2].lstrip('/')}/"),
        keep=folder,
    )


class _TemporaryFolder:
    """Deleted with this object."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="simclr-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _common_folder(paths: Sequence[str]) -> str:
    folders = [path.split("/")[:-1] for path in paths]
    depth = next((i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), None)
    return "/".join(folders[0][: min(map(len, folders)) if depth is None else depth])


def _find(url: str) -> tuple[Any, list[str], bool]:
    """(the file system, the names of files in it, whether they are those of a folder)."""
    try:
        import fsspec
    except ImportError:
        raise DataError(
            f"{mask(url)}: needs a package: pip install 'fsspec[http]' (s3fs for s3://, gcsfs for gs://)"
        ) from None
    try:
        is_http = url.lower().startswith(("http:", "https:"))
        system = fsspec.filesystem(url.split(":")[0].lower(), **(_patient_http() if is_http else {}))
        names = [name if is_http else system._strip_protocol(name) for name in braces(url)]
        if is_http:
            return system, names, False
        if any(re.search(r"[*?\[]", name) for name in names):
            names = sorted({found for name in names for found in system.glob(name) if not system.isdir(found)})
        elif len(names) == 1 and system.isdir(names[0]):
            return system, sorted(system.find(names[0])), True
    except DataError as error:
        raise DataError(mask(str(error))) from None
    except Exception as error:
        raise DataError(f"{mask(url)}: {_why(_cause(error))}") from None
    if not names:
        raise DataError(f"{mask(url)}: no file is called so")
    return system, names, False


def _patient_http() -> dict[str, Any]:
    """A large file may take hours, but a server that says nothing for a minute has gone."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE_S)}}


def _below(path: str, common: str) -> Sequence[str]:
    """The path of a copy in its folder: names are data, and lead nowhere else."""
    parts = [part for part in path[len(common) :].split("/") if part not in ("", ".", "..")]
    return parts or ["file"]


def _copy(system: Any, name: str, copy: str) -> None:
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    for left in reversed(range(_TRIES)):
        try:
            size = system.info(name).get("size")
            system.get_file(name, copy)
            there = os.path.getsize(copy)
            if size is not None and size != there:
                raise EOFError(f"{there:,} bytes came, of {size:,}")
            return
        except Exception as raised:
            error = _cause(raised)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                place = f"{os.path.dirname(copy)}: {error.strerror}; set TMPDIR"
                raise DataError(f"{mask(name)}: cannot be copied to {place}") from None
            if not left or _is_final(error):
                tried = "" if left else f" ({_TRIES} tries)"
                raise DataError(f"{mask(name)}: {_why(error)}{tried}") from None
            time.sleep(_TRIES - left)


def _cause(error: BaseException) -> BaseException:
    """What an error comes from: fsspec calls whatever happens on the way to a file that it is not there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_final(error: BaseException) -> bool:
    """Whether another try would not help."""
    status = getattr(error, "status", None)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)


def _why(error: BaseException) -> str:
    """In plain words, and without a URL that holds a secret."""
    status = getattr(error, "status", None)
    if isinstance(error, ImportError):
        return f"needs a package: {error}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "no such file or folder"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is refused: wrong or missing credentials"
    if status is not None:
        return f"the server answers {status}"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {_SILENCE_S:.0f} s"
    text = mask(str(error)).partition("\n")[0][:200]
    return f"cannot be fetched: {text or type(error).__name__}"
