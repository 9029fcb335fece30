"""Where the bytes of one image lie: a file, a part of one, or what a container holds. Small, and sent to workers."""

from __future__ import annotations

import io
from typing import IO, Any, NamedTuple, Protocol


class Content(Protocol):
    """A tuple that begins with the path of a file, and goes on with the place in it."""

    @property
    def path(self) -> str: ...

    def __getitem__(self, part: slice, /) -> Any: ...

    def read(self, most: int = -1) -> bytes:
        """All bytes of the image, or the first `most`. Raises OSError, or DataError without the image's name."""
        ...

    def num_bytes(self) -> int:
        """How many bytes `read` gives, as far as is known without reading. Raises OSError."""
        ...


class FileBytes(NamedTuple):
    """size -1: the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, most: int = -1) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size if most < 0 else most if self.size < 0 else min(most, self.size))

    def num_bytes(self) -> int:
        import os

        return self.size if self.size >= 0 else os.stat(self.path).st_size


def open_content(content: Content) -> IO[bytes]:
    """As a file; a whole one is not read into memory. Raises as `read`."""
    if isinstance(content, FileBytes) and content.size < 0:
        return open(content.path, "rb")
    return io.BytesIO(content.read())
