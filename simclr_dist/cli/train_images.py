"""The images of `simclr-dist train`: what lies at a source, which of it is held out, and the .beton files of both."""

from __future__ import annotations

import argparse
import re
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.cli.prepare import prepare_with_progress
from simclr_dist.config import Config
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.errors import DataError
from simclr_dist.source_text import is_url

if TYPE_CHECKING:
    from simclr_dist.data.sources.images import ImageSource

_HELD_OUT = 10  # one labelled image in so many
_FEWEST_TO_HOLD_OUT = 40
_LOOKED_AT = 32  # images whose size is looked at
_TEST_SPLITS = ("test", "val")


@dataclass(frozen=True)
class Prepared:
    """One .beton file to be: from a source, or the file itself where it is one already (options: None)."""

    source: str
    path: Path
    options: SourceOptions | None
    num_images: int
    num_classes: int
    names: tuple[str, ...] | None = None
    """Only these of the source's images; None: what the options say."""

    @property
    def is_elsewhere(self) -> bool:
        return self.options is None and is_url(self.source)

    @property
    def place(self) -> str:
        """What a configuration calls it."""
        return self.source if self.is_elsewhere else str(self.path.absolute())


@dataclass(frozen=True)
class Images:
    train: Prepared
    test: Prepared | None
    side: int
    remark: str
    """How images for evaluations come about, or why there are none."""


def images_to_prepare(args: argparse.Namespace, out: Path) -> Images:
    """Raises DataError: one message, with what to do."""
    try:
        return _look(args, out)
    except DataError as error:  # its advice is for `prepare`, whose arguments these are
        raise DataError(re.sub(r"simclr-dist prepare (.*?) OUT\.beton", r"simclr-dist train \1", str(error))) from None


def _look(args: argparse.Namespace, out: Path) -> Images:
    from simclr_dist.data.sources.open import open_source
    from simclr_dist.data.sources.remote import refuse_secrets

    options = SourceOptions.from_arguments(args)
    for source in filter(None, (args.source, args.test)):
        refuse_secrets(source)
    if names_beton(args.source):
        if source_options(args):
            raise DataError(
                f"{args.source}: is a .beton file already; how images are read was said when it was prepared"
            )
        train, side = _beton(args.source)
        return _with_labelled_test(args, out, train, side)
    splits = _splits(args.source, options)
    if splits is not None and args.test is None:
        (train_name, train_images), (test_name, test_images) = splits
        train = _prepared(args.source, out / "train.beton", replace(options, split=train_name), train_images)
        test = _prepared(args.source, out / "test.beton", replace(options, split=test_name), test_images)
        is_labelled = train.num_classes > 1
        remark = (
            f"{test.num_images:,} images of the split {test_name}"
            if is_labelled
            else "no labels: kNN needs two classes"
        )
        return Images(train, test if is_labelled else None, _side(train_images, options.keeps_channels), remark)
    if splits is not None:
        options = replace(options, split=splits[0][0])
    found = open_source(args.source, options)
    train = _prepared(args.source, out / "train.beton", options, found)
    if args.test is None and train.num_classes > 1:
        return _held_out(train, found, out)
    return _with_labelled_test(args, out, train, _side(found, options.keeps_channels))


def _beton(path: str) -> tuple[Prepared, int]:
    import numpy as np

    from simclr_dist.data.beton.shard_set import open_data

    with open_data(path) as beton:
        sides = np.minimum(beton.images["height"], beton.images["width"])
        labelled = beton.labels[beton.labels >= 0]
        train = Prepared(path, Path(path), None, beton.num_samples, len(np.unique(labelled)))
        return train, int(np.median(sides)) if len(sides) else 0


def _prepared(source: str, path: Path, options: SourceOptions, images: ImageSource) -> Prepared:
    labels = images.labels
    return Prepared(source, path, options, len(labels), len({int(label) for label in labels if label >= 0}))


def _splits(source: str, options: SourceOptions) -> tuple[tuple[str, ImageSource], tuple[str, ImageSource]] | None:
    """Training images and held-out ones, where the source has folders or files for both; else None."""
    from simclr_dist.data.sources.open import open_source

    if options.split is not None or options.layout != "auto":
        return None

    def split(name: str) -> tuple[str, ImageSource] | None:
        try:
            images = open_source(source, replace(options, split=name))
        except DataError:
            return None
        return (name, images) if len(images.labels) else None

    train = split("train")
    test = next(filter(None, map(split, _TEST_SPLITS)), None) if train else None
    return (train, test) if train and test else None


