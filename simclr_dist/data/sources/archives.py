"""Everything in a tar archive, found in place: nothing is unpacked, and nothing is written where a member points."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from simclr_dist.data.sources.listing import Found, Listing, Parts, is_tool_folder, stamp
from simclr_dist.errors import DataError

_MOST_LINKS = 40  # that are followed one after the other, as in Linux
_MOST_NESTED = 8  # archives, one inside the other
_DEEPEST = 64  # folders in a name: each is listed itself
_MOST_BY_LINKS = 1_000_000  # files that have another name by a link to their folder
_MOST_EXPANDED, _EXPANSION = 1 << 30, 100  # bytes without compression; beyond them, times the compressed ones
_BLOCK = 512


def list_archive(path: Path) -> Listing:
    """A compressed archive is decompressed to a temporary file first.

    Raises DataError when the archive is not whole, OSError when it cannot be read.
    """
    listing = Listing(str(path), f"{path}/", is_archive=True)
    listing.stamps.append(stamp(str(path)))
    listing.keep = _decompressed(path)
    plain = str(path) if listing.keep is None else listing.keep.name
    with open(plain, "rb") as file:
        size = os.path.getsize(plain)
        _list(_Archive(file, plain, (_MOST_NESTED + 1) * size), 0, size, (), listing)
    listing.files.sort(key=lambda found: found.parts)
    listing.folders.sort()
    return listing


def _decompressed(path: Path) -> Any:
    """The archive without its compression, in a temporary file that is deleted when it is closed; None if it is plain.

    The content tells how it is compressed, whatever the name says.
    """
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
        raise DataError(f"{path}: is compressed with zstd, which is not read here; unpack it with `zstd -d`")
    else:
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
        if isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "LZMAError":
            raise DataError(f"{path}: cannot be decompressed, it is cut off or damaged: {error}") from None
        raise
    return keep


def _expand(path: Path, compressed: IO[bytes], to: IO[bytes]) -> None:
    """Images hardly shrink any more: what expands a hundredfold is made to fill the disk."""
    most = max(_MOST_EXPANDED, _EXPANSION * os.path.getsize(path))
    while part := compressed.read(1 << 20):
        if to.tell() + len(part) > most:
            raise DataError(
                f"{path}: expands to more than {most:,} bytes, {_EXPANSION} times its size; if that is right, "
                "decompress it beforehand"
            )
        to.write(part)


@dataclass
class _Archive:
    """left: bytes to read before archives inside it must have been read more than once, through links to them."""

    file: IO[bytes]
    path: str
    left: int


def _list(around: _Archive, start: int, end: int, parts: Parts, listing: Listing, num_around: int = 0) -> None:
    """Adds what an archive at the bytes from start to end holds, with `parts` before its names.

    num_around: archives that it lies in.
    """
    files: dict[Parts, tuple[int, int]] = {}  # offset and size
    links: dict[Parts, Parts] = {}
    folders: set[Parts] = set()
    left_out: list[tuple[str, Parts]] = []
    place = "/".join((listing.origin, *parts))
    if num_around > _MOST_NESTED:
        raise DataError(f"{place}: more than {_MOST_NESTED} archives lie one inside the other; unpack the outer ones")
    file, plain = around.file, around.path
    around.left -= end - start
    if around.left < 0:
        raise DataError(f"{place}: links name the same archives inside it again and again; unpack it")
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # else it keeps what it has read
                if member.size < 0:  # the next member would be this one again
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
                sparse = member.sparse is not None  # type: ignore[attr-defined]
                if not sparse and member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                name = _path_inside(member.name)
                if not name:
                    continue
                if len(name) > _DEEPEST:
                    left_out.append((f"more than {_DEEPEST} folders deep", name[:_DEEPEST]))
                    continue
                if files.pop(name, None) is not None or links.pop(name, None) is not None:
                    left_out.append(("an earlier version of a file that the archive holds again", name))
                if member.isdir():
                    folders.add(name)
                elif member.islnk():
                    links[name] = _path_inside(member.linkname)
                elif member.issym():
                    links[name] = _target(name, member.linkname)
                elif sparse or not member.isreg():
                    left_out.append(("not an ordinary file", name))
                else:
                    files[name] = member.offset_data, member.size
            _check_end(file, archive.offset, start, end)
    except (tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{place}: is not a complete tar archive: {error}") from None
    folders |= {name[:depth] for name in files for depth in range(1, len(name))}
    left_out += _follow_links(files, links, folders, place)
    _leave_out_tool_folders(files, folders, left_out)
    for name, (offset, size) in files.items():
        if name[-1].lower().endswith(".tar") and not name[-1].startswith("."):
            # As in ImageNet's own archive, an archive inside counts as a folder.
            inner = (*parts, *name[:-1], name[-1][: -len(".tar")])
            listing.folders.append(inner)
            listing.notes.append(("archive inside the archive, read as a folder", (*parts, *name)))
            _list(around, offset, offset + size, inner, listing, num_around + 1)
        else:
            full = (*parts, *name)
            listing.files.append(Found(full, listing.prefix + "/".join(full), plain, offset, size))
    listing.folders += [(*parts, *name) for name in folders]
    listing.left_out += [(reason, (*parts, *name)) for reason, name in left_out]


def _check_end(file: IO[bytes], at: int, start: int, end: int) -> None:
    """An archive ends with two empty blocks. tarfile is content without them, even after a file cut in two."""
    file.seek(at)
    if at + 2 * _BLOCK > end or file.read(2 * _BLOCK).strip(b"\0"):
        raise tarfile.ReadError("the blocks that mark its end are missing")
    while rest := file.read(min(1 << 20, end - file.tell())):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more follows after its end; if archives were joined, unpack with `tar -i`")
    if (end - start) % _BLOCK:
        raise tarfile.ReadError("its size is not a multiple of 512 bytes")


def _path_inside(name: str) -> Parts:
    """The path of a member below the archive, even if its name is absolute or leads outside."""
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


def _target(link: Parts, target: str) -> Parts:
    """Where a symbolic link points inside the archive; empty: nowhere."""
    if target.startswith("/"):
        return ()
    path = list(link[:-1])
    for part in target.split("/"):
        if part == "..":
            if not path:
                return ()
            path.pop()
        elif part not in ("", "."):
            path.append(part)
    return tuple(path)


def _follow_links(
    files: dict[Parts, tuple[int, int]], links: dict[Parts, Parts], folders: set[Parts], place: str
) -> list[tuple[str, Parts]]:
    """Adds to files and folders what hard and symbolic links name; returns the links that lead nowhere."""
    left_out = []
    most = len(files) + len(links) + _MOST_BY_LINKS
    to_folders: dict[Parts, Parts] = {}
    for name in links:
        target = _resolved(name, links)
        if target in files:
            files[name] = files[target]
        elif target in folders:
            to_folders[name] = target
        else:
            left_out.append(("link to nothing inside the archive", name))
    names = sorted(files) if to_folders else []
    for name, target in to_folders.items():
        if name[: len(target)] == target:
            left_out.append(("link to a folder around it", name))
            continue
        folders.add(name)
        for below in names[bisect_left(names, target) :]:
            if below[: len(target)] != target:
                break
            files[(*name, *below[len(target) :])] = files[below]
        if len(files) > most:
            raise DataError(f"{place}: its links to folders give more than {_MOST_BY_LINKS:,} files; unpack it")
    return left_out


def _resolved(path: Parts, links: dict[Parts, Parts]) -> Parts:
    """The path without links, also among its folders; empty: links in a circle, or out of the archive."""
    for _ in range(_MOST_LINKS):
        depth = next((depth for depth in range(1, len(path) + 1) if path[:depth] in links), None)
        if depth is None:
            return path
        target = links[path[:depth]]
        if not target:
            return ()
        path = (*target, *path[depth:])
    return ()


def _leave_out_tool_folders(
    files: dict[Parts, tuple[int, int]], folders: set[Parts], left_out: list[tuple[str, Parts]]
) -> None:
    hidden = set()
    for folder in folders:
        depth = next((i for i, part in enumerate(folder, 1) if is_tool_folder(part)), None)
        if depth is not None:
            hidden.add(folder[:depth])
    if not hidden:
        return
    left_out += [("hidden folder, or one that a program made for itself", name) for name in sorted(hidden)]

    def is_inside(name: Parts) -> bool:
        return any(name[:depth] in hidden for depth in range(1, len(name) + 1))

    for name in [name for name in files if is_inside(name)]:
        del files[name]
    folders -= {name for name in folders if is_inside(name)}
    left_out[:] = [(reason, name) for reason, name in left_out if name in hidden or not is_inside(name)]
