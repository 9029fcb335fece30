"""The command lines of evaluation. torch is imported when one of them runs, so that --help is quick."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simclr_dist.cli import embed as embed_commands
from simclr_dist.cli import finetune as finetune_commands
from simclr_dist.terminal import (
    SOURCE_HELP,
    add_command,
    add_compute_arguments,
    choose_device,
    percent,
    positive,
    positive_int,
    print_table,
    say,
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the commands; each parsed namespace has `run`, a function of the namespace that returns the exit code."""
    _register_evaluate(subparsers)
    _register_export(subparsers)
    finetune_commands.register(subparsers)
    embed_commands.register(subparsers)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


def _register_evaluate(subparsers: argparse._SubParsersAction) -> None:
    evaluate = subparsers.add_parser(
        "evaluate",
        help="score a checkpoint with kNN or a linear probe",
        description="Score the frozen encoder of a checkpoint on labelled images.",
    )
    methods = evaluate.add_subparsers(dest="method", required=True, metavar="knn|linear")
    knn = add_command(
        methods,
        "knn",
        _run_evaluate,
        help="weighted k nearest neighbours (Wu et al. 2018); seconds",
        description="Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018). Exact.",
        epilog="example: simclr-dist evaluate knn runs/cifar10_demo --baselines",
    )
    knn.add_argument("--k", type=positive_int, help="neighbours (default: evaluation.knn_k of the run)")
    knn.add_argument(
        "--temperature", type=positive, help="of the votes exp(s/T) (default: evaluation.knn_temperature of the run)"
    )
    linear = add_command(
        methods,
        "linear",
        _run_evaluate,
        help="linear classifier on frozen features; a minute",
        description=(
            "Logistic regression on frozen features. Its weight decay is chosen on a tenth of the training images;\n"
            "test images are looked at once, for the result."
        ),
        epilog="example: simclr-dist evaluate linear runs/cifar10_demo --train other.beton --test other_test.beton",
    )
    linear.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="default: lbfgs")
    linear.add_argument("--seed", type=int, default=0, help="draws the held-out tenth (default: 0)")
    for parser in (knn, linear):
        parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=SOURCE_HELP)
        parser.add_argument("--train", metavar="DATA", help="labelled images (default: data.train of the run)")
        parser.add_argument("--test", metavar="DATA", help="held-out images (default: data.test of the run)")
        parser.add_argument(
            "--baselines", action="store_true", help="also score raw pixels and the encoder as it was before training"
        )
        parser.add_argument("--no-cache", action="store_true", help="neither read nor keep RUN/features")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        add_compute_arguments(parser)


def _run_evaluate(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.offline import evaluate
    from simclr_dist.parallel import distributed

    with_knn = args.method == "knn"
    scores, record = evaluate(
        args.source,
        method=args.method,
        train=args.train,
        test=args.test,
        k=args.k if with_knn else None,
        temperature=args.temperature if with_knn else None,
        solver="lbfgs" if with_knn else args.solver,
        seed=0 if with_knn else args.seed,
        precision=args.precision,
        batch_size=args.batch_size,
        baselines=args.baselines,
        cache=None if args.no_cache else "run",
        device=choose_device(args.device),
        say=say,
    )
    if distributed.rank() > 0:
        return 0
    if args.json:
        rows = {score.name: {"top1": score.top1, "top5": score.top5} for score in scores}
        print(json.dumps({**record, "scores": rows}))
        return 0
    settings = ("k", "temperature", "solver", "weight_decay", "precision")
    print_table(
        f"{args.method} on {record['test']}, step {record['step']}",
        ("features", "top-1", "top-5"),
        [(score.name, percent(score.top1), percent(score.top5)) for score in scores],
        ", ".join(f"{name} {_short(record[name])}" for name in settings if name in record),
    )
    return 0


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# export


def _register_export(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "export",
        _run_export,
        help="write the encoder as a file that others can load",
        description=(
            "Write the trained encoder, with a model card beside it. The file is read back and compared with the\n"
            "encoder before it gets its name.\n\n"
            "torchvision   loads into torchvision.models.<encoder>() with strict=True; fc is zeros, not trained\n"
            "safetensors   weights without fc; configuration, normalisation and licence in the metadata\n"
            "onnx          a graph from normalised images [n, 3, S, S] to h [n, D], n free; needs the extra `export`"
        ),
        epilog="example: simclr-dist export runs/cifar10_demo --format safetensors --license cc-by-4.0",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=SOURCE_HELP)
    parser.add_argument("--format", choices=("torchvision", "safetensors", "onnx"), default="torchvision")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="default: RUN/export/encoder.pt, .safetensors or .onnx"
    )
    parser.add_argument("--license", default="unspecified", help="for the model card, e.g. apache-2.0 or cc-by-4.0")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _run_export(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.files import find_checkpoint
    from simclr_dist.evaluation.offline import known_accuracy
    from simclr_dist.export.export import export

    checkpoint = find_checkpoint(args.source, say)
    suffix = {"torchvision": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}[args.format]
    out = args.out or checkpoint.path.parent.parent / "export" / f"encoder{suffix}"
    exported = export(
        checkpoint.path,
        out,
        format=args.format,
        license=args.license,
        accuracy=known_accuracy(checkpoint),
        overwrite=args.overwrite,
    )
    print(f"{exported.path}\n{exported.card}\n\n{exported.load_with}")
    for note in exported.notes:
        print(f"\nnote: {note}")
    return 0
