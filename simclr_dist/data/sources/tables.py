"""A table as a source: one image a row, by the name of its file; perhaps its class and its split."""

from __future__ import annotations

import os
from pathlib import Path

from simclr_dist.data.account import NAMES_SHOWN, SourceOptions
from simclr_dist.data.sources.content import FileBytes
from simclr_dist.data.sources.listing import Found, Labels, Listing, Parts
from simclr_dist.data.sources.lists import IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, labels_in, normal, read_table
from simclr_dist.errors import DataError
from simclr_dist.source_text import is_url

TABLE_SUFFIXES = (".csv", ".tsv")


def list_table(path: Path, listing: Listing, options: SourceOptions) -> None:
    """Adds the files that the table names, relative to its folder. Raises DataError, also where one does not exist."""
    table = read_table(str(path))
    image = table.column(options.image_key, IMAGE_COLUMNS, "--image-key")
    label = table.column(options.label_key, LABEL_COLUMNS, "--label-key")
    split = table.column(None, SPLIT_COLUMNS, "one column of this kind, not with --label-key")
    if image is None:
        raise DataError(
            f"{path}: its header has the columns `{', '.join(table.columns)}`; which has the files of the images? Say "
            "--image-key NAME, or add a header such as `path,label` if it has none"
        )
    by_image = {} if label is None or options.layout == "flat" else labels_in(table, image, label)
    is_labelled = bool(by_image) and options.class_depth is None
    root = path.parent
    rows: dict[str, Parts] = {}
    for line, row in table.rows:
        name = normal(table.value(line, row, image))
        folder = () if split is None else tuple(filter(None, [table.value(line, row, split).strip()]))
        if rows.setdefault(name, folder) != folder:
            raise DataError(f"{path}, line {line}: {name} is in the split `{'/'.join(folder)}`, and in another above")
    _check_files(path, root, list(rows), sum(is_url(row[image]) for _, row in table.rows))
    if len(rows) < len(table.rows):
        twice = len(table.rows) - len(rows)
        listing.left_out.append((f"named again in the table ({twice:,} rows)", (path.name,)))
    prefix = listing.prefix
    for name in sorted(rows, key=lambda name: name.split("/")):
        # The folders of a labelled image say nothing: it has its class, and is there because the table names it.
        inside: Parts = (name,) if is_labelled else tuple(part for part in name.split("/") if part)
        listing.files.append(Found((*rows[name], *inside), prefix + name, FileBytes(os.path.join(root, name))))
    if is_labelled:
        column = table.columns[label or 0]
        labels = {prefix + name: found for name, found in by_image.items()}
        listing.labels = Labels(labels, f"labels from the column {column}", f"no {column}, taken without one")


def _check_files(path: Path, root: Path, names: list[str], num_urls: int) -> None:
    if num_urls:
        raise DataError(
            f"{path}: {num_urls:,} of its {len(names):,} images are URLs; fetch them first, for example with "
            "img2dataset, which writes WebDataset archives that are read here"
        )
    missing = [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
        raise DataError(
            f"{path}: {len(missing):,} of the {len(names):,} files that it names are not in {root}: {shown}"
        )
