"""`simclr-dist evaluate`: what a checkpoint's features are worth, by classes or by comparing samples."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
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
from simclr_dist.errors import ConfigError

if TYPE_CHECKING:
    from simclr_dist.evaluation.offline import Score


def register(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint: kNN, a linear probe, similarity, retrieval, zero-shot",
        description="Score the frozen encoder of a checkpoint. Which methods make sense depends on data.kind.",
    )
    methods = evaluate.add_subparsers(dest="method", required=True, metavar="knn|linear|similarity|retrieval|zero-shot")
    _register_comparisons(methods)
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


def _register_comparisons(methods: Commands) -> None:
    similarity = add_command(
        methods,
        "similarity",
        _run_similarity,
        help="Spearman's correlation of texts' cosines with people's scores (STS); seconds",
        description=(
            "Spearman's correlation between the cosine of h of two texts and the score that people gave the pair,\n"
            "over all pairs (STS). The table: .tsv, .csv, .jsonl or .parquet."
        ),
        epilog="example: simclr-dist evaluate similarity runs/text --pairs sts-test.tsv --baselines",
    )
    similarity.add_argument("--pairs", type=Path, metavar="FILE", required=True, help="a table of scored pairs")
    similarity.add_argument(
        "--column", action="append", metavar="NAME", help="of a text, twice (default: sentence1, sentence2)"
    )
    similarity.add_argument("--score-column", metavar="NAME", default="score", help="default: score")
    similarity.add_argument("--no-header", action="store_true", help="of .tsv and .csv: columns are called 1, 2, 3, …")
    similarity.add_argument("--encoding", default="utf-8", help="default: utf-8")
    retrieval = add_command(
        methods,
        "retrieval",
        _run_retrieval,
        help="how often each side of a pair finds the other (R@1, R@10); seconds",
        description=(
            "R@1, R@10 and the median rank: each side of a held-out pair looks for the other among all, in both\n"
            "directions. Equal contents count as right."
        ),
        epilog="example: simclr-dist evaluate retrieval runs/pairs --pairs data/held_out --baselines",
    )
    retrieval.add_argument("--pairs", metavar="FOLDER", help="a folder of pairs (default: data.test of the run)")
    zero_shot = add_command(
        methods,
        "zero-shot",
        _run_zero_shot,
        help="classify images by the names of their classes, without training; seconds",
        description=(
            "Top-1 and top-5 of images: the class whose name, put into the templates, is the most similar to the\n"
            "image (Radford et al. 2021, section 3.1). Several templates are averaged."
        ),
        epilog="example: simclr-dist evaluate zero-shot runs/pairs --test held_out.beton --template 'a photo of a {}'",
    )
    zero_shot.add_argument("--test", metavar="DATA", help="labelled images (default: data.test of the run)")
    zero_shot.add_argument(
        "--template", action="append", metavar="TEXT", help="with {} for the name of a class (default: the name alone)"
    )
    for parser in (similarity, retrieval, zero_shot):
        parser.add_argument("source", metavar="RUN", help="a run's folder, or one of its checkpoints/step_…")
        parser.add_argument(
            "--baselines",
            action="store_true",
            help="also score the network as it was before training and, of texts, TF-IDF",
        )
        parser.add_argument(
            "--out", type=Path, metavar="FOLDER", help="for evaluations.jsonl, where RUN is read-only (default: RUN)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        add_compute_arguments(parser)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "precision": args.precision,
        "batch_size": args.batch_size,
        "baselines": args.baselines,
        "out": args.out,
        "show": lambda figures, record: _show_figures(args, figures, record),
        "device": choose_device(args.device),
        "say": say,
    }


def _run_similarity(args: argparse.Namespace) -> int:
    from simclr_dist.data.tokens.texts import Columns
    from simclr_dist.evaluation.comparisons import USUAL_COLUMNS, evaluate_similarity

    columns = Columns(tuple(args.column or USUAL_COLUMNS.texts), args.score_column, not args.no_header)
    if len(columns.texts) != 2:
        raise ConfigError([f"--column: a pair has two texts, name two columns; found {', '.join(columns.texts)}"])
    evaluate_similarity(args.source, args.pairs, columns=columns, encoding=args.encoding, **_common(args))
    return 0


def _run_retrieval(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.comparisons import evaluate_retrieval

    evaluate_retrieval(args.source, args.pairs, **_common(args))
    return 0


def _run_zero_shot(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.comparisons import evaluate_zero_shot

    evaluate_zero_shot(args.source, args.test, templates=tuple(args.template or ("{}",)), **_common(args))
    return 0


def _show_figures(
    args: argparse.Namespace, figures: Mapping[str, Mapping[str, float]], record: Mapping[str, Any]
) -> None:
    if args.json:
        print(json.dumps({**record, "scores": figures}), flush=True)
        return
    sides = str(record.get("first")), str(record.get("second"))
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "spearman": ("Spearman x 100", lambda value: f"{100 * value:.2f}"),
        "top1": ("top-1", percent),
        "top5": ("top-5", percent),
    }
    for direction, (query, found) in (("to_second", sides), ("to_first", sides[::-1])):
        columns[f"r1_{direction}"] = f"{query} to {found}: R@1", percent
        columns[f"r10_{direction}"] = "R@10", percent
        columns[f"median_rank_{direction}"] = "median rank", lambda value: f"{value:g}"
    shown = {key: column for key, column in columns.items() if key in record}
    settings = ("pairs", "test_images", "classes", "chance_r1", "chance_top1", "image_size", "max_tokens", "precision")
    print_table(
        f"{args.method} on {record['test']}, step {record['step']}",
        ("", *(name for name, _ in shown.values())),
        [(name, *(form(found[key]) for key, (_, form) in shown.items())) for name, found in figures.items()],
        ", ".join(f"{name.replace('_', ' ')} {_short(record[name])}" for name in settings if name in record),
    )


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
