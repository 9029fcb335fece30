"""`simclr-dist train`: from any folder of images to a trained and exported encoder, in one command.

OUT/                    by default FOLDER_simclr, beside FOLDER
    train.json          what was asked for, so that the same command continues
    train.beton         the images; test.beton: those held out, where there are labels
    config.yaml         every setting that was chosen, and why
    runs/NAME/          the training
    encoder.safetensors
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from simclr_dist.argument_types import add_source_arguments, positive_float, positive_int
from simclr_dist.atomic import replace_text
from simclr_dist.cli.arguments import Commands, add_command, choose_device
from simclr_dist.cli.pretraining import pretrain
from simclr_dist.cli.terminal import percent, print_table, say
from simclr_dist.cli.train_settings import MINUTES, choose_for, name_of, num_processes_for, with_length
from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError, UserError
from simclr_dist.run.layout import RunDir, read_record, write_record
from simclr_dist.run.status import read_status
from simclr_dist.safe_text import printable


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _run,
        help="from a folder of images to a trained encoder, in one command",
        description="Prepares the images, chooses settings for them and for this machine, says why, trains, evaluates\n"
        "where there are labels, exports. Started again, it continues. A configuration is trained as it is.",
        epilog="examples:\n"
        "  simclr-dist train pictures --minutes 30\n"
        "  simclr-dist train pictures --out somewhere/else loss.temperature=0.2 train.epochs=50\n"
        "  simclr-dist train configs/smoke.yaml",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, a tar of one, a .beton file, a data set's name (cifar10, …), or a configuration",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that you choose yourself")
    parser.add_argument(
        "--minutes", type=positive_float, metavar="N", help=f"how long to train, about (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for all that is written (default: SOURCE_simclr, beside SOURCE)"
    )
    parser.add_argument("--test", metavar="SOURCE", help="labelled images that are held out for evaluations")
    parser.add_argument("--nproc", type=positive_int, help="processes (default: all GPUs, or two on the CPU)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    add_source_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    if args.source.endswith((".yaml", ".yml")):
        return _train_configuration(args)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts no threads, so workers can be forked
    from simclr_dist.cli.train_images import images_to_prepare, prepare_images

    asked, out = _asked(args), _out(args)
    config_file = RunDir(out).config
    is_begun = _is_begun(out, asked) and config_file.exists()
    images = images_to_prepare(args, out)
    if is_begun:
        config = load_config(config_file, args.overrides, check_data=False)
        say(f"continues with the settings of {config_file}; --minutes counts at the beginning only")
    else:
        chosen = choose_for(args, images, out)
        config = chosen.config
    if not args.dry_run:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out / "train.json", asked)
        prepare_images(images, out, config)  # before anything starts threads: it forks
    if not is_begun:
        text, config = with_length(args, images, chosen)
    if args.dry_run:
        return 0
    if not is_begun:
        replace_text(config_file, text)
    return _train(args, config_file, config, out, num_processes_for(args, images))


def _train_configuration(args: argparse.Namespace) -> int:
    from simclr_dist.cli.train_images import source_options

    unfit = [f"--{name}" for name in ("minutes", "out", "test") if getattr(args, name) is not None]
    unfit += [f"--{name.replace('_', '-')}" for name in source_options(args)]
    if unfit:
        raise ConfigError(
            [f"{', '.join(unfit)}: for a folder of images; {args.source} is a configuration, which says it"]
        )
    path = Path(args.source)
    config = load_config(path, args.overrides)
    if args.dry_run:
        print(f"{path}: would train {config.run_dir}")
        return 0
    code = pretrain(path, args.overrides, args.nproc)
    if not code and _is_finished(config):
        _print_next(config, [])
    return code


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for, and where it goes


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    from simclr_dist.cli.train_images import source_options

    where = {key: os.path.abspath(value) if os.path.exists(value) else value for key, value in _sources(args)}
    return {
        **where,
        "options": {key: list(v) if isinstance(v, tuple) else v for key, v in source_options(args).items()},
    }


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    yield "source", args.source
    if args.test is not None:
        yield "test", args.test


def _out(args: argparse.Namespace) -> Path:
    """Raises ConfigError where nothing can be written."""
    source = Path(os.path.abspath(args.source))
    out: Path = args.out or (source.parent if source.exists() else Path.cwd()) / f"{name_of(source)}_simclr"
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            [f"{out}: cannot be written ({there}: {'no permission' if there.is_dir() else 'a file'}); choose --out"]
        )
    if source.is_dir() and out.absolute().is_relative_to(source):
        raise ConfigError([f"--out {out}: lies in {source}, so its files would be taken for images; choose another"])
    if out.is_dir() and any(out.iterdir()) and not (out / "train.json").exists():
        raise ConfigError([f"{out}: is not empty, and no `simclr-dist train` has filled it; choose another --out"])
    return out


def _is_begun(out: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the same command has been started before. Raises ConfigError where another was."""
    before = read_record(out / "train.json")
    if before is not None and before != asked:
        changes = [
            f"{key}: {before.get(key)} then, {asked.get(key)} now"
            for key in {**before, **asked}
            if before.get(key) != asked.get(key)
        ]
        raise ConfigError([printable(f"{out}: was made of other images ({'; '.join(changes)}); choose another --out")])
    return before is not None


