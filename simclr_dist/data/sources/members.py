"""What an archive holds, of whatever format: its names made paths inside it, and its links followed."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from simclr_dist.data.sources.content import Content
from simclr_dist.data.sources.listing import Parts, is_tool_folder
from simclr_dist.errors import DataError

_MOST_LINKS = 40  # that are followed one after the other, as in Linux
_DEEPEST = 64  # folders in a name: each is listed itself
_MOST_BY_LINKS = 1_000_000  # files that have another name by a link to their folder


@dataclass
class Members:
    """place: of the archive, for messages. links: where each leads, as a path in the archive; (): nowhere."""

    place: str
    files: dict[Parts, Content] = field(default_factory=dict)
    links: dict[Parts, Parts] = field(default_factory=dict)
    folders: set[Parts] = field(default_factory=set)
    left_out: list[tuple[str, Parts]] = field(default_factory=list)

    def enter(self, text: str) -> Parts:
        """The path of a member whose name is `text`, below the archive even if that is absolute or leads outside.

        (): it has none, or lies too deep. What had this path before counts as an earlier version.
        """
        name = path_inside(text)
        if len(name) > _DEEPEST:
            self.left_out.append((f"more than {_DEEPEST} folders deep", name[:_DEEPEST]))
            return ()
        if self.files.pop(name, None) is not None or self.links.pop(name, None) is not None:
            self.left_out.append(("an earlier version of a file that the archive holds again", name))
        return name

    def finish(self) -> None:
        """When all members have been entered: files by links are added, hidden folders left out. Raises DataError."""
        self.folders |= {name[:depth] for name in self.files for depth in range(1, len(name))}
        self._follow_links()
        self._leave_out_tool_folders()

    def _follow_links(self) -> None:
        files, links = self.files, self.links
        most = len(files) + len(links) + _MOST_BY_LINKS
        to_folders: dict[Parts, Parts] = {}
        for name in links:
            target = self._resolved(name)
            if target in files:
                files[name] = files[target]
            elif target in self.folders:
                to_folders[name] = target
            else:
                self.left_out.append(("link to nothing inside the archive", name))
        names = sorted(files) if to_folders else []
        for name, target in to_folders.items():
            if name[: len(target)] == target:
                self.left_out.append(("link to a folder around it", name))
                continue
            self.folders.add(name)
            for below in names[bisect_left(names, target) :]:
                if below[: len(target)] != target:
                    break
                files[(*name, *below[len(target) :])] = files[below]
            if len(files) > most:
                raise DataError(
                    f"{self.place}: its links to folders give more than {_MOST_BY_LINKS:,} files; unpack it"
                )

    def _resolved(self, path: Parts) -> Parts:
        """The path without links, also among its folders; empty: links in a circle, or out of the archive."""
        for _ in range(_MOST_LINKS):
            depth = next((depth for depth in range(1, len(path) + 1) if path[:depth] in self.links), None)
            if depth is None:
                return path
            target = self.links[path[:depth]]
            if not target:
                return ()
            path = (*target, *path[depth:])
        return ()

    def _leave_out_tool_folders(self) -> None:
        hidden = set()
        for folder in self.folders:
            depth = next((i for i, part in enumerate(folder, 1) if is_tool_folder(part)), None)
            if depth is not None:
                hidden.add(folder[:depth])
        if not hidden:
            return
        self.left_out += [("hidden folder, or one that a program made for itself", name) for name in sorted(hidden)]

        def is_inside(name: Parts) -> bool:
            return any(name[:depth] in hidden for depth in range(1, len(name) + 1))

        for name in [name for name in self.files if is_inside(name)]:
            del self.files[name]
        self.folders -= {name for name in self.folders if is_inside(name)}
        self.left_out[:] = [(reason, name) for reason, name in self.left_out if name in hidden or not is_inside(name)]


def path_inside(name: str) -> Parts:
    """The path of a member below the archive, even if its name is absolute or leads outside."""
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


def target_of(link: Parts, target: str) -> Parts:
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
