"""From everything that was found at a source to its images: what is taken, as which class, and an account of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN, Account, LeftOut, SourceOptions
from simclr_dist.data.sources.channel_files import num_pages
from simclr_dist.data.sources.content import Content
from simclr_dist.data.sources.images import FileImages
from simclr_dist.data.sources.layout import Questions, kind_of_split, read_layout, some
from simclr_dist.data.sources.listing import Found, Labels, Listing, Parts, choose_images
from simclr_dist.data.sources.lists import check_names, in_order, number_classes, read_labels, read_names
from simclr_dist.data.sources.sample_values import Decoding
from simclr_dist.data.sources.webdataset import choose_image_of_sample, labels_of_samples
from simclr_dist.errors import DataError
from simclr_dist.safe_text import printable

Entry = tuple[str, Content]


def images_of(listing: Listing, options: SourceOptions, class_names: tuple[str, ...] | None) -> FileImages:
    """class_names: the classes to use, in their order; by default those that are found. Raises DataError."""
    origin = listing.origin
    images, others, notes = _choose(listing, options)
    labels = _labels(images, listing, options)
    if labels is not None:
        others = [entry for entry in others if entry[1] not in labels.files]
    if not images:
        groups = _groups(others + listing.left_out + listing.notes)
        found = [printable(f"{group.count:,} × {group.reason}: {group.names[0]}") for group in groups]
        raise DataError("\n  ".join([f"{origin}: holds no images that Pillow opens", *found]))
    paths, folders = _paths_and_folders(images, listing, options, labels is not None)
    reading = read_layout(paths, folders, origin, options, listing.is_archive, labels is not None)
    taken = [images[i] for i in reading.classes]
    classes = list(reading.classes.values())
    sentences = [listing.sentence, reading.sentence]
    if labels is not None:
        classes = [labels.by_image.get(image.name) for image in taken]
        sentences.append(labels.sentence)
        notes += [(labels.without, image.parts) for image, name in zip(taken, classes, strict=True) if name is None]
        class_names = class_names or labels.names or in_order({name for name in classes if name is not None})
    if options.files is not None:
        sentences.append(f"only images that {options.files} names, of {len(listing.files):,} files")
    names, numbers = number_classes(classes, class_names, origin, options.classes_from or "class_names")

    def is_asked_for(parts: Parts) -> bool:
        return not any(parts[:depth] in reading.other_splits for depth in range(1, len(parts) + 1))

    entries: list[Entry] = [(image.name, image.content) for image in taken]
    pages = None
    if options.pages == "images":
        entries, numbers, pages = _by_page(entries, numbers)
        sentences.append("each page of a TIFF is an image")

    account = Account(
        source=origin,
        layout="; ".join(filter(None, sentences)),
        taken=len(entries),
        left_out=_groups(entry for entry in others + listing.left_out + reading.left_out if is_asked_for(entry[1])),
        notes=_groups(entry for entry in notes + listing.notes + reading.notes if is_asked_for(entry[1])),
    )
    return FileImages(
        names,
        numbers,
        entries=entries,
        account=account,
        root=listing.prefix,
        decoding=Decoding(
            *(options.value_range, options.bands, options.max_pixels, options.on_damage),
            *(options.channels, options.pages, options.axes),
        ),
        keep=tuple(listing.keep) or None,
        page_of=pages,
    )


def _by_page(
    entries: list[Entry], labels: NDArray[np.int64]
) -> tuple[list[Entry], NDArray[np.int64], NDArray[np.int64]]:
    """An entry, a label and a number for each page of each file; the number is -1 where there is one page."""
    found: list[tuple[Entry, int, int]] = []
    for entry, label in zip(entries, labels.tolist(), strict=True):
        name, content = entry
        count = num_pages(content)
        found += [((f"{name}, page {i + 1}", content), label, i) for i in range(count if count > 1 else 0)]
        found += [(entry, label, -1)] if count == 1 else []
    expanded, its_labels, numbers = zip(*found, strict=True)
    return list(expanded), np.array(its_labels, np.int64), np.array(numbers, np.int64)


Entries = list[tuple[str, Parts]]


def _choose(listing: Listing, options: SourceOptions) -> tuple[list[Found], Entries, Entries]:
    """(images, other files with the reason for each, images with a note). Raises DataError."""
    if options.files is not None:
        return _named_in(options.files, listing), [], []
    if listing.are_images:
        return listing.files, [], []
    images, others, notes = choose_images(
        listing.files, arrays_too=options.keeps_channels, with_parts_of_samples=options.image_key is not None
    )
    images, unwanted = choose_image_of_sample(images, listing, options)
    kept = {image.parts for image in images}
    return images, others + unwanted, [note for note in notes if note[1] in kept]


def _labels(images: list[Found], listing: Listing, options: SourceOptions) -> Labels | None:
    """Classes that do not come from folders. Raises DataError."""
    if options.labels is not None:
        by_name = read_labels(options.labels, options.label_key)
        check_names(by_name, {listing.name_in(found) for found in listing.files}, options.labels, listing.origin)
        return Labels(
            {listing.prefix + name: label for name, label in by_name.items()},
            f"labels from {options.labels}",
            f"not in {options.labels}, taken without a label",
        )
    return listing.labels if listing.are_images or listing.labels else labels_of_samples(images, listing, options)


def _paths_and_folders(
    images: list[Found], listing: Listing, options: SourceOptions, is_labelled: bool
) -> tuple[list[Parts], list[Parts]]:
    """As the layout is read from them: without shards, unless each of them is a class. Raises DataError: a question."""
    paths, folders = [image.parts for image in images], listing.folders
    if not listing.shards:
        return paths, folders
    inside = [listing.without_shard(path) for path in paths]
    if not is_labelled and options.layout != "flat" and not any(len(path) > 1 for path in map(_below_splits, inside)):
        if options.layout == "classes" or options.class_depth is not None:
            return paths, folders
        shards = sorted(shard[-1] for shard in listing.shards)
        if len(shards) > 1:
            raise Questions(listing.origin, options).about(
                f"its images lie in {len(shards):,} archives ({some(shards)}), in no folders inside them, and have no "
                "labels; is each archive a class?",
                ["--layout classes", "--layout flat"],
            )
    return inside, [listing.without_shard(folder) for folder in folders if folder not in listing.shards]


def _below_splits(path: Parts) -> Parts:
    """The path below folders of splits."""
    while len(path) > 1 and kind_of_split(path[0]):
        path = path[1:]
    return path


def _named_in(file: str, listing: Listing) -> list[Found]:
    names = read_names(file)
    by_name = {listing.name_in(found): found for found in listing.files}
    check_names(names, by_name, file, listing.origin)
    chosen = set(names)
    return [found for name, found in by_name.items() if name in chosen]


def _groups(entries: Iterable[tuple[str, Parts]]) -> tuple[LeftOut, ...]:
    """By reason, the largest group first."""
    names: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for reason, parts in entries:
        counts[reason] += 1
        if counts[reason] <= NAMES_SHOWN:
            names.setdefault(reason, []).append("/".join(parts))
    return tuple(LeftOut(reason, count, tuple(names[reason])) for reason, count in counts.most_common())
