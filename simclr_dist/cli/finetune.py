"""`simclr-dist finetune` and `distill`: classifiers from few labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import non_negative_float, non_negative_int, positive_float, positive_int
from simclr_dist.cli.arguments import (
    Commands,
    add_command,
    add_compute_arguments,
    add_source_arguments,
    choose_device,
    source_of,
)
from simclr_dist.cli.terminal import percent, print_table, say
from simclr_dist.errors import ConfigError

if TYPE_CHECKING:
    from simclr_dist.few_labels.train import Settings


def register(commands: Commands) -> None:
    finetune = add_command(
        commands,
        "finetune",
        _run_finetune,
        help="train a classifier with few labels, from a checkpoint",
        description=(
            "Train encoder and classifier together on a class-balanced, seeded share of the labels (SimCLR, appendix\n"
            "B.5; SimCLR v2 with --from head), or with --freeze the classifier alone (appendix B.6, the paper's\n"
            "linear evaluation). Writes subset.json, classifier.safetensors and result.json."
        ),
        epilog=(
            "examples:\n"
            "  simclr-dist finetune runs/cifar10_demo --labels 0.01\n"
            "  simclr-dist finetune runs/v2 --labels 0.1 --from head\n"
            "  simclr-dist finetune runs/cifar10_demo --freeze"
        ),
    )
    add_source_arguments(finetune)
    labels = finetune.add_mutually_exclusive_group()
    labels.add_argument("--labels", type=_share, default=1.0, metavar="SHARE", help="0.01, 0.1, 1 (default: 1, all)")
    labels.add_argument("--subset", type=Path, metavar="FILE", help="use the samples of this subset.json")
    finetune.add_argument(
        "--from", dest="start", choices=("encoder", "head"), default="encoder", help="head: keep the head's first layer"
    )
    finetune.add_argument("--freeze", action="store_true", help="train the classifier only")
    finetune.add_argument(
        "--train", metavar="DATA", help="labelled images (default: evaluation.train or data.train of the run)"
    )
    finetune.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/finetune/<labels>_<from>_seed<seed>")
    _add_schedule(
        finetune, epochs="60 up to 1 %% of the labels, else 30; 90 with --freeze", lr="0.05, with --freeze 0.1"
    )

    distill = add_command(
        commands,
        "distill",
        _run_distill,
        help="train a student on the answers of a fine-tuned classifier, with unlabelled images",
        description="Distillation as in SimCLR v2 (arXiv 2006.10029, eq. 2; eq. 3 with --alpha below 1).",
        epilog="example: simclr-dist distill runs/v2/finetune/0.1_head_seed0/classifier.safetensors --student resnet18",
    )
    distill.add_argument("teacher", metavar="CLASSIFIER", type=Path, help="a classifier.safetensors of `finetune`")
    student = distill.add_mutually_exclusive_group()
    student.add_argument("--student", metavar="ENCODER", help="a fresh encoder (default: one like the teacher's)")
    student.add_argument("--student-from", metavar="RUN_OR_CHECKPOINT", help="begin with this pretrained encoder")
    distill.add_argument("--student-width", type=positive_int, help="width of a fresh resnet_small")
    distill.add_argument("--train", metavar="DATA", help="images; labels are not read (default: data.train of its run)")
    distill.add_argument(
        "--temperature", type=positive_float, default=1.0, help="of the softmax of both networks (default: 1)"
    )
    distill.add_argument("--alpha", type=_share, default=1.0, help="weight of the teacher; the rest goes to labels")
    distill.add_argument("--subset", type=Path, metavar="FILE", help="with --alpha: the samples whose labels are used")
    distill.add_argument("--out", type=Path, metavar="FOLDER", help="default: distilled_<student>, beside the teacher")
    _add_schedule(distill, epochs="100", lr="0.05")


def _add_schedule(parser: argparse.ArgumentParser, *, epochs: str, lr: str) -> None:
    parser.add_argument("--test", metavar="DATA", help="held-out images (default: data.test of the run)")
    parser.add_argument("--epochs", type=positive_int, help=f"default: {epochs}")
    parser.add_argument(
        "--lr", type=positive_float, help=f"for a batch of 256, scaled by the batch size (default: {lr})"
    )
    parser.add_argument("--weight-decay", type=non_negative_float, default=0.0, help="default: 0")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="draws subset, order and crops (default: 0)")
    parser.add_argument(
        "--save-every-minutes",
        type=non_negative_float,
        default=10.0,
        metavar="M",
        help="keep the training so far; after a stop or a kill the same command goes on from there (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_compute_arguments(parser, batch_size=256)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text} (1 % is 0.01)")
    return value


def _settings(args: argparse.Namespace) -> Settings:
    from simclr_dist.few_labels.train import Settings

    return Settings(
        choose_device(args.device),
        args.epochs,
        args.lr,
        args.weight_decay,
        args.batch_size,
        args.seed,
        args.precision,
        args.save_every_minutes,
    )


def _run_finetune(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.lineage import same_on_all_ranks
    from simclr_dist.checkpoint.pretrained import checkpoint_of
    from simclr_dist.few_labels.train import finetune_checkpoint
    from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
    from simclr_dist.run.layout import RunDir

    settings = _settings(args)
    source = same_on_all_ranks(source_of(args), settings.device, say)
    checkpoint, out = run_on_all_ranks(lambda: checkpoint_of(source, say), settings.device), args.out
    labels = args.subset.stem if args.subset else f"{args.labels:g}"
    name = f"{labels}_{'frozen_' if args.freeze else ''}{args.start}_seed{args.seed}"
    if checkpoint is not None:
        source, out = checkpoint, out or RunDir.of_checkpoint(checkpoint.path).finetune / name
    if out is None:
        raise ConfigError([f"{args.source}: is of no run, so name the folder to write with --out"])
    with _divergence_is_a_config_error():
        result = finetune_checkpoint(
            source,
            out,
            settings,
            share=args.labels,
            subset_file=args.subset,
            start=args.start,
            freeze=args.freeze,
            train=args.train,
            test=args.test,
            image_size=args.image_size,
            say=say,
        )
    return _show(args, result, f"{result['num_labels']} labels", out)


def _run_distill(args: argparse.Namespace) -> int:
    from simclr_dist.few_labels.train import distill_classifier

    settings = _settings(args)
    changes = {"encoder": args.student, "width": args.student_width}
    out = args.out or args.teacher.parent / f"distilled_{args.student or 'student'}"
    with _divergence_is_a_config_error():
        result = distill_classifier(
            args.teacher,
            out,
            settings,
            student={key: value for key, value in changes.items() if value is not None},
            student_from=args.student_from,
            unlabelled=args.train,
            test=args.test,
            temperature=args.temperature,
            alpha=args.alpha,
            subset_file=args.subset,
            say=say,
        )
    return _show(args, result, f"student {result['student']}", out)


@contextmanager
def _divergence_is_a_config_error() -> Iterator[None]:
    """The remedy is another --lr, so that a traceback would help nobody."""
    try:
        yield
    except FloatingPointError as error:
        raise ConfigError([f"--lr: {error}"]) from None


def _show(args: argparse.Namespace, result: dict[str, Any], what: str, out: Path) -> int:
    from simclr_dist.parallel import distributed

    if distributed.rank() > 0:
        return 0
    if args.json:
        print(json.dumps(result))
        return 0
    rows = [(what, percent(result["top1"]), percent(result["top5"]))]
    px = f", {result['image_size']} px" if "image_size" in result else ""  # release 0.1 did not write it down
    print_table(f"{result['method']} on {result['test']}{px}", ("", "top-1", "top-5"), rows)
    print(out)
    return 0
