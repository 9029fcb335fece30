"""Reads splits and classes from the paths of images, and asks where two readings are possible.

A path is read as [folders around everything/][split/]class/…/image.jpg.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from simclr_dist.data.account import NAMES_SHOWN, SourceOptions
from simclr_dist.data.sources.listing import Parts
from simclr_dist.errors import DataError
from simclr_dist.safe_text import printable

_SPLIT = re.compile(
    r"(?:(?P<trainval>trainval)|(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)"
    r"|(?P<dev>dev)|(?P<eval>eval(?:uation)?)|(?P<unlabeled>unlabell?ed))(?:sets?|data|images?|imgs?|split|[ab])?"
)
# Names of folders that hold images or masks of all classes, and are no classes themselves.
_IMAGES = frozenset({"images", "image", "imgs", "img", "jpegimages", "pictures", "photos"})
_MASKS = frozenset(
    {"masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "segmentations", "targets"}
    | {"segmentationclass", "segmentationobject", "groundtruth", "ground_truth", "gt", "depth", "trimaps"}
)


@dataclass
class Reading:
    """classes: the class of each image that is taken, by its index; None where it has none.

    sentence: how the paths were read, for people. left_out, notes: (reason, path). other_splits: the folders of splits
    that were not asked for.
    """

    classes: dict[int, str | None]
    sentence: str
    left_out: list[tuple[str, Parts]] = field(default_factory=list)
    notes: list[tuple[str, Parts]] = field(default_factory=list)
    other_splits: set[Parts] = field(default_factory=set)


def read_layout(
    paths: Sequence[Parts],
    folders: Iterable[Parts],
    origin: str,
    options: SourceOptions,
    is_archive: bool,
    is_labelled: bool = False,
) -> Reading:
    """paths: of all images. folders: all that were entered, to notice classes without an image.

    is_labelled: the images have classes already, so that folders are none.

    Raises DataError when the options do not fit, and where two readings are possible: with the commands that choose.
    """
    ask = Questions(origin, options, is_archive, is_labelled)
    around = _folders_around(paths, ask)
    rest = {i: path[len(around) :] for i, path in enumerate(paths)}
    reading = Reading({}, "")
    split = None
    if options.split is not None:
        split, level, rest = _take_split(rest, options.split, origin, reading)
    elif options.layout == "auto":
        split, level = _only_split(rest, ask), 0
        rest = rest if split is None else {i: path[1:] for i, path in rest.items()}
    if is_labelled or options.layout == "flat":
        reading.classes = dict.fromkeys(rest)
        reading.sentence = "folders are no classes"
    else:
        _read_classes(rest, ask, reading)
        above = around if split is None else (*around, split)
        if split is None or level == 0:
            depth = len(above) + (options.class_depth or 1)
            filled = {paths[i][:depth] for i in rest}
            reading.left_out += [
                ("folder without images", folder)
                for folder in folders
                if len(folder) == depth and folder[: len(above)] == above and folder not in filled
            ]
    if split is not None:
        others = sorted({folder[-1] for folder in reading.other_splits})
        also = f" (not asked for: {some(others)})" if others else ""
        reading.sentence = f"split {split}{also}; {reading.sentence}"
    if around:
        reading.sentence = f"inside {'/'.join(around)}: {reading.sentence}"
    reading.other_splits = {(*around, *folder) for folder in reading.other_splits}
    return reading


def kind_of_split(name: str) -> str | None:
    """`train` for names such as train, Training, train2017, my_train and trainA; None for what is no split."""
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name):
        match = _SPLIT.fullmatch(word.lower())
        if match is not None:
            return match.lastgroup
    return None


def _is_split(name: str) -> bool:
    """Whether it is a split's name and nothing more."""
    match = _SPLIT.fullmatch(name.lower())
    return match is not None and match[match.lastgroup or 0] == name.lower()


