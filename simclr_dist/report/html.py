"""HTML elements. Texts come from runs, which may have come from anybody: whatever is not `Html` already is escaped,
shows its control characters, also the marks that turn the direction of writing, and hides what looks like a secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from simclr_dist.safe_text import mask, printable

_VOID = {"img", "meta"}


class Html(str):
    """Text that is HTML. Only `element`, `join` and constants make it."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """<name attribute="…">children</name>; `class_` stands for class."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(value))}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def _text(text: str) -> str:
    return escape(mask(printable(text, keep="\n")))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str) -> Html:
    """The first column names the row. It scrolls on its own where the page is too narrow for it."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    body = element(
        "tbody",
        *(
            element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
            for row in rows
        ),
    )
    return element("div", element("table", top, body, **attributes), class_="scroll", tabindex="0")


def figure(uri: str, description: str, caption: str, class_: str = "") -> Html:
    return element("figure", element("img", src=uri, alt=description, class_=class_), element("figcaption", caption))
