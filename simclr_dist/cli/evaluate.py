"""`simclr-dist evaluate`: kNN or a linear probe on a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import positive_float, positive_int
from simclr_dist.cli.arguments import (
    Commands,
    add_command,
    add_compute_arguments,
    add_source_arguments,
    choose_device,
    source_of,
)
from simclr_dist.cli.terminal import percent, print_table, say

if TYPE_CHECKING:
    from simclr_dist.evaluation.offline import Score


def register(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint with kNN or a linear probe",
        description="Score the frozen encoder of a checkpoint on labelled images.",
    )
    methods = evaluate.add_subparsers(dest="method", required=True, metavar="knn|linear")
    knn = add_command(
        methods,
        "knn",
        _run,
        help="weighted k nearest neighbours (Wu et al. 2018); seconds",
        description="Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018). Exact.",
        epilog="example: simclr-dist evaluate knn runs/cifar10_demo --baselines",
    )
    knn.add_argument("--k", type=positive_int, help="neighbours (default: evaluation.knn_k of the run)")
    knn.add_argument(
        "--temperature",
        type=positive_float,
        help="of the votes exp(s/T) (default: evaluation.knn_temperature of the run)",
    )
    knn.add_argument(
        "--max-train",
        metavar="N",
        type=positive_int,
        help="training images to look among, of every class, as evaluation.knn_max_train draws them (default: all)",
    )
    linear = add_command(
        methods,
        "linear",
        _run,
        help="linear classifier on frozen features; a minute",
        description=(
            "Logistic regression on frozen features. Its weight decay is chosen on a tenth of the training images;\n"
            "test images are used once, for the result."
        ),
        epilog="example: simclr-dist evaluate linear runs/cifar10_demo --train other.beton --test other_test.beton",
    )
    linear.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="default: lbfgs")
    linear.add_argument("--seed", type=int, default=0, help="draws the held-out tenth (default: 0)")
    for parser in (knn, linear):
        add_source_arguments(parser)
        parser.add_argument(
            "--train", metavar="DATA", help="labelled images (default: evaluation.train or data.train of the run)"
        )
        parser.add_argument("--test", metavar="DATA", help="held-out images (default: data.test of the run)")
        parser.add_argument(
            "--baselines", action="store_true", help="also score raw pixels and the encoder as it was before training"
        )
        parser.add_argument("--no-cache", action="store_true", help="neither read nor keep features")
        parser.add_argument(
            "--out",
            type=Path,
            metavar="FOLDER",
            help="for evaluations.jsonl and features, where RUN is read-only or somebody else's (default: RUN)",
        )
        parser.add_argument(
            "--feature-dtype",
            choices=("float32", "float16"),
            default="float32",
            help="of features as they are kept; float16 takes half the room (default: float32)",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        add_compute_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.offline import evaluate

    with_knn = args.method == "knn"
    evaluate(
        source_of(args),
        method=args.method,
        train=args.train,
        test=args.test,
        k=args.k if with_knn else None,
        temperature=args.temperature if with_knn else None,
        max_train=args.max_train if with_knn else None,
        image_size=args.image_size,
        solver="lbfgs" if with_knn else args.solver,
        seed=0 if with_knn else args.seed,
        precision=args.precision,
        batch_size=args.batch_size,
        baselines=args.baselines,
        cache=None if args.no_cache else "run",
        out=args.out,
        feature_dtype=args.feature_dtype,
        show=lambda scores, record: _show(args, scores, record),
        device=choose_device(args.device),
        say=say,
    )
    return 0


def _show(args: argparse.Namespace, scores: list[Score], record: dict[str, Any]) -> None:
    if args.json:
        rows = {score.name: {"top1": score.top1, "top5": score.top5} for score in scores}
        print(json.dumps({**record, "scores": rows}), flush=True)
        return
    settings = ("k", "temperature", "solver", "weight_decay", "train_images", "test_images", "image_size", "precision")
    print_table(
        f"{args.method} on {record['test']}, step {record['step']}",
        ("features", "top-1", "top-5"),
        [(score.name, percent(score.top1), percent(score.top5)) for score in scores],
        ", ".join(f"{name.replace('_', ' ')} {_short(record[name])}" for name in settings if name in record),
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
