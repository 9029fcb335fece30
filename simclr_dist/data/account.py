"""What became of everything that was found at a source, and how a source is to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from simclr_dist.safe_text import printable

Layout = Literal["auto", "classes", "flat"]
OnDamage = Literal["warn", "skip", "stop"]
Channels = Literal["rgb", "keep"] | tuple[int, ...]
Pages = Literal["channels", "images"]
Axes = Literal["hwc", "chw"]

NAMES_SHOWN = 5


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read. The defaults ask (DataError) wherever two readings are possible."""

    split: str | None = None
    """`train`, `test`, … where a source has several."""
    layout: Layout = "auto"
    """`classes`: folders are classes, whatever they are called. `flat`: images without classes."""
    class_depth: int | None = None
    """Which folder above an image is its class: 1 is the outermost one inside the source (and the split)."""
    classes_from: str | None = None
    """A .beton file or a folder whose classes, in their order, this source must use."""
    class_names: tuple[str, ...] | None = None
    """The classes to use, by name; `beton.classes_from.with_class_names` finds those of a .beton file."""
    labels: str | None = None
    """A CSV file with the header `name,label`; names relative to the source."""
    files: str | None = None
    """A text file with one name a line, relative to the source: only these images, in the order of names."""
    value_range: tuple[float, float] | None = None
    """Stored values that become 0 and 255, for images that do not have 8 bits."""
    bands: tuple[int, int, int] | None = None
    """Which channels, counted from 1, become red, green and blue."""
    channels: Channels = "rgb"
    """`keep`: all, of 8 or 16 bits as stored; or those with these numbers, counted from 1."""
    pages: Pages | None = None
    """Of a file with several, where channels are kept: each is a channel or more, or an image of its own."""
    axes: Axes | None = None
    """Of arrays with three axes, where their sizes do not tell."""
    on_damage: OnDamage = "warn"
    max_pixels: int | None = None

    @property
    def keeps_channels(self) -> bool:
        return self.channels != "rgb"

    @classmethod
    def from_arguments(cls, parsed: object) -> SourceOptions:
        """Of `argument_types.add_source_arguments`."""
        names = [field.name for field in fields(cls) if field.name != "class_names"]
        given: dict[str, Any] = {name: getattr(parsed, name) for name in names}
        return cls(**given | {name: tuple(value) for name, value in given.items() if isinstance(value, list)})


@dataclass(frozen=True)
class LeftOut:
    """Things of one kind that were found and not taken.

    reason: plain words, such as "not an image (.cls)". names: the first few.
    """

    reason: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """Everything found at a source: taken, or left out for a reason.

    layout: one sentence that says which folders are classes. taken: a number of images, or of what `noun` says.
    """

    source: str
    layout: str
    taken: int
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[LeftOut, ...] = ()
    """What is to be known of some that were taken, such as images of which only the first page is."""
    noun: str = "image"

    @property
    def num_left_out(self) -> int:
        return sum(group.count for group in self.left_out)

    def with_left_out(self, reason: str, names: Sequence[str]) -> Account:
        """The account after images among those taken turned out to be unusable."""
        if not names:
            return self
        group = LeftOut(reason, len(names), tuple(names[:NAMES_SHOWN]))
        return replace(self, taken=self.taken - len(names), left_out=(*self.left_out, group))

    def with_note(self, reason: str, names: Sequence[str]) -> Account:
        """The account with something to be known of some images."""
        if not names:
            return self
        return replace(self, notes=(*self.notes, LeftOut(reason, len(names), tuple(names[:NAMES_SHOWN]))))

    def lines(self) -> list[str]:
        """For a terminal or a log: one line a fact, printable whatever bytes the names hold."""
        lines = [f"{self.source}: {self.layout}", f"taken: {self.taken:,} {self.noun}{'' if self.taken == 1 else 's'}"]
        return [*map(printable, lines), *self.remarks()]

    def remarks(self) -> list[str]:
        """The lines about what was left out, and the notes."""
        lines = [f"left out: {_line(group)}" for group in self.left_out]
        return [printable(line) for line in (*lines, *(f"note: {_line(group)}" for group in self.notes))]

    def to_json(self) -> dict[str, Any]:
        return _printable_json(asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Account:
        """Raises KeyError or TypeError when the content is no account."""
        groups = {
            key: tuple(LeftOut(str(g["reason"]), int(g["count"]), tuple(map(str, g["names"]))) for g in content[key])
            for key in ("left_out", "notes")
        }
        return cls(
            str(content["source"]),
            str(content["layout"]),
            int(content["taken"]),
            **groups,
            noun=str(content.get("noun", "image")),
        )


def together(accounts: Sequence[Account], source: str, layout: str) -> Account:
    """One account of several sources; what was left out of them for the same reason is counted together."""

    def joined(groups: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
        found: dict[str, LeftOut] = {}
        for group in groups:
            before = found.get(group.reason, LeftOut(group.reason, 0, ()))
            names = (*before.names, *group.names)[:NAMES_SHOWN]
            found[group.reason] = LeftOut(group.reason, before.count + group.count, names)
        return tuple(found.values())

    return Account(
        source,
        layout,
        sum(account.taken for account in accounts),
        joined(group for account in accounts for group in account.left_out),
        joined(group for account in accounts for group in account.notes),
    )


def _line(group: LeftOut) -> str:
    more = ", …" if group.count > len(group.names) else ""
    return f"{group.count:,} × {group.reason}: {', '.join(group.names)}{more}"


def _printable_json(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: _printable_json(item) for key, item in value.items()}
    return [_printable_json(item) for item in value] if isinstance(value, tuple | list) else value
