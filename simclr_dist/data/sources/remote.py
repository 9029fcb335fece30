"""Sources that lie elsewhere: files behind `https://`, `s3://`, `gs://` and what else fsspec reads, fetched first.

The one door to them: `RemoteFile` says what a store knows of a file, reads parts of it and copies it whole, and every
failure is an `UnavailableError` in plain words. A URL may hold a password or a signature. It is shown, and written
anywhere, without them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from simclr_dist.config import SHARD_SUFFIX
from simclr_dist.data.sources.listing import Listing
from simclr_dist.data.sources.shards import braces
from simclr_dist.errors import DataError
from simclr_dist.safe_text import mask
from simclr_dist.source_text import is_url

_AT_A_TIME = 4
_TRIES = 3
_PAUSE_S = 1.0  # after the first try, then twice as long
_SILENCE_S = 60.0  # after which a server counts as gone
_SMALLEST_READ = 1 << 16
_T = TypeVar("_T")


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


class UnavailableError(DataError):
    """A file that cannot be had now. is_final: another try would not help."""

    def __init__(self, text: str, is_final: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final

    @property
    def is_missing(self) -> bool:
        return isinstance(self.__cause__, FileNotFoundError) or getattr(self.__cause__, "status", None) in (404, 410)

    @property
    def is_refused(self) -> bool:
        return isinstance(self.__cause__, PermissionError) or getattr(self.__cause__, "status", None) in (401, 403)


class NoPartsError(Exception):
    """The server gives files whole only."""


@dataclass(frozen=True)
class RemoteState:
    """What a store says of a file. num_bytes: None where it does not tell. version: another one for another content;
    empty where it does not tell.
    """

    num_bytes: int | None
    version: tuple[str, ...]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store. name: as its file system calls it. Every method raises UnavailableError, without a secret."""

    system: Any = field(repr=False, compare=False)
    name: str
    scheme: str

    @property
    def shown(self) -> str:
        return mask(self.name if "://" in self.name else f"{self.scheme}://{self.name.lstrip('/')}")

    def state(self) -> RemoteState:
        with _in_words(self.shown):
            found = self.system.info(self.name)
        known = (f"{key} {found[key]}" for key in _VERSIONS if found.get(key))
        return RemoteState(found.get("size"), tuple(known))

    @contextmanager
    def parts(self) -> Iterator[Callable[[int, int], bytes]]:
        """What reads the bytes from `begin` to before `end`. It raises NoPartsError too."""
        with _in_words(self.shown):
            file = self.system.open(self.name, "rb", block_size=_SMALLEST_READ, cache_type="readahead")
        try:
            yield lambda begin, end: self._part(file, begin, end)
        finally:
            file.close()

    def _part(self, file: Any, begin: int, end: int) -> bytes:
        with _in_words(self.shown):
            try:
                file.seek(begin)
                content: bytes = file.read(end - begin)
            except ValueError as error:  # fsspec's word for a server without ranges
                raise NoPartsError from error
            if len(content) != end - begin:
                raise EOFError(f"{len(content):,} bytes came, of {end - begin:,}")
            return content

    def read(self, most_bytes: int) -> bytes | None:
        """All of a small file; None: there is none."""
        try:
            with _in_words(self.shown):
                size = self.system.info(self.name).get("size") or 0
                content: bytes = b"" if size > most_bytes else self.system.cat_file(self.name)
        except UnavailableError as error:
            if error.is_missing:
                return None
            raise
        if max(size, len(content)) > most_bytes:
            raise UnavailableError(
                f"{self.shown}: has {max(size, len(content)):,} bytes, more than is taken", is_final=True
            )
        return content

    def copy(
        self,
        place: str | Path,
        num_bytes: int | None,
        advice: str = "set TMPDIR",
        each: Callable[[int], object] = lambda _: None,
    ) -> None:
        """All of it to a file on this machine. num_bytes: that it must have, if that is known.

        advice: what to do where there is no room. each: is told the number of bytes that have come, again and again;
        what it raises ends the copy.
        """
        from fsspec.callbacks import Callback  # type: ignore[import-untyped]

        class Told(Callback):  # type: ignore[misc]
            def call(self, *_: object, **__: object) -> None:
                each(self.value)

        with _in_words(self.shown, place, advice):
            self.system.get_file(self.name, os.fspath(place), callback=Told())
            there = os.path.getsize(place)
            if num_bytes is not None and num_bytes != there:
                raise EOFError(f"{there:,} bytes came, of {num_bytes:,}")


