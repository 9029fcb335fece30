"""WebDatasets: files that have a name in common up to its first dot are one sample, `000.jpg` with `000.cls`.

What follows the dot is the key of a file. One key holds the image; another may hold its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from simclr_dist.bounded_json import parse_json
from simclr_dist.data.account import NAMES_SHOWN, SourceOptions
from simclr_dist.data.sources.layout import Questions, kind_of_split, some
from simclr_dist.data.sources.listing import Found, Labels, Listing, Parts
from simclr_dist.data.sources.lists import LABEL_COLUMNS, class_of
from simclr_dist.errors import DataError

_KEYS = ("cls", "json", "txt")  # that may hold a class
_LONGEST = 1 << 20  # bytes of such a file
_LONGEST_CLASS = 200  # letters; what is longer is a caption

Sample = Parts
"""What the names of one sample begin with."""


def sample_and_key(parts: Parts) -> tuple[Sample, str]:
    name, _, key = parts[-1].partition(".")
    return (*parts[:-1], name), key.lower()


def choose_image_of_sample(
    images: list[Found], listing: Listing, options: SourceOptions
) -> tuple[list[Found], list[tuple[str, Parts]]]:
    """(one image a sample, the others with the reason): that of --image-key, or the only one.

    Raises DataError where a sample has several and none was asked for.
    """
    if options.image_key is not None:
        wanted = {key.strip().lower().removeprefix(".") for key in options.image_key.split(",")}
        chosen = [found for found in images if not wanted.isdisjoint((sample_and_key(found.parts)[1], _suffix(found)))]
        if not chosen:
            there = some({sample_and_key(found.parts)[1] for found in images})
            raise DataError(f"{listing.origin}: no image has the key {options.image_key}; there are {there}")
        kept = {found.name for found in chosen}
        reason = f"not the image asked for (--image-key {options.image_key})"
        return chosen, [(reason, found.parts) for found in images if found.name not in kept]
    labelled = {sample_and_key(found.parts)[0] for found in listing.files if _suffix(found) in _KEYS}
    per_sample = Counter(sample_and_key(found.parts)[0] for found in images)
    several = {sample for sample, count in per_sample.items() if count > 1 and sample in labelled}
    if several and options.files is None:
        keys = Counter(key for found in images for sample, key in [sample_and_key(found.parts)] if sample in several)
        raise Questions(listing.origin, options).about(
            f"{len(several):,} samples have several images ({some(keys)}), such as {'/'.join(min(several))}; "
            "which one is to be learned from?",
            [f"--image-key {key}" for key, _ in keys.most_common(NAMES_SHOWN)],
        )
    return images, []


def labels_of_samples(images: Sequence[Found], listing: Listing, options: SourceOptions) -> Labels | None:
    """The classes that lie beside the images; None where there are none, or folders are asked for instead.

    Raises DataError where it is not clear, and for what is no class.
    """
    if options.label_key is None and (options.layout == "flat" or options.class_depth is not None):
        return None
    asked, *inside = (options.label_key or "").split(".")
    beside = _Beside(listing.files, {*_KEYS, asked})
    there = Counter(key for image in images for key in beside(image))
    if options.label_key is None:
        asked, *inside = _choose_key(there, images, beside, listing, options).split(".")
        if not asked:
            return None
    elif not there[asked]:
        raise DataError(
            f"{listing.origin}: beside no image lies a file with its class under the key {asked}; "
            f"{f'there are {some(there)}' if there else 'there are none under other keys'}"
        )
    files = {image.name: file for image in images if (file := beside(image).get(asked)) is not None}
    called = ".".join((asked, *inside))
    return Labels(
        {name: _read_class(file, asked, inside) for name, file in files.items()},
        sentence=f"labels from .{called}",
        without=f"no label under .{called}, taken without one",
        files=frozenset(file.parts for file in files.values()),
    )


class _Beside:
    """Finds the files beside an image: of its sample, or of its whole name but for the suffix."""

    def __init__(self, files: Iterable[Found], keys: set[str]) -> None:
        self._of: dict[Sample, dict[str, Found]] = {}
        for file in files:
            key = _suffix(file)
            if key in keys:
                sample = (*file.parts[:-1], file.parts[-1][: -len(key) - 1])
                self._of.setdefault(sample, {})[key] = file

    def __call__(self, image: Found) -> dict[str, Found]:
        """By key."""
        *folders, name = image.parts
        of_sample, of_name = (
            self._of.get((*folders, stem), {}) for stem in (name.split(".")[0], name[: name.rfind(".")])
        )
        return of_sample | of_name


def _suffix(found: Found) -> str:
    """What follows the last dot."""
    return found.parts[-1].rpartition(".")[2].lower()


def _choose_key(
    there: Counter[str], images: Sequence[Found], beside: _Beside, listing: Listing, options: SourceOptions
) -> str:
    """Empty: the files beside the images say no classes."""
    ask = Questions(listing.origin, options)
    folders = {image.parts[:-1] for image in images}
    folders = {listing.without_shard(folder) for folder in folders}
    in_folders = len({folder for folder in folders if not any(map(kind_of_split, folder))}) > 1
    if there["cls"]:
        if in_folders and options.layout == "classes":
            return ""
        if in_folders:
            raise ask.about(
                f"has folders ({some('/'.join(folder) for folder in folders)}) and {there['cls']:,} files .cls beside "
                "images; which say the classes?",
                ["--label-key cls", "--layout classes"],
            )
        return "cls"
    if in_folders or not listing.is_archive or options.layout == "classes":
        return ""
    answers = []
    if there["json"]:
        example = next(files["json"] for files in map(beside, images) if "json" in files)
        value = _read_json(example)
        keys = [key for key in value if key.lower() in LABEL_COLUMNS] if isinstance(value, dict) else []
        answers += [f"json.{key}" for key in keys]
    if there["txt"]:
        answers.append("txt")
    if not answers or (len(answers) == 1 and answers != ["txt"]):
        return "".join(answers)
    raise ask.about(
        f"{some(f'.{key}' for key in answers)} beside the images: a class, or something else?",
        [*(f"--label-key {key}" for key in answers), "--layout flat"],
    )


def _read_class(file: Found, key: str, inside: Sequence[str]) -> str | None:
    value: Any = _read_json(file) if key == "json" else _read_text(file)
    for name in inside:
        value = value.get(name) if isinstance(value, dict) else None
    try:
        found = class_of(value)
        if found is not None and (len(found) > _LONGEST_CLASS or "\n" in found):
            raise ValueError(f"{found[:40]!r}… is longer than the name of a class")
    except ValueError as error:
        raise DataError(f"{file.name}: {error}; --layout flat takes the images without classes") from None
    return found


def _read_json(file: Found) -> Any:
    try:
        return parse_json(_read(file), most_bytes=_LONGEST)
    except ValueError as error:
        raise DataError(f"{file.name}: is no JSON that can be read: {error}") from None


def _read_text(file: Found) -> str:
    try:
        return _read(file).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"{file.name}: is no text; --layout flat takes the images without classes") from None


def _read(file: Found) -> bytes:
    content = file.content.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise DataError(f"{file.name}: has more than {_LONGEST:,} bytes, and should hold a class")
    return content
