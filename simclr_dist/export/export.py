"""Writes a trained encoder to a file or folder that others can load, and a model card beside it or in it.

Before it gets its name it is read back, and the outputs of that network must be those of the encoder in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from simclr_dist.atomic import replace_text, replaces, replaces_folder
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.pretrained import Source, images_alone, load_pretrained
from simclr_dist.config import OF_TOKENS
from simclr_dist.data.decode.crops import EVALUATION_SHARE
from simclr_dist.errors import ExportError
from simclr_dist.export import hub
from simclr_dist.export.card import Loading, loading, of_images, of_texts, render_card, text_loading
from simclr_dist.export.folders import CONFIG, PROCESSOR, WEIGHTS, write_timm, write_transformers
from simclr_dist.export.formats import OnnxGraph, write_onnx, write_safetensors, write_torchvision
from simclr_dist.export.preprocessing import Preprocessing
from simclr_dist.export.self_check import check_same_outputs
from simclr_dist.export.texts import FILES as TEXT_FILES
from simclr_dist.export.texts import write_texts
from simclr_dist.network.hugging_face import HuggingFaceEncoder
from simclr_dist.network.simclr import SimCLR
from simclr_dist.run.results import require_writable

Format = Literal["torchvision", "safetensors", "onnx", "timm", "hf", "sentence-transformers"]
NAMES: dict[Format, str] = {
    "torchvision": "encoder.pt",
    "safetensors": "encoder.safetensors",
    "onnx": "encoder.onnx",
    "timm": "timm",
    "hf": "hf",
    "sentence-transformers": "sentence_transformers",
}
"""Of what is written, where nobody chose another: files, and the folders of others."""
FOLDERS: tuple[Format, ...] = ("timm", "hf", "sentence-transformers")
_OF_TEXTS: tuple[Format, ...] = ("hf", "sentence-transformers")
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """The file or folder, its card, the Python lines that load it, and what a user has to know.

    files: all that belongs to it, by the names that they have on a model hub. address: there, if it was uploaded.
    """

    path: Path
    card: Path
    load_with: str
    notes: tuple[str, ...]
    files: Mapping[str, Path] = field(default_factory=dict)
    address: str | None = None


def export(
    source: Source,
    out: str | Path,
    *,
    format: Format = "torchvision",
    license: str = "unspecified",
    accuracy: Mapping[str, float] | None = None,
    image_size: int | None = None,
    crop_share: float = EVALUATION_SHARE,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the encoder of a run or checkpoint to `out`, and its card to `out` + ".md", or README.md in the folder.

    accuracy: measured figures for the card, e.g. {"kNN top-1": 0.83}; shares between 0 and 1.
    image_size: side of the images for the preprocessing that the export states; None: that of the run's evaluations.
    crop_share: of the shorter side of a picture, for the same; 1 where all pictures are of that size and stay whole.
    push_to_hub: a repository, private unless `public`, that the files and the card are uploaded to.
    Raises CheckpointError: no valid checkpoint. ExportError: `out` or its card exists, the format does not know the
    encoder, a library is missing, or the upload failed; then the export is on disk. RuntimeError: the self-check
    failed; nothing was written.
    """
    out = Path(out)
    card = out / CARD if format in FOLDERS else out.with_name(out.name + ".md")
    if push_to_hub is not None:
        hub.check_repository(push_to_hub)
    _check_free(out, card, format, overwrite)
    require_writable(out.parent)
    model, checkpoint = load_pretrained(source, warn, image_size)
    config, address = checkpoint.config, _address(format, out, push_to_hub)
    if isinstance(model.encoder, HuggingFaceEncoder):
        lines, files = _write_text_folder(
            model.encoder, model.feature_dim, checkpoint, format, address, out, license, accuracy or {}
        )
        return _pushed(Exported(out, card, lines.load, lines.notes, files), checkpoint, push_to_hub, public)
    if config.data.kind in OF_TOKENS or format == "sentence-transformers":
        raise ExportError(
            f"{checkpoint.path}: {config.model.encoder} is no network of transformers; of texts, those from hf/FOLDER "
            "are exported"
        )
    model, checkpoint = images_alone(model, checkpoint, "export")
    config = checkpoint.config
    seen = Preprocessing(config.evaluation_data.image_size, crop_share, config.data.pixel_format)
    samples = of_images(config.model, seen, config.data.image_size)

    def describe(one_size: str = "") -> tuple[Loading, str]:
        lines = loading(config.model, seen, model.feature_dim, format, address, one_size)
        return lines, render_card(checkpoint, model.feature_dim, samples, format, lines, license, accuracy or {})

    if format in FOLDERS:
        write = write_timm if format == "timm" else write_transformers
        with replaces_folder(out) as folder:
            write(model.encoder, model.feature_dim, config.model, license, seen, folder)
            lines, text = describe()
            (folder / CARD).write_text(text, encoding="utf-8")
        files = _files_in(out)
    else:
        lines, text = describe(_write_file(format, model, checkpoint, license, out))
        replace_text(card, text)
        files = {out.name: out, CARD: card}
    return _pushed(Exported(out, card, lines.load, lines.notes, files), checkpoint, push_to_hub, public)


