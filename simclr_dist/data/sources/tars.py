"""Everything in a tar archive, found in place: nothing is unpacked, and nothing is written where a member points."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from simclr_dist.data.sources.compressed import decompressed
from simclr_dist.data.sources.content import FileBytes
from simclr_dist.data.sources.listing import Found, Listing, Parts
from simclr_dist.data.sources.members import Members, path_inside, target_of
from simclr_dist.errors import DataError

_MOST_NESTED = 8  # archives, one inside the other
_BLOCK = 512


def list_tar(path: Path, parts: Parts, listing: Listing) -> None:
    """Adds what the archive holds, with `parts` before its names. A compressed one is decompressed to a temporary file.

    Raises DataError when the archive is not whole, OSError when it cannot be read.
    """
    keep = decompressed(path)
    plain = str(path)
    if keep is not None:
        listing.keep.append(keep)
        plain = keep.name
    with open(plain, "rb") as file:
        size = os.path.getsize(plain)
        _list(_Archive(file, plain, str(path), (_MOST_NESTED + 1) * size), 0, size, parts, listing)


@dataclass
class _Archive:
    """path, name: of the file that is read, and of the archive in messages.

    left: bytes to read before archives inside it must have been read more than once, through links to them.
    """

    file: IO[bytes]
    path: str
    name: str
    left: int


def _list(
    around: _Archive, start: int, end: int, parts: Parts, listing: Listing, inside: Parts = (), num_around: int = 0
) -> None:
    """Adds what an archive at the bytes from start to end holds.

    inside: its path in the file that is read. num_around: archives that it lies in.
    """
    place = "/".join((around.name, *inside))
    if num_around > _MOST_NESTED:
        raise DataError(f"{place}: more than {_MOST_NESTED} archives lie one inside the other; unpack the outer ones")
    around.left -= end - start
    if around.left < 0:
        raise DataError(f"{place}: links name the same archives inside it again and again; unpack it")
    members = _read_members(around, start, end, place)
    for name, content in members.files.items():
        if name[-1].lower().endswith(".tar") and not name[-1].startswith("."):
            # As in ImageNet's own archive, an archive inside counts as a folder.
            below = (*name[:-1], name[-1][: -len(".tar")])
            listing.folders.append((*parts, *below))
            listing.notes.append(("archive inside the archive, read as a folder", (*parts, *name)))
            offset, size = content[1:]
            _list(around, offset, offset + size, (*parts, *below), listing, (*inside, *below), num_around + 1)
        else:
            listing.files.append(Found((*parts, *name), "/".join((place, *name)), content))
    listing.folders += [(*parts, *name) for name in members.folders]
    listing.left_out += [(reason, (*parts, *name)) for reason, name in members.left_out]


def _read_members(around: _Archive, start: int, end: int, place: str) -> Members:
    members = Members(place)
    try:
        around.file.seek(start)
        with tarfile.open(fileobj=around.file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # else it keeps what it has read
                if member.size < 0:  # the next member would be this one again
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
                sparse = member.sparse is not None  # type: ignore[attr-defined]
                if not sparse and member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                name = members.enter(member.name)
                if not name:
                    continue
                if member.isdir():
                    members.folders.add(name)
                elif member.islnk():
                    members.links[name] = path_inside(member.linkname)
                elif member.issym():
                    members.links[name] = target_of(name, member.linkname)
                elif sparse or not member.isreg():
                    members.left_out.append(("not an ordinary file", name))
                else:
                    members.files[name] = FileBytes(around.path, member.offset_data, member.size)
            _check_end(around.file, archive.offset, start, end)
    except (tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{place}: is not a complete tar archive: {error}") from None
    members.finish()
    return members


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
