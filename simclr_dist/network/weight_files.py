"""Files of weights, whoever has written them: tensors by name, and what the file says of itself.

A file may come from anybody. torch's own are read with weights_only, which runs nothing from them; anything that it
refuses is named, with the way to convert the file. Nothing here knows which network the weights are of (weights.py).
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from simclr_dist.bounded_json import read_json
from simclr_dist.config import HUGGING_FACE
from simclr_dist.errors import CheckpointError
from simclr_dist.safe_text import printable

MAX_TENSORS = 100_000
LONGEST_NAME = 1000  # letters; nobody's parameters have such names, and all their ends are looked at
MAX_DEPTH = 20
FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
"""The weights in a folder as model hubs lay it out, the best first; an index names the parts of large ones."""
_PICKLE = b"\x80"  # torch before 1.6 wrote bare pickles
_OTHER_FORMATS = {
    ".onnx": "an ONNX graph",
    ".npz": "a numpy archive (JAX or TensorFlow weights)",
    ".h5": "Keras weights",
    ".msgpack": "Flax weights",
    ".engine": "a TensorRT engine",
    ".gguf": "a GGUF file",
}


@dataclass(frozen=True)
class Weights:
    """Tensors on the CPU by name, and what is known about them."""

    source: str
    """As messages name it."""
    sha256: str
    """Of the file; of several, of their digests."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    kind: str
    encoder: str | None = None
    """What the file says that it is of, as `model.encoder` names it."""
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """What images were normalised with; None: not known."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file."""


