"""How a start goes on from a checkpoint: which one, into which parts, and what has changed since."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from simclr_dist.checkpoint import files, lineage
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import Config, flatten
from simclr_dist.data import Loader
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.kinds import kind_of
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run import history
from simclr_dist.run.layout import RunDir, step_of
from simclr_dist.run.state import TrainState

# Settings that say where and how a run is watched and saved, not what is trained. Where the images lie is none of it
# either: by their fingerprint they are the same ones.
_NOT_TRAINED_WITH = (
    *("name", "runs_dir", "resume", "monitor.", "timeout.", "checkpoint.", "evaluation."),
    *("data.train", "data.test", "data.num_threads", "data.batches_ahead"),
    *("data.cache_dir", "data.cache_size", "data.fetch_timeout_s"),
)
_HOW_LONG = ("train.epochs", "train.max_steps")


def choose_checkpoint(config: Config, device: torch.device, warn: Callable[[str], None]) -> Checkpoint | None:
    """What `config.resume` names; None for a fresh start. On all ranks together: the main process reads it.

    Raises ConfigError or CheckpointError on the main process, FailedElsewhereError on the others.
    """
    found = run_on_all_ranks(lambda: _choose(config, warn) if distributed.rank() == 0 else None, device)
    return lineage.share(found, device)


def _choose(config: Config, warn: Callable[[str], None]) -> Checkpoint | None:
    run_dir, resume = config.run_dir, config.resume
    for name in history.settle(run_dir):
        warn(f"{run_dir}/checkpoints: {name}: a rewind that was cut off has been completed")
    if resume not in ("auto", "none") and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        warn(f"resume={resume} was for the first start; torchrun has started again, so the newest checkpoint is taken")
        resume = "auto"
    if resume == "auto":
        return lineage.newest_valid(run_dir, warn, set_aside=True)
    if resume == "none":
        if lineage.list_checkpoints(run_dir):
            raise ConfigError(
                [f"resume=none, but {run_dir} already has checkpoints; choose another name=… or use resume=auto"]
            )
        return None
    return lineage.find_checkpoint(resume, warn)


def restore(
    found: Checkpoint | None,
    config: Config,
    loader: Loader,
    model: nn.Module,
    optimizer: Optimizer,
    probe: OnlineProbe | None = None,
) -> TrainState:
    """Copies `found` into the parts; None: a training that starts at step 0.

    A probe that `found` does not have starts untrained. Raises CheckpointError if `found` comes from another training.
    """
    if found is None:
        return TrainState()
    # Release 0.1 recorded another fingerprint of the same images.
    refuse_another_training(found, config, (loader.content_fingerprint, loader.fingerprint))
    if probe is not None and found.probe_state:
        try:
            probe.load_state_dict(found.probe_state)
        except ValueError as error:
            raise CheckpointError(f"{found.path}: {error}") from None
    return files.load_state(found, model, optimizer)


def refuse_another_training(found: Checkpoint, config: Config, known_as: tuple[str, ...] | None) -> None:
    """known_as: fingerprints of the images of now; None: not looked at. Raises CheckpointError."""
    then, now = found.config, config
    noun = kind_of(now.data).noun if then.data.kind == now.data.kind else "sample"
    changes = [
        f"{key}: {before} then, {after} now"
        for key, before, after in (
            ("seed", then.seed, now.seed),
            ("data.kind", then.data.kind, now.data.kind),
            ("train.global_batch_size", then.train.global_batch_size, now.train.global_batch_size),
            ("data.order", then.data.order, now.data.order),
            ("data.order_window", *(1 if c.data.order == "random" else c.data.order_window for c in (then, now))),
            ("data.mix", *(list(c.data.mix) if c.data.mix else "null" for c in (then, now))),
            ("optim.optimizer", then.optim.optimizer, now.optim.optimizer),
            ("loss.learn_temperature", *(str(c.loss.learn_temperature).lower() for c in (then, now))),
            *((f"data.tokens.{key}", *pair) for key, pair in _tokens(then, now).items()),
            *_fingerprints(found.fingerprint, known_as, noun),
        )
        if before != after
    ]
    if changes:
        raise CheckpointError(
            f"{found.path} cannot be continued, because these differ: {'; '.join(changes)}. "
            "Put them back, or choose another name=… to start a new run"
        )


def _tokens(then: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """How tokens become views, and in which order, then and now."""
    before, after = (config.data.tokens.model_dump() for config in (then, now))
    return {key: (before[key], after[key]) for key in before}


def _fingerprints(then: str, known_as: tuple[str, ...] | None, noun: str) -> Iterator[tuple[str, str, str]]:
    """Where the data are others: what of them, then and now. Of tokens, a fingerprint has two parts."""
    if known_as is None or then in known_as:
        return
    parts = [fingerprint.partition("-") for fingerprint in (then, known_as[0])]
    yield f"the {noun}s' fingerprint", parts[0][0], parts[1][0]
    yield "the tokenizer's", parts[0][2], parts[1][2]


def changed_settings(found: Checkpoint | None, config: Config) -> dict[str, tuple[Any, Any]]:
    """By key: its value in the checkpoint, and now. Without what only says where a run lies and where it goes on."""
    if found is None:
        return {}
    then, now = (flatten(c.model_dump(mode="json")) for c in (found.config, config))
    if now["train.precision"] == "auto":  # what the run has decided is kept
        now["train.precision"] = then["train.precision"]
    without_effect = ("name", "runs_dir", "resume", "model.weights", "model.weights_partial")
    keys = [key for key in {**then, **now} if key not in without_effect]
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def refuse_to_relabel(found: Checkpoint | None, changed: dict[str, tuple[Any, Any]], last_step: int) -> None:
    """A run that has nothing left to train keeps the settings it was trained with. Raises ConfigError."""
    if found is None or found.step < last_step:
        return
    trained_with = {key: change for key, change in changed.items() if not key.startswith(_NOT_TRAINED_WITH)}
    if not trained_with:
        return
    what = f"{RunDir.of_checkpoint(found.path).path} has been trained for {found.step} steps"
    listed = ", ".join(history.describe_changes(trained_with))
    if found.step > last_step and set(trained_with) <= set(_HOW_LONG):
        raise ConfigError(
            [
                f"{listed}: that is {last_step} steps, but {what}. To go back, resume from one of its earlier "
                "checkpoints (`simclr-dist runs show` lists them); to train on, ask for more"
            ]
        )
    raise ConfigError(
        [
            f"{what}, and nothing is left to train with other settings ({listed}). Ask for more train.epochs, "
            "choose another name=…, or put them back"
        ]
    )


def leave_other_line(found: Checkpoint | None, config: Config) -> list[str]:
    """Sets aside the run's checkpoints that `found` does not come after; returns their new names. Raises OSError.

    Going on from an earlier checkpoint of the run, these are the newer ones; from anything else, all.
    """
    if found is None:
        return []
    of_this_run = found.path.resolve() in [path.resolve() for path in lineage.list_checkpoints(config.run_dir)]
    return history.rewind(config.run_dir, str(found.path), step_of(found.path) if of_this_run else -1)


def record_start(
    config: Config, state: TrainState, found: Checkpoint | None, changed: dict[str, tuple[Any, Any]]
) -> None:
    """Adds this start to lineage.jsonl; its settings too, where they are new. Raises OSError."""
    facts: dict[str, Any] = {
        "step": state.step,
        "from": str(found.path) if found is not None else None,
        "world_size": distributed.world_size(),
    }
    if state.started_from is not None and state.step == 0:
        facts["weights"] = state.started_from
    if found is None or changed:
        facts |= {"changed": changed, "settings": config.model_dump(mode="json")}
    history.record_start(config.run_dir, **facts)
