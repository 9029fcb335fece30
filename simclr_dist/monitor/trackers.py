"""Other loggers (wandb, mlflow, …) through Accelerate's trackers: each gets the same figures as TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import tracking

from simclr_dist.config import flatten
from simclr_dist.errors import ConfigError
from simclr_dist.monitor.events import Event, Figures, Sink

PROJECT = "simclr_dist"


class Trackers(Sink):
    """The loggers called `names`. One that fails is dropped with a warning, and training goes on.

    Raises ConfigError when one is not installed or does not start.
    """

    name = "trackers"

    def __init__(
        self, names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        available = [str(tracker) for tracker in tracking.get_available_trackers()]
        missing = [name for name in names if name not in available]
        if missing:
            packages = " ".join(name.replace("_", "-") for name in missing)
            raise ConfigError(
                [f"monitor.trackers: {', '.join(missing)} not installed; `pip install {packages}`, or leave it out"]
            )
        self._warn = warn
        self._trackers: dict[str, tracking.GeneralTracker] = {}
        for name in names:
            try:
                self._trackers[name] = _start(name, run_dir, settings)
            except Exception as error:  # whatever a foreign package raises when it finds no server or no key
                raise ConfigError(
                    [f"monitor.trackers: {name} does not start: {error}; see its documentation, or leave it out"]
                ) from error

    def show(self, event: Event) -> None:
        if not isinstance(event, Figures):
            return
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log({**event.values, "step": event.step}, step=event.samples_seen)
            except Exception as error:
                del self._trackers[name]
                self._warn(
                    f"{name} failed and is left out from now on: {_reason(error)}. monitor.trackers switches it off; "
                    "training goes on"
                )

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"{name} did not close well: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _start(name: str, run_dir: Path, settings: Mapping[str, Any]) -> tracking.GeneralTracker:
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {
        "wandb": {"name": run_dir.name, "dir": str(run_dir)},
        "mlflow": {"run_name": run_dir.name},
    }.get(name, {})
    if kind.requires_logging_directory:
        options["logging_dir"] = str(run_dir)
    tracker = kind(PROJECT, **options)
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in flatten(settings).items() if value is not None})
    return tracker
