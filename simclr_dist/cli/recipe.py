"""`simclr-dist recipe`: SimCLR v2 from images to a table, in one command."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.argument_types import positive_int
from simclr_dist.cli.arguments import Commands, add_command, choose_device
from simclr_dist.cli.pretraining import pretrain
from simclr_dist.cli.terminal import print_table, say
from simclr_dist.config import Config, load_config, load_section
from simclr_dist.errors import ConfigError
from simclr_dist.run.layout import RunDir
from simclr_dist.run.status import read_status

if TYPE_CHECKING:
    import torch

    from simclr_dist.few_labels.recipe import Recipe


def register(commands: Commands) -> None:
    recipe = add_command(
        commands,
        "recipe",
        _run,
        help="SimCLR v2 from images to a table: pretrain, fine-tune with few labels, distil",
        description="Pretrains, fine-tunes with each share of the labels, and distils each into every student\n"
        "(SimCLR v2, arXiv 2006.10029). Started again, it continues where it was interrupted.",
        epilog="examples:\n"
        "  simclr-dist recipe configs/recipes/cifar10_v2_cpu.yaml\n"
        "  simclr-dist recipe configs/recipes/imagenet_v2_resnet50.yaml --run runs/v2  # pretrained elsewhere\n"
        "  accelerate launch --multi_gpu -m simclr_dist.cli recipe RECIPE --run RUN  # what follows, on all GPUs",
    )
    recipe.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, see configs/recipes/")
    recipe.add_argument(
        "--run", dest="pretrained", metavar="RUN", type=Path, help="take this pretrained run instead of pretraining"
    )
    recipe.add_argument(
        "--nproc", type=positive_int, help="processes that pretrain (default: all GPUs, or two on the CPU)"
    )
    recipe.add_argument("--device", help="of fine-tuning and distillation (default: a GPU if there is one)")
    recipe.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the stages and the table (default: the folder recipe of the run)",
    )
    recipe.add_argument("--dry-run", action="store_true", help="check everything, print the stages, do nothing")
    recipe.add_argument("overrides", nargs="*", metavar="key=value", help="for pretraining")


def _run(args: argparse.Namespace) -> int:
    return run_recipe(
        args.recipe,
        args.overrides,
        choose_device(args.device),
        run=args.pretrained,
        out=args.out,
        num_processes=args.nproc,
        dry_run=args.dry_run,
    )


def read_recipe(path: Path, overrides: Sequence[str] = (), *, check_data: bool = False) -> tuple[Recipe, Config]:
    """The checked recipe, and the configuration of its pretraining. Raises ConfigError."""
    from simclr_dist.few_labels.recipe import Recipe, check_recipe

    recipe = load_section(path, Recipe)
    config = load_config(
        path.parent / recipe.pretrain.config, [*recipe.pretrain.overrides, *overrides], check_data=check_data
    )
    check_recipe(recipe, path, config.model, config.data.test)
    return recipe, config


def run_recipe(
    path: Path,
    overrides: Sequence[str],
    device: torch.device,
    *,
    run: Path | None = None,
    out: Path | None = None,
    num_processes: int | None = None,
    dry_run: bool = False,
) -> int:
    """Does what is left to do and prints the table. run: a pretrained run to take instead of pretraining.

    out: for the stages and the table; None: the folder of the run.
    Returns the exit code: 0, or that of a pretraining that has not finished. Raises CheckpointError, ConfigError,
    DataError.
    """
    from simclr_dist.checkpoint.lineage import find_checkpoint
    from simclr_dist.few_labels.recipe import run_stages, stages
    from simclr_dist.parallel.distributed import world
    from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

    recipe, config = read_recipe(path, overrides, check_data=run is None)
    pretraining = path.parent / recipe.pretrain.config
    settings = [*recipe.pretrain.overrides, *overrides]
    run_dir = RunDir(run or config.run_dir)
    root = out or run_dir.recipe
    if dry_run:
        words = shlex.join([str(pretraining), *settings])
        print(f"pretraining: {words}" if run is None else f"pretrained: {run}")
        for stage in stages(recipe, root, None, device, say):
            print(f"{stage.name}: {stage.folder}")
        return 0
    if run is None and world().size > 1:
        raise ConfigError(
            [f"{world().size} processes share what follows a pretraining: pretrain first, then name it with --run RUN"]
        )
    if run is None:
        code = pretrain(pretraining, settings, num_processes)
        status = read_status(run_dir.path)
        if code or status is None or status.state != "finished":
            say("recipe: pretraining has not finished; the same command continues from there")
            return code
    checkpoint = run_on_all_ranks(lambda: find_checkpoint(run_dir.path, say), device)
    table = run_stages(recipe, checkpoint, root, device, say)
    if world().rank > 0:
        return 0
    print_table(table.title, table.columns, table.rows)
    print(table.path)
    return 0
