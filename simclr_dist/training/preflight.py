"""Everything about a training that can be known before its first step, checked before anything is built.

The launcher does it before it starts processes (agent.py), a training started by hand in its main process, and
`simclr-dist doctor` in a process of its own (`main`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from simclr_dist.checkpoint.files import read_facts
from simclr_dist.checkpoint.lineage import list_checkpoints
from simclr_dist.config import IMAGES, Config, ModelConfig, load_config
from simclr_dist.data.beton.fit import remark_on_views
from simclr_dist.data.order import Order
from simclr_dist.errors import CheckpointError, ConfigError, DataError, UserError
from simclr_dist.kinds import kind_of
from simclr_dist.kinds.evaluation_labels import check_evaluation_labels
from simclr_dist.kinds.labelled_images import check_loss_labels
from simclr_dist.optim.build import unused_settings
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.layout import is_checkpoint
from simclr_dist.run.owner import refuse_if_owned
from simclr_dist.run.status import attempt_name
from simclr_dist.source_text import missing
from simclr_dist.training.network_facts import NetworkFacts, network_facts
from simclr_dist.training.resuming import changed_settings, refuse_another_training, refuse_to_relabel

CHECKED = "SIMCLR_CHECKED"
"""By this variable the launcher's agent tells its workers what it has found, so that they need not look again."""


@dataclass(frozen=True)
class Checked:
    unused: tuple[str, ...] = ()
    """Trainable parameters of the network that are in no path to the loss (network/trial.py)."""
    remarks: tuple[str, ...] = ()
    """Sentences that a person should read."""

    def to_environment(self) -> None:
        """For the processes that this one starts, in the same attempt."""
        os.environ[CHECKED] = json.dumps({"attempt": attempt_name(), "unused": self.unused, "remarks": self.remarks})

    @classmethod
    def from_environment(cls) -> Checked | None:
        try:
            found = json.loads(os.environ[CHECKED])
            return cls(tuple(found["unused"]), tuple(found["remarks"])) if found["attempt"] == attempt_name() else None
        except (KeyError, ValueError, TypeError):
            return None


def settled(config: Config) -> Config:
    """With what data.train itself says of its pixels, and of the channels of the first layer. May be called again.

    Raises ConfigError where settings do not fit.
    """
    data = kind_of(config.data).settled()
    pixels = data.pixel_format
    if config.model.channels not in (3, pixels.channels):
        raise ConfigError(
            [f"model.channels: {config.model.channels}, but {config.data.train} has {pixels}; leave it out"]
        )
    if not pixels.rgb:
        asked = [name for name in ("grayscale_p", "solarize_p") if getattr(config.augment, name)]
        if asked:
            names = ", ".join(f"augment.{name}" for name in asked)
            raise ConfigError([f"{names}: means nothing for {pixels}, which are not RGB; leave it out, or set 0.0"])
    return config if data == config.data else config.with_data(data)


def check_training(config: Config, *, images_too: bool = True) -> Checked:
    """Raises one UserError with all problems that are found.

    OwnershipError comes alone: nothing may be written about a run that belongs to another training.
    images_too: False where the images are opened right afterwards, which finds the same.
    """
    _check_owner(config)
    config = settled(config)  # alone: nothing else can be looked at without it
    problems: list[UserError] = []
    remarks: list[str] = []

    def collect(check: Callable[[], str]) -> None:
        try:
            if remark := check():
                remarks.append(remark)
        except UserError as error:
            problems.append(error)

    network: list[NetworkFacts] = []
    collect(lambda: unused_settings(config.optim))
    collect(lambda: _unused_of_head(config.model))
    collect(lambda: _check_network(config, network))
    collect(lambda: _check_run_directory(config, network))
    if network:
        collect(lambda: _check_weights(config) and "")  # what was taken is told by the start itself
    if images_too:
        collect(lambda: _check_images(config))
        collect(lambda: _check_labels(config))
    collect(lambda: remark_on_views(config.data.train, config.data.image_size))
    knows_images = images_too and not any(isinstance(error, DataError) for error in problems)
    collect(lambda: _check_resume(config, knows_images))
    if problems:
        raise _together(problems)
    return Checked(network[0].unused, tuple(remarks))


def check_together(config: Config, device: torch.device, warn: Callable[[str], None]) -> tuple[str, ...]:
    """For a training's processes, all of them: the names of unused parameters.

    The main process checks, unless the launcher's agent has: it alone looks, because only the first node's agent
    checks. Raises UserError there, FailedElsewhereError elsewhere.
    """
    is_main = distributed.rank() == 0
    checked = run_on_all_ranks(
        lambda: (Checked.from_environment() or check_training(config, images_too=False)) if is_main else Checked(),
        device,
    )
    for remark in checked.remarks:
        warn(remark)
    return tuple(json.loads(distributed.broadcast_text_from_main(json.dumps(checked.unused), device)))


