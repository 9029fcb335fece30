"""The model card of an exported encoder: what it is, how well it does, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

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
            f'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
            f"images = np.zeros((1, 3, {image_size}, {image_size}), np.float32)  # normalised as above",
            '(h,) = session.run(["h"], {"images": images})',
        ]
        return "\n".join(lines), ()
    if format == "safetensors":
        lines = [
            "from simclr_dist.export import load_encoder",
            "",
            f'encoder, feature_dim = load_encoder("{file}")',
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