@dataclass(frozen=True)
class Questions:
    """What a person has to decide about a source, with the commands that answer."""

    origin: str
    options: SourceOptions
    is_archive: bool = True
    is_labelled: bool = False

    def about(self, what: str, answers: Sequence[str], inside: str = "") -> DataError:
        """answers: further arguments of `prepare`. inside: a folder that would be a clear SOURCE, one more answer."""
        given = [
            f"{option} {shlex.quote(str(value))}"
            for option, value in (
                ("--split", self.options.split),
                ("--class-depth", self.options.class_depth),
                ("--labels", self.options.labels),
                ("--files", self.options.files),
                ("--classes-from", self.options.classes_from),
                ("--image-key", self.options.image_key),
                ("--label-key", self.options.label_key),
            )
            if value is not None
        ]
        commands = [" ".join([self._command(self.origin), *given, answer]) for answer in answers]
        if inside and not self.is_archive:
            commands.insert(0, self._command(f"{self.origin.rstrip('/')}/{inside}"))
        lines = [f"{self.origin}: {what}", *(f"  {command}" for command in commands)]
        return DataError("\n".join(map(printable, lines)))

    def _command(self, source: str) -> str:
        return f"simclr-dist prepare {shlex.quote(source)} OUT.beton"


def _folders_around(paths: Sequence[Parts], ask: Questions) -> Parts:
    """The folders, one inside the other, that hold everything and are neither a split nor the only class."""
    depth = 0
    while all(len(path) > depth + 2 for path in paths):
        heads = {path[depth] for path in paths}
        if len(heads) > 1 or _is_split(paths[0][depth]):
            break
        depth += 1
    options = ask.options
    if depth == 0 or ask.is_archive or options.split or ask.is_labelled or options.layout == "flat":
        return paths[0][:depth]
    if options.layout == "classes" or options.class_depth:
        return ()
    inside = {path[depth] for path in paths if len(path) > depth + 1}
    if any(map(kind_of_split, inside)):
        return paths[0][:depth]
    only = "/".join(paths[0][:depth])
    raise ask.about(
        f"its only folder is {only}, which holds {some(inside)}; is it the class, or are they the classes?",
        ["--layout classes", f"--class-depth {depth + 1}"],
        inside=only,
    )


def _only_split(rest: dict[int, Parts], ask: Questions) -> str | None:
    """The split that everything lies in; None when nothing resembles a split."""
    folders = {path[:-1] for path in rest.values()}
    heads = {folder[0] for folder in folders if folder}
    alike = sorted(filter(kind_of_split, heads))
    if alike:
        choices = [f"--split {shlex.quote(name)}" for name in alike]
        beside = sorted(heads - set(alike)) + (["images in no folder"] if () in folders else [])
        if beside:
            raise ask.about(
                f"{some(alike)}: splits? Beside them are {some(beside)}. Choose a split, or take all as classes",
                [*choices[:NAMES_SHOWN], "--layout classes"],
            )
        if len(alike) > 1:
            raise ask.about(
                f"has the splits {', '.join(alike)}; say which with --split, or that they are classes",
                [*choices[:NAMES_SHOWN], "--layout classes"],
            )
        if _is_split(alike[0]):
            return alike[0]
        raise ask.about(
            f"is its only folder, {alike[0]}, a class?", ["--layout classes", "--layout flat"], inside=alike[0]
        )
    deeper = sorted({name for folder in folders for name in folder[1:] if _is_split(name)})
    if deeper:
        raise ask.about(
            f"its folders hold splits ({some(deeper)}); choose one, or take everything",
            [*(f"--split {shlex.quote(name)}" for name in deeper[:NAMES_SHOWN]), "--layout classes"],
        )
    return None


