"""`simclr-dist embed`: h of every image of a folder; `neighbours`: which of them are most similar to an image."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from simclr_dist.argument_types import positive_int
from simclr_dist.cli.arguments import (
    Commands,
    add_command,
    add_compute_arguments,
    add_source_arguments,
    choose_device,
    source_of,
)
from simclr_dist.cli.terminal import print_table, say
from simclr_dist.run.results import require_writable


def register(commands: Commands) -> None:
    embed = add_command(
        commands,
        "embed",
        _run_embed,
        help="write h of every image of a folder to one file",
        description=(
            "Write the encoder's h of every image, labelled or not, to one file without pickles: an .npz with arrays\n"
            "h [n, D], labels, names, class_names, or a .parquet with columns name, label, h."
        ),
        epilog="example: simclr-dist embed runs/cifar10_demo ~/Pictures holiday.npz",
    )
    add_source_arguments(embed)
    embed.add_argument("images", metavar="IMAGES", help="a folder, a tar archive or a .beton file")
    embed.add_argument("out", metavar="OUT", type=Path)
    add_compute_arguments(embed)

    neighbours = add_command(
        commands,
        "neighbours",
        _run_neighbours,
        help="which embedded images are most similar to an image",
        description="Nearest neighbours of an image, by cosine similarity of h, among embedded images.",
        epilog="example: simclr-dist neighbours holiday.npz beach.jpg --k 5",
    )
    neighbours.add_argument("embeddings", metavar="EMBEDDINGS", type=Path)
    neighbours.add_argument("query", metavar="IMAGE", help="any image file, or the name of an embedded image")
    neighbours.add_argument("--k", type=positive_int, default=10, help="default: 10")
    add_source_arguments(neighbours, "--checkpoint", help="the encoder, if it has moved since")
    neighbours.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def _run_embed(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.embed import embed
    from simclr_dist.evaluation.embeddings_file import check_format, save_embeddings

    check_format(args.out)
    require_writable(args.out.parent, "choose another OUT")
    embeddings = embed(
        source_of(args),
        args.images,
        device=choose_device(args.device),
        precision=args.precision,
        batch_size=args.batch_size,
        image_size=args.image_size,
        say=say,
    )
    save_embeddings(args.out, embeddings)
    n, width = embeddings.h.shape
    seen = f"{n} images, h of width {width}, seen at {embeddings.image_size} px"
    print(f"{args.out}: {seen if embeddings.image_size else f'{n} samples, h of width {width}'}")
    return 0


def _run_neighbours(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.embed import neighbours_of, query_embedding
    from simclr_dist.evaluation.embeddings_file import load_embeddings

    embeddings = load_embeddings(args.embeddings)
    args.checkpoint = args.checkpoint or embeddings.checkpoint
    query = query_embedding(
        embeddings, args.query, checkpoint=source_of(args, "checkpoint"), image_size=args.image_size
    )
    found = neighbours_of(embeddings, query, args.k)
    if args.json:
        print(json.dumps([asdict(neighbour) for neighbour in found]))
        return 0
    rows = [(neighbour.name, f"{neighbour.similarity:.4f}", neighbour.class_name or "") for neighbour in found]
    print_table(f"nearest to {args.query}", ("image" if embeddings.image_size else "sample", "cosine", "class"), rows)
    return 0
