"""The trained encoder as a file that others can load, checked before it gets its name.

torchvision   a plain state dict (torch.save), for `torchvision.models.<encoder>().load_state_dict(..., strict=True)`.
              The encoder has no classifier, so the class layer is filled with zeros: replace it, or train it.
safetensors   the encoder's weights under its library's names, without the class layer; configuration, step,
              normalisation and licence travel in the file's metadata.
onnx          the encoder as a graph for onnxruntime and others: float32 `images` [n, 3, S, S], normalised, to `h`
              [n, D]; n is free. The same metadata. Needs the extra `export`.

Each gets a model card (Markdown) beside it. Before a file is renamed into place it is read back into a network built
from scratch, whose outputs must be those of the encoder in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_dist import __version__
from simclr_dist.atomic import replaces
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.config import Config, ModelConfig, render_config
from simclr_dist.errors import ExportError
from simclr_dist.network.encoders import (
    NUM_CLASSES,
    TIMM,
    build_encoder,
    class_layer,
    remove_class_layer,
    torchvision_names,
    torchvision_network,
    torchvision_options,
)
from simclr_dist.views.augment import MEAN, STD

Format = Literal["torchvision", "safetensors", "onnx"]


@dataclass(frozen=True)
class Exported:
    """path, its card, the Python lines that load it, and what a user has to know."""

    path: Path
    card: Path
    load_with: str
    notes: tuple[str, ...]


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: Format = "torchvision",
    license: str = "unspecified",
    accuracy: Mapping[str, float] | None = None,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the encoder of a run or checkpoint to `out`, and its card to `out` + ".md".

    accuracy: measured figures for the card, e.g. {"kNN top-1": 0.83}; shares between 0 and 1.
    Raises CheckpointError: no valid checkpoint. ExportError: `out` or its card exists, or the format does not know the
    encoder. RuntimeError: the self-check failed; nothing was written.
    """
    out = Path(out)
    card = out.with_name(out.name + ".md")
    if not overwrite:
        for path in (out, card):
            if path.exists():
                raise ExportError(f"{path} exists; choose another name with --out, or --overwrite it")
    model, checkpoint = load_pretrained(source, warn)
    writers: dict[Format, Callable[..., Callable[[Tensor], Tensor]]]
    writers = {"torchvision": _write_torchvision, "safetensors": _write_safetensors, "onnx": _write_onnx}
    with replaces(out) as temporary:
        read_back = writers[format](model.encoder, model.feature_dim, checkpoint, license, temporary)
        check_same_outputs(model.encoder, read_back, checkpoint.config.data.image_size)
    load_with, notes = _instructions(
        checkpoint.config.model, checkpoint.config.data.image_size, model.feature_dim, format, out.name
    )
    with replaces(card) as temporary:
        temporary.write_text(
            render_card(checkpoint, model.feature_dim, load_with, notes, license, accuracy or {}), encoding="utf-8"
        )
    return Exported(out, card, load_with, notes)


@torch.no_grad()
def check_same_outputs(encoder: nn.Module, read_back: Callable[[Tensor], Tensor], image_size: int) -> None:
    """RuntimeError unless both give the same h [n, D] for fixed random images, at float32 accuracy."""
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    expected, found = encoder(images), read_back(images)
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"self-check failed: the exported encoder differs by {difference:g}; nothing was written")


# ---------------------------------------------------------------------------------------------------------------------
# Formats: each writes, and gives the encoder read back from the file


def _write_torchvision(
    encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path
) -> nn.Module:
    config = checkpoint.config.model
    if config.encoder not in torchvision_names():
        raise ExportError(
            f"{checkpoint.path}: its encoder {config.encoder} is none of torchvision's; use --format safetensors"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    found = torchvision_network(config)
    name = class_layer(found)
    state |= {f"{name}.{key}": torch.zeros_like(value) for key, value in found.get_submodule(name).state_dict().items()}
    torch.save(state, path)
    found.load_state_dict(torch.load(path, weights_only=True), strict=True)
    remove_class_layer(found)
    return found.eval()


def _write_safetensors(
    encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path
) -> nn.Module:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, path, metadata(checkpoint, feature_dim, license))
    with safe_open(path, framework="pt") as file:
        config = Config.model_validate_json(file.metadata()["config"])
    found, _ = build_encoder(config.model)
    found.load_state_dict(load_file(path), strict=True)
    return found.eval()


