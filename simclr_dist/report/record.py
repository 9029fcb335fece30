"""What a run has recorded. Its files may come from anybody: nothing in them is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simclr_dist.config import flatten
from simclr_dist.config.bounded_yaml import read_yaml
from simclr_dist.errors import ConfigError
from simclr_dist.run import history
from simclr_dist.run.layout import RunDir, read_record, read_records
from simclr_dist.run.status import Status, read_status


@dataclass(frozen=True)
class Curve:
    """Values of one TensorBoard tag, by the number of images seen."""

    samples_seen: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunRecord:
    """settings: flat, "model.encoder" -> value. curves: by TensorBoard tag. evaluations: newest last.

    classifiers: results of `finetune`, `distill` and `recipe`, by the folder of each in the run's folder.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Status | None
    curves: Mapping[str, Curve]
    evaluations: tuple[Mapping[str, Any], ...]
    classifiers: Mapping[str, Mapping[str, Any]]
    story: tuple[str, ...] = ()
    """Starts, changes of settings and rewinds, a line each."""


def read_run(path: Path, *, of_run: bool = True) -> RunRecord:
    """The records in a run's folder; a checkpoint or config.yaml must be there. Raises ConfigError.

    of_run: False for weights from elsewhere, of which there are no records.
    """
    if not of_run:
        return RunRecord(path.name, path, {}, {}, None, {}, (), {}, ("weights from elsewhere",))
    run = RunDir(path)
    settings = _settings(run)
    environments = read_records(run.environment)
    results = {
        str(file.parent.relative_to(path)): read_record(file)
        for folder in (run.finetune, run.recipe)
        for file in sorted(folder.rglob("result.json"))
    }
    return RunRecord(
        path.resolve().name,
        path,
        flatten({str(key): value for key, value in settings.items()}),
        flatten(environments[-1]) if environments else {},
        read_status(path),
        read_curves(run.tensorboard),
        tuple(read_records(run.evaluations)),
        # The linear probe of a recipe has no method: it stands among the evaluations.
        {folder: found for folder, found in results.items() if found and "method" in found},
        tuple(history.tell(path)),
    )


def _settings(run: RunDir) -> dict[Any, Any]:
    """What the newest checkpoint was trained with; without one, what the run was started with."""
    for checkpoint in reversed(run.list_checkpoints()):  # a training beside may remove one, damage another
        settings = (read_record(RunDir.state_of(checkpoint)) or {}).get("config")
        if isinstance(settings, dict):
            return settings
    try:
        settings = read_yaml(run.config)
    except OSError as error:
        raise ConfigError(
            [f"{run.path}: is no run's folder: {run.config.name} cannot be read ({error.strerror})"]
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{run.config}: is damaged: {error}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{run.config}: holds no settings"])
    return settings


def read_curves(folder: Path) -> dict[str, Curve]:
    """All scalars of the event files in `folder`, by tag; without points that a resumed run has replaced."""
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