def read_weights(path: Path, *, only_safetensors: bool = False) -> Weights:
    """A file of torch or safetensors, or a folder with config.json. Raises CheckpointError.

    only_safetensors: of a folder; no other file of it is opened.
    """
    try:
        return _read_folder(path, only_safetensors) if path.is_dir() else _read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_file(path: Path) -> Weights:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if not path.is_file():
        raise CheckpointError(f"{path}: is no regular file")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        kind = "a file of safetensors"
    else:
        if (what := _OTHER_FORMATS.get(path.suffix.lower())) is not None:
            raise CheckpointError(
                f"{path}: is {what}; weights are read from .safetensors files and torch's (.pth, .pt)"
            )
        tensors, kind = _read_torch(path), "a file of torch"
    return Weights(str(path), _sha256([path]), tensors, kind, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Folders as model hubs lay them out


def _read_folder(folder: Path, only_safetensors: bool) -> Weights:
    files = _weight_files(folder)
    if only_safetensors and (others := [file.name for file in files if file.suffix != ".safetensors"]):
        raise CheckpointError(
            f"{folder}: its weights are in {others[0]}, a pickle, which is not read here; save them as "
            f"{FOLDER_FILES[0]} where you trust the folder (`save_pretrained` does), or set model.weights to null"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file)
    facts = _read_json(folder / "config.json")
    images = _read_json(folder / "preprocessor_config.json")
    pretrained = facts.get("pretrained_cfg")  # timm's
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    is_timm = isinstance(facts.get("architecture"), str)
    return Weights(
        str(folder),
        _sha256(files),
        tensors,
        "a folder of timm" if is_timm else "a folder of transformers" if "model_type" in facts else "a folder",
        encoder=f"timm/{facts['architecture'].partition('.')[0]}"
        if is_timm
        else _encoder_of_transformers(folder, facts),
        image_size=_side(pretrained.get("input_size"), facts.get("image_size")),
        mean=_three(images.get("image_mean") or pretrained.get("mean")),
        std=_three(images.get("image_std") or pretrained.get("std")),
    )


def _weight_files(folder: Path) -> list[Path]:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = _read_json(index).get("weight_map")
            parts = sorted(set(names.values())) if isinstance(names, dict) and names else []
            if not parts or not all(isinstance(part, str) and Path(part).name == part for part in parts):
                raise CheckpointError(f"{index}: names no files beside it")
            return [folder / part for part in parts]
    if (folder / "saved_model.pb").exists() or list(folder.glob("*.h5")):
        raise CheckpointError(f"{folder}: holds weights of TensorFlow; save them from torch, as model.safetensors")
    raise CheckpointError(
        f"{folder}: holds neither checkpoints of a run nor any of {', '.join(FOLDER_FILES)}; name the file itself"
    )


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is none."""
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: is no JSON that is read: {error}") from None
    return found if isinstance(found, dict) else {}


def _encoder_of_transformers(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """torchvision's or timm's name of the same architecture; of tokens it is the folder itself."""
    if "model_type" in facts and isinstance(facts.get("vocab_size"), int):
        return f"{HUGGING_FACE}{folder}"
    resnets = {
        ("basic", (2, 2, 2, 2)): "resnet18",
        ("basic", (3, 4, 6, 3)): "resnet34",
        ("bottleneck", (3, 4, 6, 3)): "resnet50",
        ("bottleneck", (3, 4, 23, 3)): "resnet101",
        ("bottleneck", (3, 8, 36, 3)): "resnet152",
    }
    vits = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
    kind, depths = facts.get("model_type"), facts.get("depths")
    if kind == "resnet" and isinstance(depths, list):
        layer = facts.get("layer_type", "bottleneck")
        return resnets.get((layer, tuple(depths))) if isinstance(layer, str) else None
    size = facts.get("hidden_size"), facts.get("num_hidden_layers")
    patch = facts.get("patch_size")
    if not all(isinstance(x, int) for x in (*size, patch)) or size not in vits:
        return None
    if kind == "vit":
        # timm's LayerNorm adds 1e-6 to the variance, as torchvision's does.
        return f"timm/vit_{vits[size]}_patch{patch}_224"
    return f"timm/vit_{vits[size]}_patch{patch}_dinov2" if kind == "dinov2" else None


def _three(values: Any) -> tuple[float, ...] | None:
    good = isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(x, int | float) for x in values)
    return tuple(map(float, values)) if good else None


def _side(*values: Any) -> int | None:
    for value in values:
        side = value[-1] if isinstance(value, list) and value else value
        if isinstance(side, int) and 0 < side <= 4096:
            return side
    return None


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return {printable(name): x for name, x in load_file(path).items() if len(name) <= LONGEST_NAME}, metadata
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file: {_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# torch


def _read_torch(path: Path) -> dict[str, Tensor]:
    _check_container(path)
    try:
        content = _load(path)
    except CheckpointError:
        raise
    except Exception as error:
        if "Weights only load failed" in str(error) or "weights_only" in str(error):
            raise CheckpointError(f"{path}: {refusal(path, str(error))}") from None
        raise CheckpointError(f"{path}: is no whole file of torch ({type(error).__name__}: {_line(error)})") from None
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} and no state dict")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flat(content):
        if len(tensors) >= MAX_TENSORS:
            raise CheckpointError(f"{path}: holds more than {MAX_TENSORS:,} tensors")
        if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_quantized:
            continue  # nothing that could be copied into a network
        if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 1 << 12):
            raise CheckpointError(f"{path}: {name} claims to be larger than what the file holds of it")
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


def _load(path: Path) -> Any:
    """Mapped, where the file's format allows it: of an optimiser's state, which nobody looks at, nothing is read."""
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_container(path: Path) -> None:
    """torch.save compresses nothing: what does may grow without limit."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(24)
        if start[:1] != _PICKLE:  # a page of HTML, a pointer of Git LFS, half a download
            raise CheckpointError(f"{path}: is no whole file of torch: it begins with {start!r}")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: is a compressed archive, not what torch.save writes; unpack it")
    if any(entry.filename.endswith(("constants.pkl", "/code/__torch__.py")) for entry in entries):
        raise CheckpointError(f"{path}: is a TorchScript program, which would have to be run; save its state_dict()")


def _flat(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted name, however the writer has nested them."""
    if depth > MAX_DEPTH:
        return
    for key, value in content.items():
        name = printable(f"{prefix}{key}")
        if len(name) > LONGEST_NAME:
            continue
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}.", depth + 1)
        elif isinstance(value, list | tuple):
            yield from _flat(dict(enumerate(value)), f"{name}.", depth + 1)


def refusal(path: Path, reason: str) -> str:
    """What weights_only has refused, and how the file can be converted where it is trusted."""
    found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", reason)
    what = found[1] if found else "something else than tensors"
    out = path.with_suffix(".safe.pth")
    # repr: whatever the name holds, it ends no string of the recipe.
    return (
        f"holds {what} beside its weights, and reading that would run code from the file: refused. If you trust who "
        "made it, convert it where no harm can be done:\n"
        f"{conversion_recipe(path, out)}\n"
        f"and give model.weights={out}"
    )


def conversion_recipe(path: Path, out: Path) -> str:
    """Lines of Python that keep the tensors of a file alone."""
    return (
        "    import torch\n"
        "    def tensors(x):\n"
        '        x = x.state_dict() if hasattr(x, "state_dict") else x\n'
        "        return {str(k): tensors(v) for k, v in x.items() if torch.is_tensor(v) or "
        'hasattr(v, "items") or hasattr(v, "state_dict")} if hasattr(x, "items") else x\n'
        f'    torch.save(tensors(torch.load({str(path)!r}, map_location="cpu", weights_only={False})), {str(out)!r})'
    )


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:200])


def _sha256(files: list[Path]) -> str:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
