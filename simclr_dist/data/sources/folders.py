"""Everything that lies in a folder, links followed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from simclr_dist.data.sources.content import FileBytes
from simclr_dist.data.sources.listing import Found, Listing, Parts, is_tool_folder, stamp


def list_folder(root: Path) -> Listing:
    """Raises OSError for what cannot be read, with the path in question."""
    prefix = "" if str(root) == "." else f"{str(root).rstrip(os.sep)}/"
    listing = Listing(str(root), prefix, is_archive=False)
    real = os.path.realpath(root)
    _enter(str(root), (), real, frozenset(), {real}, listing)
    listing.files.sort(key=lambda found: found.parts)
    return listing


def _enter(folder: str, parts: Parts, real: str, around: frozenset[str], entered: set[str], listing: Listing) -> None:
    """around: the real paths of the folders that were entered on the way here. entered: those of all folders."""
    listing.stamps.append(stamp(folder))
    around |= {real}
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        below = (*parts, entry.name)
        path = listing.prefix + "/".join(below)
        if _is_folder(entry):
            if is_tool_folder(entry.name):
                listing.left_out.append(("hidden folder, or one that a program made for itself", below))
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real.rstrip('/')}/{entry.name}"
            if target in around:
                listing.left_out.append(("link to a folder around it", below))
                continue
            if target in entered:
                listing.notes.append(("folder that is read under another name too", below))
            entered.add(target)
            listing.folders.append(below)
            _enter(path, below, target, around, entered, listing)
        elif _is_file(entry):
            listing.files.append(Found(below, path, FileBytes(path)))
        else:
            listing.left_out.append(("link to nothing" if entry.is_symlink() else "not a regular file", below))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise
