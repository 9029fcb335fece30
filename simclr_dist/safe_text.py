"""Text that is safe to show, whoever wrote it. Imports the standard library only.

Names of files, classes and runs come from anywhere: a terminal obeys the control characters in them, Markdown its own
signs. And some values are nobody's business: passwords and tokens, in variables and in URLs.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any


def printable(text: str, keep: str = "") -> str:
    r"""The text with undecodable bytes of file names and control characters as \xNN and \uNNNN. keep: but for these.

    Control characters are those that a terminal obeys, also the marks that turn the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def message(error: object) -> str:
    """What an error says, without secrets.

    Its further lines are indented: a name that holds a new line begins no message of its own.
    """
    first, *others = mask(printable(str(error), keep="\n")).split("\n")
    return "\n".join([first, *(line if line.startswith("  ") or not line else f"  {line}" for line in others)])


def shortened(text: str, longest: int = 300) -> str:
    """On one line, with … in place of what is more than `longest` letters."""
    line = " ".join(text[: 4 * longest].split())
    return line if len(line) <= longest and len(text) <= 4 * longest else f"{line[: longest - 1]}…"


def markdown_cell(text: str) -> str:
    """A part of a line, or of a table's row, of Markdown: it begins no row, no column, no link and no tag."""
    text = html.escape(mask(printable(text)), quote=False)
    return re.sub(r"[|`*\[\]\\]", lambda sign: f"&#{ord(sign[0])};", text)


# ---------------------------------------------------------------------------------------------------------------------
# Secrets

# Words of a variable's name. PAT and the like only as a whole word: PATH and AUTHOR are no secrets.
_SECRET_NAME = re.compile(
    r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL|WEBHOOK|(?<![A-Z0-9])(O?AUTH|PAT|PASS|DSN|JWT|COOKIE)(?![A-Z0-9])",
    re.IGNORECASE,
)
# A URL with a user or a password in it, and what some services call their tokens.
_SECRET_VALUE = re.compile(
    r"(?<=://)[^/?#\s'\"]+(?=@)|\b(gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|AKIA)[\w-]{16,}|\bBearer\s+\S+"
)
# NAME=value where the name is that of a secret, as in a command line: --env WANDB_API_KEY=… Not the keys of a
# configuration, which are small letters.
_SECRET_SETTING = re.compile(r"(?<![\w.])([A-Z_][A-Z0-9_]*)=(?!\s)([^\s'\";&|]+)")


def looks_secret(name: str, value: str = "") -> bool:
    """Whether a variable of this name, or with this value, should stand in no file and on no screen."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def mask(text: str) -> str:
    """The text with whatever looks like a secret as ***."""
    text = _SECRET_SETTING.sub(lambda found: f"{found[1]}=***" if looks_secret(found[1]) else found[0], text)
    return _SECRET_VALUE.sub("***", text)


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """Variables, by name, for display and for records."""
    return {name: "***" if looks_secret(name) else mask(env[name]) for name in sorted(env)}


def masked_json(value: Any) -> Any:
    """The texts in lists and objects masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: masked_json(entry) for key, entry in value.items()}
    return [masked_json(entry) for entry in value] if isinstance(value, list | tuple) else value
