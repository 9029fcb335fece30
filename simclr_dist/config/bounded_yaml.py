"""YAML that others may have written, read within bounds: of a file's size, of its depth, and of what its aliases mean.

An alias stands for all that it names: nine lines of aliases of aliases stand for a billion values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_VALUES = 10_000
MOST_DEPTH = 64
LONGEST_SCALAR = 1 << 16


class BoundedLoader(yaml.SafeLoader):
    """Plain values only, within the bounds; what exceeds them is a YAMLError that says where."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._num_values = self._depth = 0
        self._values_of: dict[yaml.Node, int] = {}
        """Each node that is complete, with the number of values it stands for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if self._depth >= MOST_DEPTH:
            raise _beyond(f"nested too deeply: more than {MOST_DEPTH} levels", event)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_SCALAR:
            raise _beyond(f"a value of more than {LONGEST_SCALAR:,} characters", event)
        before = self._num_values
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            self._num_values += 1
            self._values_of[node] = self._num_values - before
        elif node in self._values_of:
            self._num_values += self._values_of[node]
        else:
            raise _beyond("an alias of itself", event)
        if self._num_values > MOST_VALUES:
            raise _beyond(f"more than {MOST_VALUES:,} values, aliases counted as what they stand for", event)
        return node


def _beyond(what: str, event: yaml.Event) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"the file holds {what}", problem_mark=event.start_mark)  # type: ignore[arg-type]


def read_text(path: Path) -> str:
    """Raises OSError, UnicodeDecodeError, or YAMLError for a file that is too long."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise yaml.MarkedYAMLError(problem=f"the file is longer than {MOST_BYTES:,} bytes")
    return content.decode("utf-8")


def read_yaml(path: Path) -> Any:
    """The plain values of a file. Raises OSError; YAMLError where it is no YAML, or exceeds the bounds."""
    try:
        return BoundedLoader(read_text(path)).get_single_data()
    except ValueError as error:  # among them UnicodeDecodeError; also dates and numbers that there cannot be
        raise yaml.MarkedYAMLError(problem=str(error)) from None