def _pushed(written: Exported, checkpoint: Checkpoint, repository: str | None, public: bool) -> Exported:
    """Uploaded, where that was asked for."""
    if repository is None:
        return written
    try:
        message = f"{checkpoint.config.name}, step {checkpoint.step}"
        return replace(written, address=hub.push(written.files, repository, public=public, message=message))
    except ExportError as error:
        raise ExportError(f"{error}\n{written.path} is written; to try again, add --overwrite") from None


def _write_text_folder(
    encoder: HuggingFaceEncoder,
    feature_dim: int,
    checkpoint: Checkpoint,
    format: Format,
    address: str,
    out: Path,
    license: str,
    accuracy: Mapping[str, float],
) -> tuple[Loading, dict[str, Path]]:
    config, noun = checkpoint.config, "text" if encoder.letters is None else "protein"
    if format not in _OF_TEXTS or (format == "sentence-transformers" and encoder.letters is not None):
        fitting = "hf" if encoder.letters is not None else " or ".join(_OF_TEXTS)
        raise ExportError(f"--format {format} has no encoders of {noun}s; use --format {fitting}")
    max_tokens = config.data.tokens.max_tokens
    with replaces_folder(out) as folder:
        write_texts(encoder, feature_dim, max_tokens, folder, sentences=format == "sentence-transformers")
        lines = text_loading(config.model, feature_dim, format, address, max_tokens)
        samples = of_texts(noun, config.model, max_tokens)
        card = render_card(checkpoint, feature_dim, samples, format, lines, license, accuracy)
        (folder / CARD).write_text(card, encoding="utf-8")
    return lines, _files_in(out)


def _files_in(folder: Path) -> dict[str, Path]:
    """By their names on a model hub."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _write_file(format: Format, model: SimCLR, checkpoint: Checkpoint, license: str, out: Path) -> str:
    """Writes and checks the file. Returns why images of one size only fit, which a graph has to tell; else nothing."""
    writers: dict[Format, Callable[..., object]]
    writers = {"torchvision": write_torchvision, "safetensors": write_safetensors, "onnx": write_onnx}
    with replaces(out) as temporary:
        written = writers[format](model.encoder, model.feature_dim, checkpoint, license, temporary)
        read_back = written.read_back if isinstance(written, OnnxGraph) else written
        size, channels = checkpoint.config.evaluation_data.image_size, checkpoint.config.model.channels
        check_same_outputs(model.encoder, read_back, size, channels=channels)  # type: ignore[arg-type]
    return written.one_size if isinstance(written, OnnxGraph) else ""


def _address(format: Format, out: Path, repository: str | None) -> str:
    """What loads it: the name of the file or folder, from where it lies, or of the repository."""
    if format not in FOLDERS:
        return out.name
    if format == "timm":
        return f"hf-hub:{repository}" if repository else f"local-dir:{out.name}"
    return repository or out.name


def _check_free(out: Path, card: Path, format: Format, overwrite: bool) -> None:
    """Raises ExportError where something else would be lost."""
    if not overwrite:
        for path in (out, card):
            if path.exists():
                raise ExportError(f"{path} exists; choose another name with --out, or --overwrite it")
    elif format in FOLDERS and out.exists():
        ours = {WEIGHTS, CONFIG, PROCESSOR, CARD, *TEXT_FILES}
        others = [out] if not out.is_dir() else [path for path in sorted(out.iterdir()) if path.name not in ours]
        if others:
            raise ExportError(f"{others[0]} is no part of an export, and would be lost; choose another name with --out")
    elif out.is_dir():
        raise ExportError(f"{out} is a folder; name a file with --out")