def _take_split(rest: dict[int, Parts], split: str, origin: str, reading: Reading) -> tuple[str, int, dict[int, Parts]]:
    """(the folder's name, how deep it lies, the paths of its images without it). Writes down what lies elsewhere."""
    folders = {path[:-1] for path in rest.values()}
    names: list[set[str]] = [{folder[level] for folder in folders if len(folder) > level} for level in (0, 1)]
    for level in (0, 1):
        name = _matching(names[level], split, origin)
        if name is not None:
            break
    else:
        known = sorted(filter(kind_of_split, names[0]))
        if known:
            raise DataError(f"{origin}: has the splits {', '.join(known)}; there is no `{split}`")
        raise DataError(f"{origin}: has no splits (folders such as train and test), but `{split}` was asked for")
    inside = {}
    for i, path in rest.items():
        here = path[level] if len(path) > level + 1 else None
        if here == name:
            inside[i] = path[:level] + path[level + 1 :]
        elif here is not None and kind_of_split(here):
            reading.other_splits.add(path[: level + 1])
        else:
            reading.left_out.append((f"outside of the split {name}", path))
    return name, level, inside


def _matching(names: set[str], split: str, origin: str) -> str | None:
    """The folder that is meant by a split's name: of that name, of that name in other case, or of that kind."""
    if split in names:
        return split
    kind = kind_of_split(split)
    for found in (
        sorted(name for name in names if name.lower() == split.lower()),
        sorted(name for name in names if _is_split(name) and kind_of_split(name) == kind),
        sorted(name for name in names if kind is not None and kind_of_split(name) == kind),
    ):
        if len(found) > 1:
            raise DataError(f"{origin}: `{split}` may be any of {', '.join(found)}; give the folder's own name")
        if found:
            return found[0]
    return None


def _read_classes(rest: dict[int, Parts], ask: Questions, reading: Reading) -> None:
    options = ask.options
    folders = {path[:-1] for path in rest.values()}
    if options.layout == "auto" and options.class_depth is None:
        _ask_about_roles(folders, ask)
    depth = options.class_depth or 1
    reading.classes = {i: path[depth - 1] if len(path) > depth else None for i, path in rest.items()}
    names = sorted({name for name in reading.classes.values() if name is not None})
    if not names:
        deepest = max(map(len, folders))
        if options.class_depth is not None or options.layout == "classes":
            raise DataError(
                f"{ask.origin}: no image has a class folder at depth {depth}; the deepest one lies in {deepest} folders"
            )
        reading.sentence = "no classes, because the images lie in no folders"
        return
    count, folder = ("1 class", "folder") if len(names) == 1 else (f"{len(names):,} classes", "folders")
    level = f"outermost {folder}" if depth == 1 else f"{folder} at depth {depth}"
    reading.sentence = f"{count}, the {level} ({some(names)})"
    if any(len(folder) > depth for folder in folders):
        reading.sentence += "; folders inside them are no classes"
    if len({folder[:depth] for folder in folders if len(folder) >= depth}) > len(names):
        reading.sentence += "; folders of the same name are one class"
    reading.notes += [
        ("has no class folder, taken without a label", path) for i, path in rest.items() if reading.classes[i] is None
    ]


def _ask_about_roles(folders: Collection[Parts], ask: Questions) -> None:
    """Raises DataError where folders seem to be named by what lies in them instead of by class."""
    heads = {folder[0] for folder in folders if folder}
    images = sorted(name for name in heads if name.lower() in _IMAGES)
    masks = sorted(name for name in heads if name.lower() in _MASKS)
    if images or masks:
        raise ask.about(
            f"{some(images + masks)}: a name of a class, or of what the folder holds?",
            ["--layout classes", "--layout flat"],
            inside=images[0] if images and masks else "",
        )
    deeper = sorted({name for folder in folders for name in folder[1:] if name.lower() in _MASKS})
    if deeper:
        raise ask.about(
            f"its folders hold others called {some(deeper)}; are there masks instead of images in them?",
            ["--layout classes", "--files LIST"],
        )


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    ordered = sorted(names)
    return ", ".join(ordered[:NAMES_SHOWN]) + (", …" if len(ordered) > NAMES_SHOWN else "")