def _write_onnx(
    encoder: nn.Module, feature_dim: int, checkpoint: Checkpoint, license: str, path: Path
) -> Callable[[Tensor], Tensor]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch writes ONNX with it
    except ImportError as error:
        raise ExportError(f"--format onnx needs {error.name}: pip install 'simclr-dist[export]'") from None
    S = checkpoint.config.data.image_size
    program = torch.onnx.export(
        encoder,
        (torch.zeros(2, 3, S, S),),
        input_names=["images"],
        output_names=["h"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto
    onnx.helper.set_model_props(graph, metadata(checkpoint, feature_dim, license))
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def read_back(images: Tensor) -> Tensor:
        # One image, then the others: the number of images must really be free.
        parts = [session.run(["h"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
        return torch.cat([torch.from_numpy(part) for part in parts])

    return read_back


def metadata(checkpoint: Checkpoint, feature_dim: int, license: str) -> dict[str, str]:
    """What travels with the weights; safetensors and ONNX take text only."""
    return {
        "format": "pt",
        "producer": f"simclr_dist {__version__}",
        "config": checkpoint.config.model_dump_json(),
        "encoder": checkpoint.config.model.encoder,
        "stem": checkpoint.config.model.stem,
        "feature_dim": str(feature_dim),
        "image_size": str(checkpoint.config.data.image_size),
        "mean": " ".join(map(str, MEAN)),
        "std": " ".join(map(str, STD)),
        "step": str(checkpoint.step),
        "samples_seen": str(checkpoint.samples_seen),
        "data_fingerprint": checkpoint.fingerprint,
        "license": license,
    }


# ---------------------------------------------------------------------------------------------------------------------
# For people


def _instructions(
    config: ModelConfig, image_size: int, feature_dim: int, format: Format, file: str
) -> tuple[str, tuple[str, ...]]:
    """The lines that load the file, and notes."""
    if format == "onnx":
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
            f"images = np.zeros((1, 3, {image_size}, {image_size}), np.float32)  # normalised as above",
            '(h,) = session.run(["h"], {"images": images})',
        ]
        return "\n".join(lines), ()
    if format == "safetensors":
        lines = [
            "from safetensors import safe_open",
            "from safetensors.torch import load_file",
            "from simclr_dist.config import Config",
            "from simclr_dist.network.encoders import build_encoder",
            "",
            f'with safe_open("{file}", framework="pt") as file:',
            '    config = Config.model_validate_json(file.metadata()["config"])',
            "encoder, feature_dim = build_encoder(config.model)",
            f'encoder.load_state_dict(load_file("{file}"), strict=True)',
        ]
        notes = []
        if config.encoder in torchvision_names():
            notes = ["The names are torchvision's, without the class layer."]
        elif config.encoder.startswith(TIMM):
            notes = ["The names are timm's, for num_classes=0."]
        return "\n".join(lines), tuple(notes)
    name = class_layer(torchvision_network(config))
    place = "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
    options = ", ".join(f"{key}={value}" for key, value in torchvision_options(config).items())
    lines = ["import torch", "import torchvision", "", f"model = torchvision.models.{config.encoder}({options})"]
    notes = [
        f"{name} was not trained: it is all zeros ({NUM_CLASSES} classes), there so that strict=True holds. Replace it."
    ]
    if config.stem == "cifar":
        lines += ["model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)"]
        lines += ["model.maxpool = torch.nn.Identity()"]
        notes += [f"The stem is CIFAR's: a plain {config.encoder} takes the weights only after these two changes."]
    lines += [f'model.load_state_dict(torch.load("{file}", weights_only=True), strict=True)']
    lines += [
        f"{place} = torch.nn.Identity()  # h [n, {feature_dim}]; or a torch.nn.Linear({feature_dim}, ...) to train"
    ]
    return "\n".join(lines), tuple(notes)


def render_card(
    checkpoint: Checkpoint,
    feature_dim: int,
    load_with: str,
    notes: tuple[str, ...],
    license: str,
    accuracy: Mapping[str, float],
) -> str:
    """The model card: Markdown with the front matter that model hubs read."""
    config = checkpoint.config
    epochs = f"{config.train.epochs} epochs planned, {checkpoint.step} steps and {checkpoint.samples_seen} samples seen"
    figures = "\n".join(f"| {name} | {100 * value:.2f} % |" for name, value in accuracy.items())
    table = f"| Evaluation | Result |\n|---|---|\n{figures}" if figures else "Not measured before the export."
    return f"""---
license: {license}
library_name: simclr_dist
tags: [simclr, self-supervised, image-feature-extraction]
---

# {config.name}

An image encoder trained without labels by SimCLR (Chen et al. 2020).

| | |
|---|---|
| Encoder | {config.model.encoder}, {config.model.stem} stem, h of width {feature_dim} |
| Trained on | {config.data.train} (fingerprint {checkpoint.fingerprint}) |
| Training | {epochs}; global batch {config.train.global_batch_size}, temperature {config.loss.temperature:g} |
| Input | RGB, {config.data.image_size} px, scaled to 0..1, then (x - mean) / std |
| Mean, std | {", ".join(map(str, MEAN))}; {", ".join(map(str, STD))} |
| Licence | {license} |
| Written by | simclr_dist {__version__} from {checkpoint.path.name} |

## Accuracy

{table}

## Loading

```python
{load_with}
```

{"".join(f"{note}{chr(10)}" for note in notes)}
## Configuration

```yaml
{render_config(config).rstrip()}
```
"""
