"""Command-line arguments that several parsers share. A value out of range is argparse's one-line error."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

from simclr_dist.safe_text import printable

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


class Parser(argparse.ArgumentParser):
    """Answers a slip of the pen with the nearest word, and a missing argument in plain words. Subcommands, too.

    `overrides` may stand before, between and behind options.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = self.parse_known_args(args, namespace)
        if hasattr(found, "overrides"):
            found.overrides = [*found.overrides, *filter(_SETTING.match, left)]
            left = [word for word in left if not _SETTING.match(word)]
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += _did_you_mean(wrong[1], re.findall(r"[\w./-]+", wrong[2]))
        elif wrong := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += _did_you_mean(wrong[1], _options(self))
        elif wrong := re.match(r"the following arguments are required: (.*)", message):
            needed = [name for name in wrong[1].split(", ") if "=" not in name]  # key=value may be left out
            message = f"missing: {', '.join(needed)}; `{self.prog} --help` says what that is"
        super().error(printable(message))  # it repeats what was typed


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Of a parser and all its subcommands: argparse meets an unknown one when it no longer knows whose it was."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    deeper = [option for action in inner for child in action.choices.values() for option in _options(child)]
    return [*parser._option_string_actions, *deeper]


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def share(text: str) -> float:
    """More than 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1, not {text}")
    return value


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, and is {value}")
    return value


def positive_float(text: str) -> float:
    """Finite."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {value}")
    return value


def non_negative_float(text: str) -> float:
    """Finite."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, not {value}")
    return value


def percentage(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be 1 to 100, not {value}")
    return value


def channels(text: str) -> str | tuple[int, ...]:
    """`rgb`, `keep`, or numbers such as 1,2,5."""
    if text in ("rgb", "keep"):
        return text
    if not re.fullmatch(r"[1-9][0-9]{0,4}(,[1-9][0-9]{0,4})*", text):
        raise argparse.ArgumentTypeError(f"expected keep, or numbers from 1 such as 1,2,5, not {text!r}")
    return tuple(map(int, text.split(",")))


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How a source of images is read: one argument for each field of `SourceOptions`, of the same name."""
    group = parser.add_argument_group("how SOURCE is read (docs/data.md)")
    group.add_argument(
        "--split", metavar="NAME", help="train, test, … where there are several (STL-10: also unlabeled)"
    )
    group.add_argument(
        "--layout",
        choices=("auto", "classes", "flat"),
        default="auto",
        help="classes: folders are classes; flat: no classes; auto: asks where both are possible",
    )
    group.add_argument(
        "--class-depth", type=positive_int, metavar="N", help="which folder above an image is its class (outermost: 1)"
    )
    group.add_argument("--classes-from", metavar="FILE.beton|FOLDER", help="use the classes of this data set")
    group.add_argument("--labels", metavar="FILE.csv", help="labels from a table with the header name,label")
    group.add_argument("--files", metavar="LIST", help="only the images named in this file, one a line")
    group.add_argument(
        "--range",
        dest="value_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="stored values that become 0 and 255 (with --channels keep: 0 and 65535), for images without 8 bits",
    )
    group.add_argument(
        "--bands", type=positive_int, nargs=3, metavar=("R", "G", "B"), help="the channels to take, counted from 1"
    )
    group.add_argument(
        "--channels",
        type=channels,
        default="rgb",
        metavar="keep|I,J,…",
        help="keep all channels, 1 to 16 of 8 or 16 bits as they are stored, or those, counted from 1 (default: rgb)",
    )
    group.add_argument(
        "--pages", choices=("channels", "images"), help="what the pages of a file are, with --channels keep"
    )
    group.add_argument("--axes", choices=("hwc", "chw"), help="of arrays (.npy) whose sizes do not tell, with keep")
    group.add_argument(
        "--on-damage",
        choices=("warn", "skip", "stop"),
        default="warn",
        help="for images that decode with errors (default: warn)",
    )
    group.add_argument("--max-pixels", type=positive_int, metavar="N", help="refuse images with more pixels")
