"""From everything that was found at a source to its images: what is taken, as which class, and an account of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.account import NAMES_SHOWN, Account, LeftOut, SourceOptions
from simclr_dist.data.sources.channel_files import num_pages
from simclr_dist.data.sources.images import FileImages
from simclr_dist.data.sources.layout import read_layout
from simclr_dist.data.sources.listing import Found, Listing, Parts, choose_images
from simclr_dist.data.sources.lists import check_names, number_classes, read_labels, read_names
from simclr_dist.data.sources.sample_values import Decoding
from simclr_dist.errors import DataError
from simclr_dist.safe_text import printable

Entry = tuple[str, str, int, int]


def images_of(listing: Listing, options: SourceOptions, class_names: tuple[str, ...] | None) -> FileImages:
    """class_names: the classes to use, in their order; by default those that are found. Raises DataError."""
    origin = listing.origin
    if options.files is None:
        images, others, notes = choose_images(listing.files, arrays_too=options.keeps_channels)
    else:
        images, others, notes = _named_in(options.files, listing), [], []
    if not images:
        groups = _groups(others + listing.left_out + listing.notes)
        found = [printable(f"{group.count:,} × {group.reason}: {group.names[0]}") for group in groups]
        raise DataError("\n  ".join([f"{origin}: holds no images that Pillow opens", *found]))
    reading = read_layout([image.parts for image in images], listing.folders, origin, options, listing.is_archive)
    taken = [images[i] for i in reading.classes]
    classes = list(reading.classes.values())
    if options.labels is not None:
        labels_by_name = read_labels(options.labels)
        check_names(labels_by_name, {"/".join(found.parts) for found in listing.files}, options.labels, origin)
        classes = [labels_by_name.get("/".join(image.parts)) or None for image in taken]
        reading.sentence += f"; labels from {options.labels}"
        without = [image.parts for image, label in zip(taken, classes, strict=True) if label is None]
        notes += [(f"not in {options.labels}, taken without a label", parts) for parts in without]
    if options.files is not None:
        reading.sentence += f"; only images that {options.files} names, of {len(listing.files):,} files"
    names, labels = number_classes(classes, class_names, origin, options.classes_from or "class_names")

    def is_asked_for(parts: Parts) -> bool:
        return not any(parts[:depth] in reading.other_splits for depth in range(1, len(parts) + 1))

    entries = [(image.name, image.path, image.offset, image.size) for image in taken]
    pages = None
    if options.pages == "images":
        entries, labels, pages = _by_page(entries, labels)
        reading.sentence += "; each page of a TIFF is an image"

    account = Account(
        source=origin,
        layout=reading.sentence,
        taken=len(entries),
        left_out=_groups(entry for entry in others + listing.left_out + reading.left_out if is_asked_for(entry[1])),
        notes=_groups(entry for entry in notes + listing.notes + reading.notes if is_asked_for(entry[1])),
    )
    return FileImages(
        names,
        labels,
        entries=entries,
        account=account,
        root=listing.prefix,
        decoding=Decoding(
            *(options.value_range, options.bands, options.max_pixels, options.on_damage),
            *(options.channels, options.pages, options.axes),
        ),
        keep=listing.keep,
        page_of=pages,
    )


def _by_page(
    entries: list[Entry], labels: NDArray[np.int64]
) -> tuple[list[Entry], NDArray[np.int64], NDArray[np.int64]]:
    """An entry, a label and a number for each page of each file; the number is -1 where there is one page."""
    found: list[tuple[Entry, int, int]] = []
    for entry, label in zip(entries, labels.tolist(), strict=True):
        name, path, offset, size = entry
        count = num_pages(path, offset, size)
        found += [((f"{name}, page {i + 1}", path, offset, size), label, i) for i in range(count if count > 1 else 0)]
        found += [(entry, label, -1)] if count == 1 else []
    expanded, its_labels, numbers = zip(*found, strict=True)
    return list(expanded), np.array(its_labels, np.int64), np.array(numbers, np.int64)


def _named_in(file: str, listing: Listing) -> list[Found]:
    names = read_names(file)
    by_name = {"/".join(found.parts): found for found in listing.files}
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
