"""JSON that others may have written, read within bounds.

Python's reader has none: some brackets end a program with RecursionError, and a large file fills its memory. Here
whatever is wrong is a ValueError with one sentence, as a broken file is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20
MOST_DEPTH = 64
# A text may lack its end. It is passed over as a whole, and never tried again from its middle.
_TEXT_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str | bytes, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value that `text` says. Raises ValueError: too long, too deep, no JSON."""
    if len(text) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes; so much JSON is not read")
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > MOST_DEPTH and _depth(text) > MOST_DEPTH:
        raise ValueError(f"it nests lists or objects more than {MOST_DEPTH} deep")
    return json.loads(text)


def read_json(path: Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a file, of which no more than `most_bytes` are read. Raises OSError, or ValueError as above."""
    with path.open("rb") as file:
        return parse_json(file.read(most_bytes + 1), most_bytes=most_bytes)


def _depth(text: str) -> int:
    """How deep the brackets nest that open, outside of texts."""
    deepest = depth = 0
    for found in _TEXT_OR_BRACKET.finditer(text):
        first = found[0][0]
        depth += first in "[{"
        depth -= first in "]}"
        deepest = max(deepest, depth)
    return deepest
