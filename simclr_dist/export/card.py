"""The model card of an exported encoder: what it is, how well it does, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import yaml

from simclr_dist import __version__
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import ModelConfig, render_config
from simclr_dist.network.encoders import (
    NUM_CLASSES,
    TIMM,
    class_layer,
    torchvision_names,
    torchvision_network,
    torchvision_options,
)
from simclr_dist.safe_text import markdown_cell, mask, printable
from simclr_dist.views.augment import MEAN, STD


def instructions(
    config: ModelConfig, image_size: int, feature_dim: int, format: str, file: str
) -> tuple[str, tuple[str, ...]]:
    """The Python lines that load the file, and notes."""
    if format == "onnx":
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession({json.dumps(file)}, providers=["CPUExecutionProvider"])',
            f"images = np.zeros((1, 3, {image_size}, {image_size}), np.float32)  # normalised as above",
            '(h,) = session.run(["h"], {"images": images})',
        ]
        return "\n".join(lines), ()
    if format == "safetensors":
        lines = [
            "from simclr_dist.export import load_encoder",
            "",
            f"encoder, feature_dim = load_encoder({json.dumps(file)})",
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
    lines += [f"model.load_state_dict(torch.load({json.dumps(file)}, weights_only=True), strict=True)"]
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
    trained = (
        f"| Trained on | {markdown_cell(config.data.train)} (fingerprint {markdown_cell(checkpoint.fingerprint)}) |\n"
        f"| Training | {epochs}; global batch {config.train.global_batch_size}, {config.data.num_views} views, "
        f"temperature {_temperature(checkpoint)} |\n"
    )
    introduction = _METHOD[config.loss.kind]
    if not checkpoint.of_run:
        introduction, trained = "An image encoder that others have trained; its weights as they came.", ""
    figures = "\n".join(f"| {markdown_cell(name)} | {100 * value:.2f} % |" for name, value in accuracy.items())
    table = f"| Evaluation | Result |\n|---|---|\n{figures}" if figures else "Not measured before the export."
    settings = mask(printable(render_config(config).rstrip(), keep="\n"))
    return f"""---
license: {_yaml_text(license)}
library_name: simclr_dist
tags: [simclr, self-supervised, image-feature-extraction]
---

# {markdown_cell(config.name)}

{introduction}

| | |
|---|---|
| Encoder | {markdown_cell(config.model.encoder)}, {config.model.stem} stem, h of width {feature_dim} |
{trained}{_origin(checkpoint)}| Input | RGB, {config.data.image_size} px, scaled to 0..1, then (x - mean) / std |
| Mean, std | {", ".join(map(str, MEAN))}; {", ".join(map(str, STD))} |
| Licence | {markdown_cell(license)} |
| Written by | simclr_dist {__version__} from {checkpoint.path.name} |

## Accuracy

{table}

## Loading

{_fenced("python", load_with)}

{"".join(f"{note}{chr(10)}" for note in notes)}
## Configuration

{_fenced("yaml", settings)}
"""


_METHOD = {
    "nt_xent": "An image encoder trained without labels by SimCLR (Chen et al. 2020).",
    "dcl": "An image encoder trained without labels by SimCLR (Chen et al. 2020) with the decoupled loss (Yeh et al. "
    "2022).",
    "supcon": "An image encoder trained with labels by supervised contrastive learning (Khosla et al. 2020).",
}


def _temperature(checkpoint: Checkpoint) -> str:
    learnt = checkpoint.model_state.get("loss.log_temperature")
    if learnt is None:
        return f"{checkpoint.config.loss.temperature:g}"
    return f"{float(learnt.exp()):.4g}, learnt from {checkpoint.config.loss.temperature:g}"


def _origin(checkpoint: Checkpoint) -> str:
    """The row about the weights that the training began with, or that these are."""
    origin = checkpoint.started_from
    if origin is None:
        return ""
    share = origin.get("share")
    how_much = f", {100 * share:.1f} % of the encoder" if isinstance(share, int | float) else ""
    known = f"{origin.get('weights')} (sha256 {origin.get('sha256')}{how_much})"
    return f"| {'Began with' if checkpoint.of_run else 'Weights'} | {markdown_cell(known)} |\n"


def _yaml_text(text: str) -> str:
    """Text from outside as one YAML value; as it is where YAML takes it for text."""
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*", text) and isinstance(yaml.safe_load(text), str)
    return text if is_plain else json.dumps(mask(printable(text)))


def _fenced(language: str, text: str) -> str:
    """A block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
