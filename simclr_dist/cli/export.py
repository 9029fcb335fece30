"""`simclr-dist export`: the encoder as a file that others can load."""

from __future__ import annotations

import argparse
from pathlib import Path

from simclr_dist.cli.arguments import Commands, add_command, add_source_arguments, source_of
from simclr_dist.cli.terminal import say


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        _run,
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
    add_source_arguments(parser)
    parser.add_argument("--format", choices=("torchvision", "safetensors", "onnx"), default="torchvision")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="default: RUN/export/encoder.pt, .safetensors or .onnx"
    )
    parser.add_argument("--license", default="unspecified", help="for the model card, e.g. apache-2.0 or cc-by-4.0")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.pretrained import checkpoint_of
    from simclr_dist.errors import ExportError
    from simclr_dist.evaluation.offline import known_accuracy
    from simclr_dist.export.export import SUFFIXES, export
    from simclr_dist.run.layout import RunDir
    from simclr_dist.run.results import require_writable

    source, name = source_of(args), f"encoder{SUFFIXES[args.format]}"
    checkpoint, out = checkpoint_of(source, say), args.out
    if checkpoint is not None:
        source, out = checkpoint, out or RunDir.of_checkpoint(checkpoint.path).export / name
    if out is None:
        raise ExportError(f"{args.source}: is of no run, so name the file to write with --out")
    require_writable(out.parent)
    exported = export(
        source,
        out,
        format=args.format,
        license=args.license,
        accuracy=known_accuracy(checkpoint, say) if checkpoint else None,
        overwrite=args.overwrite,
        warn=say,
    )
    print(f"{exported.path}\n{exported.card}\n\n{exported.load_with}")
    for note in exported.notes:
        print(f"\nnote: {note}")
    return 0
