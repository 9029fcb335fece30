"""Everything in a zip archive, found in place and decompressed image by image."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from simclr_dist.data.sources.compressed import expands_too_far, most_expanded
from simclr_dist.data.sources.listing import Found, Listing, Parts
from simclr_dist.data.sources.members import Members, target_of
from simclr_dist.errors import DataError

_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA})
_LONGEST_LINK = 4096
_HEADER = struct.Struct("<4s22xHH")  # before the bytes of a member: its mark, the lengths of name and extra field
_ENCRYPTED = 1


class ZipMember(NamedTuple):
    """header: where the archive says that it lies. packed, size: bytes with and without compression."""

    path: str
    header: int
    packed: int
    size: int
    method: int
    checksum: int

    def read(self, most: int = -1) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.header)
            start = file.read(_HEADER.size)
            if len(start) < _HEADER.size or not start.startswith(b"PK\3\4"):
                raise DataError("the zip archive has no image where its list says")
            _, name, extra = _HEADER.unpack(start)
            file.seek(name + extra, os.SEEK_CUR)
            packed = file.read(self.packed)
        info = zipfile.ZipInfo()
        info.compress_size, info.file_size, info.compress_type, info.CRC = self[2:]
        try:
            with zipfile.ZipExtFile(io.BytesIO(packed), "r", info) as content:  # type: ignore[arg-type]
                found = content.read(self.size if most < 0 else most)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            raise DataError(f"its bytes in the zip archive are damaged: {error}") from None
        except Exception as error:  # LZMAError, of a module that may not be there
            raise DataError(f"its bytes in the zip archive are damaged: {type(error).__name__}: {error}") from None
        if most < 0 and len(found) != self.size:
            raise DataError(f"the zip archive holds {len(found):,} bytes of it and lists {self.size:,}")
        return found

    def num_bytes(self) -> int:
        return self.size


def list_zip(path: Path, parts: Parts, listing: Listing) -> None:
    """Adds what the archive holds, with `parts` before its names.

    Raises DataError when the archive is not whole, OSError when it cannot be read.
    """
    members = Members(str(path))
    try:
        for info in _entries(path):
            _enter(path, info, members)
    except (zipfile.BadZipFile, EOFError, ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise DataError(f"{path}: is not a complete zip archive: {error}") from None
    members.finish()
    for name, content in members.files.items():
        listing.files.append(Found((*parts, *name), "/".join((str(path), *name)), content))
    listing.folders += [(*parts, *name) for name in members.folders]
    listing.left_out += [(reason, (*parts, *name)) for reason, name in members.left_out]


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """Raises BadZipFile, also for what lies outside of the archive, and DataError for what is made to fill memory."""
    try:
        with zipfile.ZipFile(path, metadata_encoding="utf-8") as archive:  # as macOS writes names without saying so
            found, size = archive.infolist(), archive.start_dir
    except UnicodeDecodeError:
        with zipfile.ZipFile(path) as archive:
            found, size = archive.infolist(), archive.start_dir
    if sum(info.file_size for info in found) > most_expanded(path):
        raise expands_too_far(path, "unpack it beforehand")
    outside = next((i for i in found if i.header_offset < 0 or i.header_offset + i.compress_size > size), None)
    if outside is not None:
        raise zipfile.BadZipFile(f"{outside.filename} lies outside of it")
    return found


def _enter(path: Path, info: zipfile.ZipInfo, members: Members) -> None:
    made_by_dos = info.create_system == 0
    name = members.enter(info.filename.replace("\\", "/") if made_by_dos else info.filename)
    if not name:
        return
    kind = 0 if made_by_dos else stat.S_IFMT(info.external_attr >> 16)
    place = info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
    if info.is_dir() or kind == stat.S_IFDIR:
        members.folders.add(name)
    elif info.flag_bits & _ENCRYPTED:
        members.left_out.append(("encrypted", name))
    elif info.compress_type not in _METHODS:
        members.left_out.append((f"compressed in a way that is not read here ({info.compress_type})", name))
    elif kind == stat.S_IFLNK:
        target = ZipMember(str(path), *place).read(_LONGEST_LINK)
        members.links[name] = target_of(name, target.decode("utf-8", "surrogateescape"))
    elif kind not in (0, stat.S_IFREG):
        members.left_out.append(("not an ordinary file", name))
    else:
        members.files[name] = ZipMember(str(path), *place)