_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "VersionId",
    "Content-MD5",
    "Last-Modified",
    "LastModified",
    "mtime",
)


@contextmanager
def _in_words(shown: str, place: str | Path | None = None, advice: str = "") -> Iterator[None]:
    """place: where something is written."""
    try:
        yield
    except (DataError, NoPartsError):
        raise
    except Exception as raised:
        error = _cause(raised)
        if place is not None and isinstance(error, OSError) and error.errno in _NO_ROOM:
            text = f"{shown}: cannot be copied to {os.path.dirname(place)}: {error.strerror}; {advice}"
            raise UnavailableError(text, is_final=True) from None
        found = UnavailableError(f"{shown}: {_why(error)}", is_final=_is_final(error))
        raise found from error


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES)


def tried(action: Callable[[], _T]) -> _T:
    """`action()`, again where another try may help, three times in all. Raises UnavailableError."""
    for left in reversed(range(_TRIES)):
        try:
            return action()
        except UnavailableError as error:
            if error.is_final:
                raise
            if not left:
                raise UnavailableError(f"{error} ({_TRIES} tries)") from error.__cause__
        time.sleep(_PAUSE_S * (_TRIES - left))
    raise AssertionError


def remote_files(url: str, silence_s: float = _SILENCE_S) -> list[RemoteFile]:
    """The files that a URL names, in the order of their names: one, a pattern, a range. Raises DataError.

    silence_s: after which an HTTP server counts as gone.
    """
    system, names, is_folder = _find(url, silence_s)
    if is_folder:
        raise DataError(f"{mask(url)}: is a folder; name its files, as {mask(url).rstrip('/')}/*.beton")
    scheme = url.partition("://")[0].lower()
    return [RemoteFile(system, name, scheme) for name in names]


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
    if any(name.endswith(SHARD_SUFFIX) for name in names):
        raise DataError(f"{mask(url)}: holds {SHARD_SUFFIX} files; name these alone: {mask(url).rstrip('/*')}/*.beton")
    scheme = url.partition("://")[0]
    # In URLs, without what stands behind the path.
    paths = [re.split(r"[?#]", name, maxsplit=1)[0] if "://" in name else name for name in names]
    common = system._strip_protocol(url).rstrip("/") if is_folder else _common_folder(paths)
    folder = _TemporaryFolder()
    copies = [os.path.join(folder.path, *_below(path, common)) for path in paths]
    files = [RemoteFile(system, name, scheme) for name in names]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(_copy, files, copies))
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


def _find(url: str, silence_s: float = _SILENCE_S) -> tuple[Any, list[str], bool]:
    """(the file system, the names of files in it, whether they are those of a folder)."""
    try:
        import fsspec
    except ImportError:
        raise DataError(
            f"{mask(url)}: needs a package: pip install 'fsspec[http]' (s3fs for s3://, gcsfs for gs://)"
        ) from None
    try:
        is_http = url.lower().startswith(("http:", "https:"))
        system = fsspec.filesystem(url.split(":")[0].lower(), **(_patient_http(silence_s) if is_http else {}))
        names = [name if is_http else system._strip_protocol(name) for name in braces(url)]
        if is_http:
            if "*" in url:
                raise DataError(
                    f"{url}: a web server does not list its files; name them by a range, such as {{000..012}}"
                )
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


def _patient_http(silence_s: float) -> dict[str, Any]:
    """A large file may take hours, but a server that says nothing for a minute has gone."""
    import aiohttp

    return {
        "client_kwargs": {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=min(30, silence_s), sock_read=silence_s)
        }
    }


def _below(path: str, common: str) -> Sequence[str]:
    """The path of a copy in its folder: names are data, and lead nowhere else."""
    parts = [part for part in path[len(common) :].split("/") if part not in ("", ".", "..")]
    return parts or ["file"]


def _copy(file: RemoteFile, copy: str) -> None:
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    tried(lambda: file.copy(copy, file.state().num_bytes))


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
        return "no answer in time"
    text = mask(str(error)).partition("\n")[0][:200]
    return f"cannot be fetched: {text or type(error).__name__}"