def _together(problems: list[UserError]) -> UserError:
    """One error with all messages, of the kind of the first."""
    if len(problems) == 1:
        return problems[0]
    lines = [
        line for error in problems for line in (error.problems if isinstance(error, ConfigError) else [str(error)])
    ]
    both = ConfigError(lines)
    return both if isinstance(problems[0], ConfigError) else type(problems[0])(str(both))


# ---------------------------------------------------------------------------------------------------------------------
# The checks


def _check_owner(config: Config) -> str:
    if config.run_dir.is_dir():
        refuse_if_owned(config.run_dir)
    return ""


def _unused_of_head(model: ModelConfig) -> str:
    if model.head_layers > 1 or model.head_hidden_dim is None:
        return ""
    return f"model.head_layers=1: this setting changes nothing with it: model.head_hidden_dim={model.head_hidden_dim}"


def _check_network(config: Config, network: list[NetworkFacts]) -> str:
    """Leaves what it found in `network`."""
    network.append(network_facts(config))
    return network[0].remark


def _check_weights(config: Config) -> str:
    """In a sentence, what a start takes. A run that goes on does not look at them."""
    if config.model.weights is None or _checkpoint_to_continue(config) is not None:
        return ""
    from simclr_dist.training.starting import check_weights  # torchvision, which the launcher else does without

    return check_weights(config)


def _check_run_directory(config: Config, network: list[NetworkFacts]) -> str:
    """Without `network` the room on the disk is not looked at."""
    run_dir = config.run_dir
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "not a directory" if not place.is_dir() else "no permission, or mounted read-only"
        raise ConfigError([f"runs_dir: {run_dir} cannot be written to ({place}: {why})"])
    if not network:
        return ""
    one = network[0].checkpoint_bytes
    needed = one if list_checkpoints(run_dir) else 2 * one  # the newest stays until the next is whole
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            [
                f"runs_dir: {free / 2**20:,.0f} MiB are free in {place}, but checkpoints need "
                f"{needed / 2**20:,.0f} MiB ({one / 2**20:,.1f} MiB each): make room, or choose another runs_dir"
            ]
        )
    return ""


def _check_images(config: Config) -> str:
    kind = kind_of(config.data)
    if obstacle := kind.obstacle():
        raise DataError(obstacle)
    Order(kind.describe(config.data.train).num_samples, config.train.global_batch_size, config.seed)
    return ""


def _check_labels(config: Config) -> str:
    """Its remarks are shown where loss and evaluations are built."""
    check_loss_labels(config.data, config.loss)
    check_evaluation_labels(config.data, config.evaluation)
    return ""


def _check_resume(config: Config, images_too: bool) -> str:
    """Refuses settings that cannot go on from the run's newest checkpoint, of which it reads no tensor."""
    path = _checkpoint_to_continue(config)
    if path is None:
        return ""
    try:
        found = read_facts(path)
    except CheckpointError:
        return ""  # damaged: the start names it and takes an older one
    known_as = None
    if images_too:
        info = kind_of(config.data).describe(config.data.train)
        known_as = (info.content_fingerprint, info.fingerprint)
    refuse_another_training(found, config, known_as)
    if images_too:
        steps = config.train.epochs * (info.num_samples // config.train.global_batch_size)
        changed = changed_settings(found, config)
        if config.train.precision == "auto":  # a run keeps what was decided when it began
            changed.pop("train.precision", None)
        refuse_to_relabel(found, changed, min(steps, config.train.max_steps or steps))
    return ""


def _checkpoint_to_continue(config: Config) -> Path | None:
    there = list_checkpoints(config.run_dir)
    if config.resume in ("auto", "none"):
        if config.resume == "none" and there:
            raise ConfigError(
                [f"resume=none, but {config.run_dir} already has checkpoints; choose another name=… or use resume=auto"]
            )
        return there[-1] if there else None
    path = Path(config.resume)
    if is_checkpoint(path) or (path / "MANIFEST.json").exists():
        return path
    return next(reversed(list_checkpoints(path)), None)


def main(argv: list[str]) -> None:
    """For the doctor: a line of JSON for each check, `{"what": …, "fact", "remark" or "problem": …}`."""
    config = load_config(argv[0], argv[1:], check_data=False)
    try:
        config = settled(config)
    except UserError as error:
        print(json.dumps({"what": "pixels", "problem": str(error)}), flush=True)
        return

    data = config.data
    data_is_here = data.kind != IMAGES or data.train == "synthetic" or missing(data.train) is None
    network: list[NetworkFacts] = []
    checks: dict[str, Callable[[], str]] = {
        "owner": lambda: _check_owner(config),
        "optimizer": lambda: unused_settings(config.optim),
        "head": lambda: _unused_of_head(config.model),
        "network": lambda: _check_network(config, network),
        "weights": lambda: _check_weights(config),
        "checkpoints": lambda: _check_run_directory(config, network),
        "resume": lambda: _check_resume(config, data_is_here),
    }
    for what, check in checks.items():
        try:
            found = {"what": what, "fact" if what == "weights" else "remark": check()}
        except UserError as error:
            found = {
                "what": what,
                "problem": "; ".join(error.problems if isinstance(error, ConfigError) else [str(error)]),
            }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
