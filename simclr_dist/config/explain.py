"""Problems of a configuration, as lines for people: where, which key, what is wrong, what to write instead."""

from __future__ import annotations

import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from simclr_dist.config.schema import IMAGES, Config, Section
from simclr_dist.source_text import missing

KeyPath = tuple[str, ...]

_SCIENTIFIC = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")


def cross_checks(
    values: dict[str, Any], origins: dict[KeyPath, str], path: Path, world_size: int | None, check_data: bool
) -> list[str]:
    """Checks of single values that need the world: made on the raw values, so that they are reported with the rest."""
    problems = []

    def get(*keys: str) -> Any:
        found: Any = values
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    global_batch, micro_batch = get("train", "global_batch_size"), get("train", "micro_batch_size")
    if world_size and isinstance(global_batch, int) and global_batch > 0:
        where = _place(("train", "global_batch_size"), origins, path)
        if global_batch % world_size:
            lower, upper = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
            near = f"{lower} or {upper}" if lower else f"{upper}"
            problems.append(
                f"{where}: train.global_batch_size: {global_batch} does not divide over {world_size} processes; "
                f"use {near}"
            )
        elif isinstance(micro_batch, int) and micro_batch > 0 and (global_batch // world_size) % micro_batch:
            where = _place(("train", "micro_batch_size"), origins, path)
            problems.append(
                f"{where}: train.micro_batch_size: {micro_batch} does not divide the "
                f"{global_batch // world_size} images of each process"
            )
    shards = get("train", "virtual_shards")
    if world_size and isinstance(shards, int) and shards > 0 and shards % world_size:
        where = _place(("train", "virtual_shards"), origins, path)
        problems.append(f"{where}: {shards_over_processes(shards, world_size)}")
    if check_data and get("data", "kind") in (None, IMAGES):  # what others name, only they know
        for keys in (("data", "train"), ("data", "test"), ("evaluation", "train")):
            source = get(*keys)
            for name in source if isinstance(source, list) else [source]:
                if isinstance(name, str) and name != "synthetic" and (gone := missing(name)) is not None:
                    problems.append(
                        f"{_place(keys, origins, path)}: {'.'.join(keys)}: {gone} does not exist; "
                        f"make it with `simclr-dist prepare SOURCE {gone}`"
                    )
    return problems


def shards_over_processes(shards: int, world_size: int) -> str:
    """What is wrong where `shards % world_size`."""
    return (
        f"train.virtual_shards: {shards} shards do not divide over {world_size} processes; use a power of two of "
        f"processes, at most {shards}"
    )


def _place(key_path: KeyPath, origins: dict[KeyPath, str], path: Path) -> str:
    while key_path:
        if key_path in origins:
            return origins[key_path]
        key_path = key_path[:-1]
    return str(path)


def explain(detail: typing.Any, origins: dict[KeyPath, str], path: Path, kind_of_file: type[Section] = Config) -> str:
    """One problem found by pydantic, as a line for people."""
    # Union members appear in pydantic's location; they are no keys of ours.
    keys: list[str] = []
    model: Any = kind_of_file
    for part in detail["loc"]:
        if fields := getattr(model, "model_fields", None):
            names = list(fields)
        if fields is not None and part in fields:
            keys.append(str(part))
            model = fields[part].annotation
        elif fields is not None:
            keys.append(str(part))
            break
        elif isinstance(part, int):
            keys.append(str(part))
            model = (*typing.get_args(model), None)[0]  # of tuple[Section, ...]
    key_path = tuple(keys)
    key = ".".join(key_path)
    where = _place(key_path, origins, path)
    prefix = f"{where}: {key}: " if key else f"{where}: "
    value, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key_path[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "known keys: " + ", ".join(names)
        return f"{prefix}unknown key; {hint}"
    if kind == "missing":
        return f"{prefix}is missing and has no default"
    if kind == "value_error":
        return f"{prefix}{detail['ctx']['error']}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if isinstance(value, str) and _SCIENTIFIC.match(value):
        mantissa, exponent = re.split("[eE]", value)
        return f"{prefix}YAML reads {value} as text, not as a number; write {mantissa}.0e{exponent}"
    if isinstance(value, (dict, list)):
        return f"{prefix}{message}, found {kind_of(value)}"
    return f"{prefix}{message}, found {json.dumps(value, default=str)}"


def kind_of(value: Any) -> str:
    kinds: dict[Any, str] = {dict: "a section", list: "a list", type(None): "nothing"}
    kinds |= {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
    return kinds.get(type(value), f"a {type(value).__name__}")