def _with_labelled_test(args: argparse.Namespace, out: Path, train: Prepared, side: int) -> Images:
    from simclr_dist.data.sources.open import open_source

    if args.test is None:
        why = (
            "its labels are not held out; name others with --test"
            if train.num_classes > 1
            else "fewer than two classes"
        )
        return Images(train, None, side, f"none ({why})")
    if train.num_classes < 2:
        raise DataError(f"--test {args.test}: evaluations need two classes or more in {args.source}, too")
    if names_beton(args.test):
        test = _beton(args.test)[0]
    else:
        classes_from = str(train.path) if train.options is None else None
        given = SourceOptions.from_arguments(args)
        pixels = SourceOptions(channels=given.channels, pages=given.pages, axes=given.axes)
        if pixels.keeps_channels:
            pixels = replace(pixels, value_range=given.value_range)
        options = replace(pixels, classes_from=classes_from)
        test = _prepared(args.test, out / "test.beton", options, open_source(args.test, pixels))
    return Images(train, test, side, f"{test.num_images:,} images of {args.test}")


def _held_out(train: Prepared, found: ImageSource, out: Path) -> Images:
    """A tenth of each class is not trained on."""
    import numpy as np

    from simclr_dist.data.sources.images import FileImages

    side, labels = _side(found, train.options is not None and train.options.keeps_channels), np.asarray(found.labels)
    names = (
        [found.name(i).removeprefix(found.root).lstrip("/") for i in range(len(labels))]
        if isinstance(found, FileImages) and found.page_of is None  # a list names files, not their pages
        else []
    )
    if len(labels) < _FEWEST_TO_HOLD_OUT or not names:
        return Images(
            train, None, side, f"none ({len(labels):,} images are too few to hold some out; --test names others)"
        )
    if any("\n" in name for name in names):
        return Images(train, None, side, "none (no list can hold names with line ends; --test names others)")
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        held[members[_HELD_OUT // 2 :: _HELD_OUT]] = True
    if len(np.unique(labels[held])) < 2:
        return Images(train, None, side, "none (too few images of each class to hold some out); --test names others")

    def part(which: Any) -> Prepared:
        ids = np.flatnonzero(which)
        path = out / ("test.beton" if which is held else "train.beton")
        return replace(train, path=path, num_images=len(ids), names=tuple(names[i] for i in ids))

    return Images(
        part(~held), part(held), side, f"{int(held.sum()):,} images, one in {_HELD_OUT} of each class, are held out"
    )


def _side(images: ImageSource, keeps_channels: bool) -> int:
    """Pixels of the shorter side, of the middle one among some images; 0 where none can be read."""
    sides = []
    count = len(images.labels)
    for index in sorted(
        {i * count // _LOOKED_AT for i in range(min(_LOOKED_AT, count))} if count > _LOOKED_AT else range(count)
    ):
        try:
            samples = images.kept(index).samples if keeps_channels else images.read(index)
            sides.append(min(samples.shape[:2]))
        except DataError:
            continue
    return int(statistics.median(sides)) if sides else 0


def prepare_images(images: Images, out: Path, config: Config) -> None:
    """Writes what is not there yet. Raises DataError."""
    max_side = 2 * config.data.image_size if images.side > 2 * config.data.image_size else None
    for part in filter(None, (images.train, images.test)):
        if part.options is None or part.path.exists():
            continue
        options = part.options
        if part.names is not None:
            listed = out / f"{part.path.stem}.txt"
            listed.write_text("\n".join(part.names) + "\n", encoding="utf-8", errors="surrogateescape")
            options = replace(options, files=str(listed))
        if part is images.test:
            options = replace(options, classes_from=str(images.train.path))
        prepare_with_progress(part.source, part.path, options=options, max_side=max_side, on_error="skip")


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What is not the default, by the name of the argument."""
    given, plain = asdict(SourceOptions.from_arguments(args)), asdict(SourceOptions())
    names = {"value_range": "range"}
    return {names.get(key, key): value for key, value in given.items() if value != plain[key]}
