"""The text by which a data set is named: a place, a pattern such as `shards/*.beton`, or several of these.

Everything that reads data takes one text. A list of places is a text of as many lines, so that it needs no type of its
own on its way from a configuration to a loader; in messages it is shortened.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class SourceText(str):
    """A text of one line or several. `lines` has them; an f-string shows the first and how many more there are."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return format(shown(self), spec)


def source_text(places: Iterable[str]) -> SourceText:
    """Raises ValueError where there is none, or one is no name."""
    texts = list(places)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("expected the name of a file, or a list of them")
    return SourceText("\n".join(text.strip("\n") for text in texts))


def lines(source: str) -> list[str]:
    return str(source).split("\n")


def shown(source: str) -> str:
    """For people: what a list begins with, and how many more there are."""
    first, *others = lines(source)
    return first if not others else f"{first} and {len(others)} more"


def is_pattern(place: str) -> bool:
    """Whether a line stands for all files that match it. A file that is called so is meant itself."""
    return glob.has_magic(place) and not os.path.lexists(place)


def matches(pattern: str) -> list[str]:
    """The files that a pattern means, by name and not as the file system lists them. `**` is any folders."""
    return sorted(glob.glob(pattern, recursive=True), key=lambda path: path.split(os.sep))


def places(source: str) -> list[str]:
    """All files and folders that a source names and that are there."""
    found = [matches(place) if is_pattern(place) else [place] for place in lines(source)]
    return [path for paths in found for path in paths if os.path.exists(path)]


def missing(source: str) -> str | None:
    """The first line that leads nowhere; None: all are there. Of a URL or a {range}, opening it says."""
    known = [place for place in lines(source) if not is_url(place) and "{" not in place]
    return next((place for place in known if not places(place)), None)


def is_url(place: str, suffix: str = "") -> bool:
    """suffix: of the path in it."""
    return _URL.match(place) is not None and re.split(r"[?#]", place, maxsplit=1)[0].endswith(suffix)
