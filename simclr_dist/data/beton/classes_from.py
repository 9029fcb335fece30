"""`--classes-from X.beton`: the classes of a file or of shards, by the JSON files that belong to them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.reader import sidecar_path
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.errors import DataError


def with_class_names(options: SourceOptions) -> SourceOptions:
    """The options with `class_names`, where `classes_from` is a .beton file. Raises DataError."""
    if options.classes_from is None or not names_beton(options.classes_from):
        return options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the sidecar belongs to another file; the error below says it
        with open_data(options.classes_from) as beton:
            names, files = beton.class_names, zip(beton.files(), beton.sidecars, strict=True)
            unnamed = [path for (path, _), sidecar in files if not isinstance(sidecar.get("class_names"), list)]
    if unnamed:
        place = sidecar_path(Path(unnamed[0]))
        why = "belongs to another file" if place.exists() else "is missing"
        raise DataError(f"--classes-from {options.classes_from}: its classes have no names, because {place} {why}")
    return replace(options, class_names=names)
