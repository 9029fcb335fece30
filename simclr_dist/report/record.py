"""What a run has written down. Files of a run are read as data of unknown origin: nothing in them is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simclr_dist.errors import ConfigError
from simclr_dist.monitor.tensorboard import flatten


@dataclass(frozen=True)
class Curve:
    """A figure over images seen."""

    samples_seen: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunRecord:
    """settings: flat, "model.encoder" -> value. curves: by TensorBoard tag. evaluations: newest last.

    classifiers: what `finetune`, `distill` and `recipe` have left in the run's folder, by their folder in it.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluations: tuple[Mapping[str, Any], ...]
    classifiers: Mapping[str, Mapping[str, Any]]


def read_run(path: Path) -> RunRecord:
    """Of a run's folder. Only config.yaml must be there. Raises ConfigError."""
    file = path / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: is no run's folder: {file.name} cannot be read ({error.strerror})"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: is damaged: {error}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{file}: holds no settings"])
    environments = _objects(path / "environment.jsonl")
    return RunRecord(
        path.resolve().name,
        path,
        flatten({str(key): value for key, value in settings.items()}),
        flatten(environments[-1]) if environments else {},
        next(iter(_objects(path / "status.json", whole=True)), {}),
        read_curves(path / "tensorboard"),
        tuple(_objects(path / "evaluations.jsonl")),
        {
            str(file.parent.relative_to(path)): found
            for folder in ("finetune", "recipe")
            for file in sorted((path / folder).rglob("result.json"))
            for found in _objects(file, whole=True)
            if "method" in found  # the recipe's linear probe stands among the evaluations
        },
    )


def read_curves(folder: Path) -> dict[str, Curve]:
    """All scalars of the event files in `folder`; points that a resume took back are left out."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    nothing = {"images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1, "tensors": 1}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, **nothing})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        curves[tag] = Curve(tuple(point.step for point in points), tuple(point.value for point in points))
    return curves


def _objects(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line or (whole) a single one; a killed process may have left half a line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for part in [text] if whole else text.splitlines():
        try:
            value = json.loads(part)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
