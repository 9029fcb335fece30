"""`--classes-from X.beton`: the classes of a file, by the JSON file that belongs to it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.errors import DataError


def with_class_names(options: SourceOptions) -> SourceOptions:
    """The options with `class_names`, where `classes_from` is a .beton file. Raises DataError."""
    if options.classes_from is None or not options.classes_from.endswith(".beton"):
        return options
    path = Path(options.classes_from)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the sidecar belongs to another file; the error below says it
        with open_beton(path) as beton:
            sidecar, names = beton.sidecar, beton.class_names
    if not isinstance(sidecar.get("class_names"), list):
        place = sidecar_path(path)
        why = "belongs to another file" if place.exists() else "is missing"
        raise DataError(f"--classes-from {path}: its classes have no names, because {place} {why}")
    return replace(options, class_names=names)
