"""How much room a data set takes."""

from __future__ import annotations

import os
from pathlib import Path


def size_on_disk(source: str) -> int:
    """Bytes of the files behind a data source; 0 for synthetic images."""
    path = Path(source)
    if path.is_dir():
        return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)
    return path.stat().st_size if path.is_file() else 0
