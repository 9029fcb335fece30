"""The settings of `simclr-dist train`: chosen for the images and this machine, said with their reasons, kept."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.cli.terminal import print_table, say
from simclr_dist.config import NAME_PATTERN, Config, flatten, load_config
from simclr_dist.errors import DataError
from simclr_dist.parallel.threads import default_num_threads
from simclr_dist.plan.defaults import (
    MOST_EPOCHS,
    Choice,
    Situation,
    choose_by_length,
    choose_first,
    choose_rest,
    epochs_in,
)
from simclr_dist.safe_text import printable

if TYPE_CHECKING:
    from simclr_dist.cli.train_images import Images

MINUTES = 10.0
_BESIDE_OTHERS = 0.8  # of a CPU process's speed alone: it waits for the others, and shares memory with them


def name_of(source: Path) -> str:
    """What is called after a source: letters, digits, points, lines."""
    name = re.sub(r"(\.(beton|tar|tgz|txz|tbz2|gz|xz|bz2))+$", "", source.name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:48] or "images"


@dataclass(frozen=True)
class Chosen:
    situation: Situation
    settings: dict[str, Choice]
    """By key; without the length of the training."""
    config: Config
    """With a length that stands for what is not known yet."""


def choose_for(args: argparse.Namespace, images: Images, out: Path) -> Chosen:
    """Raises ConfigError for settings of the command line, DataError for images that cannot be trained on."""
    import torch

    gpus = torch.cuda.device_count()
    num_test = images.test.num_images if images.test else 0
    at = Situation(images.train.num_images, num_test, images.side, bool(gpus), num_processes_for(args, images))
    try:
        chosen = choose_first(at)
    except ValueError as error:
        raise DataError(f"{args.source}: {error}") from None
    name = name_of(Path(os.path.abspath(args.source)))
    given = {
        "name": Choice(name if re.fullmatch(NAME_PATTERN, name) else "images", "the source's"),
        "runs_dir": Choice(str((out / "runs").absolute()), ""),
        "data.train": Choice(images.train.place, f"{at.num_images:,} images"),
    }
    if images.test:
        given["data.test"] = Choice(images.test.place, images.remark)
    if any(part.is_elsewhere for part in (images.train, images.test) if part):
        given["data.cache_dir"] = Choice(str((out / "shards").absolute()), "where they are kept")
    chosen = given | chosen
    length = {"train.epochs": Choice(2 * MOST_EPOCHS, ""), "optim.warmup_epochs": Choice(0.0, "")}

    def complete(settings: dict[str, Choice]) -> Chosen:
        """With what depends on others, which the command line may have replaced."""
        asked = _load(settings | length, args.overrides)
        settings = settings | choose_rest(at, asked.data, asked.model, asked.optim, asked.train.global_batch_size)
        return Chosen(at, settings, _load(settings | length, args.overrides))

    whole = complete(chosen)
    if gpus and (batch := _fitting_batch(whole.config, at.num_processes)) < whole.config.train.global_batch_size:
        why = "more would not fit into a GPU's memory"
        whole = complete({**chosen, "train.global_batch_size": Choice(batch, why)})
    return whole


def with_length(args: argparse.Namespace, images: Images, chosen: Chosen) -> tuple[str, Config]:
    """The text of config.yaml, and what it says; prints it as a table. Measures how fast this machine is."""
    settings, at, config = dict(chosen.settings), chosen.situation, chosen.config
    is_given = config.train.epochs != 2 * MOST_EPOCHS
    epochs = Choice(config.train.epochs, "") if is_given else _epochs(args.minutes or MINUTES, config, at)
    settings["train.epochs"] = epochs
    settings |= choose_by_length(at, config.optim, epochs.value)
    config = _load(settings, args.overrides)
    said = {word.partition("=")[0] for word in args.overrides}
    for key, value in flatten(config.model_dump(mode="json")).items():
        if any(key == word or key.startswith(f"{word}.") for word in said):
            settings[key] = Choice(value, "you said so")
    print_table(
        f"{args.source} on {'GPUs' if at.is_gpu else 'the CPU'}",
        ("setting", "value", "why"),
        [(key, str(choice.value), choice.why) for key, choice in settings.items()],
        f"held out for evaluations: {images.remark}; any of these can be given as key=value",
    )
    return _text(args, settings), config


def _load(settings: Mapping[str, Choice], overrides: Sequence[str]) -> Config:
    return load_config(_nested({key: choice.value for key, choice in settings.items()}), overrides, check_data=False)


def num_processes_for(args: argparse.Namespace, images: Images) -> int:
    """One for each GPU, two on the CPU; fewer for a handful of images."""
    import torch

    here = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    return args.nproc or max(1, min(here, images.train.num_images // 8))


def _fitting_batch(config: Config, num_processes: int) -> int:
    """The global batch, halved until a step fits into a GPU."""
    import torch

    from simclr_dist.plan.memory import device_memory

    room = 0.8 * torch.cuda.get_device_properties(0).total_memory
    train = config.train
    while train.global_batch_size >= 4 * num_processes:
        needed = device_memory(
            data=config.data,
            model=config.model,
            loss=config.loss,
            optim=config.optim,
            train=train,
            world_size=num_processes,
            device_type="cuda",
        )
        if needed.total < room:
            break
        half = train.global_batch_size // 2
        train = train.model_copy(update={"global_batch_size": half - half % num_processes})
    return train.global_batch_size


def _epochs(minutes: float, config: Config, at: Situation) -> Choice:
    import torch

    from simclr_dist.kinds import kind_of
    from simclr_dist.plan.measure import measure_step
    from simclr_dist.training.precision import decide_precision, with_precision
    from simclr_dist.training.preflight import settled

    config = settled(config)  # data.train is there now, unless nothing is to be written
    say("measuring how fast this machine trains that network")
    device = torch.device("cuda" if at.is_gpu else "cpu")
    with _threads_of(1 if at.is_gpu else at.num_processes):
        config = with_precision(config, decide_precision(config, None, device).precision)
        step = measure_step(
            augment=config.augment,
            model=config.model,
            loss=config.loss,
            optim=config.optim,
            train=config.train,
            kind=kind_of(config.data),
            images=max(1, config.train.global_batch_size // at.num_processes),
            device=device,
        )
    speed = step.images_per_s * at.num_processes
    if not at.is_gpu and at.num_processes > 1:
        speed *= min(1, len(os.sched_getaffinity(0)) / at.num_processes) * _BESIDE_OTHERS
    epochs = epochs_in(minutes, speed, at.num_images)
    takes = epochs * at.num_images / speed / 60
    more = f", but no more than {epochs:,}; about {takes:.0f} minutes" if epochs == MOST_EPOCHS else ""
    if epochs == 1 and takes > 1.5 * minutes:
        more = f"; seeing all images only once takes about {takes:.0f} minutes"
    return Choice(epochs, f"{minutes:g} minutes at about {speed:,.0f} images/s{more}")


@contextmanager
def _threads_of(num_processes: int) -> Iterator[None]:
    """As many threads as each of so many processes has on this machine's cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(default_num_threads(None, num_processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested


def _text(args: argparse.Namespace, chosen: Mapping[str, Choice]) -> str:
    """The configuration as YAML, with the reasons."""
    lines = [printable(f"# Chosen by `simclr-dist train {shlex.quote(args.source)}`; edit it as you like.")]
    section = ""
    for key in sorted(chosen, key=lambda key: list(_nested(chosen)).index(key.partition(".")[0])):
        choice = chosen[key]
        head, _, leaf = key.rpartition(".")
        if head and head != section:
            lines.append(f"{head}:")
        section = head
        value = json.dumps(choice.value)
        if isinstance(choice.value, float) and "." not in value and "e" in value:
            value = value.replace("e", ".0e")
        why = f"  # {printable(choice.why)}" if choice.why else ""
        lines.append(f"{'  ' if head else ''}{leaf}: {value}{why}")
    return "\n".join(lines) + "\n"
