"""What a run has recorded. Its files may come from anybody: nothing in them is executed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simclr_dist.config import IMAGES, flatten
from simclr_dist.config.bounded_yaml import read_yaml
from simclr_dist.errors import ConfigError
from simclr_dist.kinds import noun_of
from simclr_dist.run import history
from simclr_dist.run.layout import NUMBER, RunDir, is_a, read_record, read_records
from simclr_dist.run.status import Status, read_status
from simclr_dist.safe_text import masked


@dataclass(frozen=True)
class Curve:
    """The finite values of one tag, by the number of images seen. `not_finite`: how many more there are."""

    samples_seen: tuple[int, ...]
    values: tuple[float, ...]
    not_finite: int = 0


@dataclass(frozen=True)
class RunRecord:
    """settings: flat, "model.encoder" -> value. curves: by tag. evaluations: newest last.

    classifiers: results of `finetune`, `distill` and `recipe`, by the folder of each in the run's folder.
    remarks: what of its files could not be read.
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
    remarks: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return noun_of(str(self.settings.get("data.kind", IMAGES)))


def read_run(path: Path, *, of_run: bool = True) -> RunRecord:
    """The records in a run's folder; a checkpoint or config.yaml must be there. Raises ConfigError.

    of_run: False for weights from elsewhere, of which there are no records.
    """
    if not of_run:
        return RunRecord(path.name, path, {}, {}, None, {}, (), {}, ("weights from elsewhere",))
    run = RunDir(path)
    settings = _settings(run)
    environments = read_records(run.environment)
    log = read_records(run.log, samples_seen=int)
    evaluations = read_records(run.evaluations, method=str, step=int)
    results = {
        str(file.parent.relative_to(path)): read_record(file)
        for folder in (run.finetune, run.recipe)
        for file in sorted(folder.rglob("result.json"))
    }
    return RunRecord(
        path.resolve().name,
        path,
        flatten({str(key): value for key, value in settings.items()}),
        _environment(environments[-1]) if environments else {},
        read_status(path),
        curves_of(log),
        tuple(evaluations),
        # The linear probe of a recipe has no method: it stands among the evaluations.
        {folder: found for folder, found in results.items() if found and "method" in found},
        tuple(history.tell(path)),
        tuple(records.remark for records in (log, evaluations, environments) if records.remark),
    )


def _environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Flat. Earlier versions recorded values of variables as they were."""
    variables = facts.get("environment")
    known = {str(name): str(value) for name, value in variables.items()} if isinstance(variables, dict) else {}
    return flatten({**facts, **({"environment": masked(known)} if known else {})})


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


def curves_of(log: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curves in the lines of log.jsonl, by tag. Of two values at one place the later one counts."""
    points: dict[str, dict[int, Any]] = {}
    for line in log:
        for tag, value in line.items():
            if "/" in tag and (value is None or isinstance(value, NUMBER)):
                points.setdefault(tag, {})[line["samples_seen"]] = value
    curves = {}
    for tag, by_place in points.items():
        finite = sorted((place, float(value)) for place, value in by_place.items() if is_a(value, NUMBER))
        places, values = zip(*finite, strict=True) if finite else ((), ())
        curves[tag] = Curve(places, values, len(by_place) - len(finite))
    return curves