# ---------------------------------------------------------------------------------------------------------------------
# The training, and what follows it


def _is_finished(config: Config) -> bool:
    status = read_status(config.run_dir)
    return status is not None and status.state == "finished"


def _train(args: argparse.Namespace, config_file: Path, config: Config, out: Path, processes: int) -> int:
    code = pretrain(config_file, args.overrides, processes)
    if code or not _is_finished(config):
        say("train: not finished; the same command continues from there")
        return code
    if config.data.test:
        _evaluate(config)
    exported = _export(config, out)
    _print_next(config, exported)
    return 0


def _evaluate(config: Config) -> None:
    """Prints a table of kNN and the linear probe; what cannot be evaluated says why."""
    found = [_score("knn", config), _score("linear", config)]
    names = list(dict.fromkeys(name for scores in found for name in scores))
    rows = [(name, *(percent(scores[name]) if name in scores else "-" for scores in found)) for name in names]
    if rows:
        print_table("", ("top-1 accuracy of", "kNN", "linear probe"), rows)


def _score(method: Literal["knn", "linear"], config: Config) -> dict[str, float]:
    """Top-1 accuracies by what was scored: the encoder, as it was before training, raw pixels."""
    from simclr_dist.evaluation.offline import evaluate

    try:
        scores, _ = evaluate(config.run_dir, method=method, baselines=True, device=choose_device(None), say=say)
    except UserError as error:
        say(f"{method}: {error}")
        return {}
    return {score.name: score.top1 for score in scores}


def _export(config: Config, out: Path) -> list[str]:
    """Lines that load what was exported."""
    from simclr_dist.checkpoint.lineage import find_checkpoint
    from simclr_dist.evaluation.offline import known_accuracy
    from simclr_dist.export.export import export

    checkpoint = find_checkpoint(config.run_dir, say)
    try:
        found = export(
            checkpoint.path,
            out / "encoder.safetensors",
            format="safetensors",
            license="unspecified",
            accuracy=known_accuracy(checkpoint, say),
            overwrite=True,
        )
    except UserError as error:
        say(f"export: {error}")
        return []
    return [f"the encoder: {found.path}, described in {found.card}"]


def _print_next(config: Config, lines: list[str]) -> None:
    run = shlex.quote(os.path.relpath(config.run_dir))
    train = shlex.quote(os.path.relpath(config.data.train) if os.path.exists(config.data.train) else config.data.train)
    tensorboard = (
        "tensorboard" if shutil.which("tensorboard") else shlex.quote(f"{Path(sys.executable).parent}/tensorboard")
    )
    commands = [
        ("curves and images", f"{tensorboard} --logdir {run}"),
        ("one page about it", f"simclr-dist report {run}"),
        ("a vector for each image", f"simclr-dist embed {run} {train} embeddings.parquet"),
        ("another file format", f"simclr-dist export {run} --format onnx"),
    ]
    if config.data.test:
        commands.append(("a classifier", f"simclr-dist finetune {run}"))
    for line in lines:
        print(line)
    width = max(len(what) for what, _ in commands)
    for what, command in commands:
        print(f"{what:{width}}  {command}")
