"""`simclr-dist export`: the encoder as a file or folder that others can load."""

from __future__ import annotations

import argparse
from pathlib import Path

from simclr_dist.argument_types import share
from simclr_dist.cli.arguments import Commands, add_command, add_source_arguments, source_of
from simclr_dist.cli.terminal import say

FORMATS = ("torchvision", "safetensors", "onnx", "timm", "hf", "sentence-transformers")


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        _run,
        help="write the encoder as a file or folder that others can load",
        description=(
            "Write the trained encoder, with a model card. It is read back and compared with the encoder before it\n"
            "gets its name.\n\n"
            "torchvision   loads into torchvision.models.<encoder>() with strict=True; fc is zeros, not trained\n"
            "safetensors   weights without fc; configuration, normalisation and licence in the metadata\n"
            "onnx          a graph from normalised images [n, 3, H, W] to h [n, D], n free, H and W where the network\n"
            "              allows it; needs the extra `export`\n"
            "timm          a folder for timm.create_model('local-dir:…', pretrained=True); needs the extra `timm`\n"
            "hf            a folder for transformers' AutoModel and AutoImageProcessor; of texts,\n"
            "              AutoTokenizer; needs the extra `hf`\n"
            "sentence-transformers   a folder for SentenceTransformer, of an encoder of texts from hf/FOLDER\n\n"
            "--push-to-hub uploads the files and the card, and nothing else, with the token of `hf auth login` or\n"
            "HF_TOKEN. The repository is private unless --public is given."
        ),
        epilog=(
            "examples:\n"
            "  simclr-dist export runs/cifar10_demo --format safetensors --license cc-by-4.0\n"
            "  simclr-dist export runs/imagenet_resnet50_100ep --format timm --push-to-hub OWNER/NAME"
        ),
    )
    add_source_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="torchvision")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="default: RUN/export/encoder.pt, .safetensors or .onnx, RUN/export/timm, hf or sentence_transformers",
    )
    parser.add_argument("--license", default="unspecified", help="for the model card, e.g. apache-2.0 or cc-by-4.0")
    parser.add_argument(
        "--crop",
        metavar="SHARE",
        type=share,
        help="of a picture's shorter side that its preprocessing keeps (default: 1 where the training images are of "
        "the image size, else 0.875, as evaluations do it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub; extra `hf`")
    parser.add_argument("--public", action="store_true", help="a repository that everyone can read")


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.pretrained import checkpoint_of
    from simclr_dist.config import IMAGES
    from simclr_dist.data.decode.crops import EVALUATION_SHARE
    from simclr_dist.errors import ExportError
    from simclr_dist.evaluation.offline import crop_share_of, known_accuracy
    from simclr_dist.export.export import NAMES, export
    from simclr_dist.run.layout import RunDir

    source, name = source_of(args), NAMES[args.format]
    checkpoint, out, crop_share = checkpoint_of(source, say), args.out, args.crop
    if checkpoint is not None:
        source, out = checkpoint, out or RunDir.of_checkpoint(checkpoint.path).export / name
        if checkpoint.config.data.kind == IMAGES:
            crop_share = crop_share or crop_share_of(checkpoint, args.image_size, say)
    if out is None:
        raise ExportError(f"{args.source}: is of no run, so name the file to write with --out")
    exported = export(
        source,
        out,
        format=args.format,
        license=args.license,
        accuracy=known_accuracy(checkpoint, say) if checkpoint else None,
        image_size=args.image_size,
        crop_share=crop_share or EVALUATION_SHARE,
        overwrite=args.overwrite,
        push_to_hub=args.push_to_hub,
        public=args.public,
        warn=say,
    )
    print(f"{exported.path}\n{exported.card}\n\n{exported.load_with}")
    for note in exported.notes:
        print(f"\nnote: {note}")
    if exported.address is not None:
        print(f"\n{exported.address}")
    return 0
