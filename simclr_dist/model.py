"""The network of SimCLR (Chen et al. 2020, section 2): an encoder f yields h, a projection head g yields z.

Encoders are torchvision's, with torchvision's parameter names, so that exporting is a matter of copying.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from simclr_dist.config import ConfigError, ModelConfig

RESNETS: dict[str, Callable[..., ResNet]] = {
    name: partial(getattr(torchvision.models, name), zero_init_residual=True)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
}


class SimCLR(nn.Module):
    """Images [n, 3, H, W] to h [n, D], the representation, and z [n, K], what the loss compares (not normalised)."""

    def __init__(self, encoder: nn.Module, projection_head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = projection_head
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(images)
        return h, self.projection_head(h)


def build_model(config: ModelConfig) -> SimCLR:
    """The freshly initialised network that `config` names. Raises ConfigError for an unknown encoder."""
    encoder, feature_dim = build_encoder(config)
    head = build_projection_head(
        feature_dim,
        config.head_hidden_dim or feature_dim,
        config.head_out_dim,
        layers=config.head_layers,
        batch_norm=config.head_batch_norm,
    )
    return SimCLR(encoder, head, feature_dim)


def build_encoder(config: ModelConfig) -> tuple[nn.Module, int]:
    """The encoder and D, the width of its h."""
    if config.encoder == "resnet_small":
        small = SmallResNet(config.width, stride=1 if config.stem == "cifar" else 2)
        return small, small.feature_dim
    if config.encoder not in RESNETS:
        known = ", ".join([*RESNETS, "resnet_small"])
        raise ConfigError([f"model.encoder: unknown encoder {config.encoder!r}; known: {known}"])
    encoder = RESNETS[config.encoder]()
    feature_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()  # type: ignore[assignment]
    if config.stem == "cifar":  # Chen et al. 2020, appendix B.9
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()  # type: ignore[assignment]
    return encoder, feature_dim


class SmallResNet(nn.Module):
    """Three residual blocks of widths w, 2w, 4w; D = 4w. For small pictures on CPUs.

    stride: of the first convolution; 2 costs a quarter of 1, and on a CPU more images beat more pixels.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.feature_dim = 4 * width
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, stride=2, downsample=_shortcut(width, 2 * width))
        self.layer3 = BasicBlock(2 * width, 4 * width, stride=2, downsample=_shortcut(2 * width, 4 * width))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.avgpool(x).flatten(1)


def _shortcut(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels))


def build_projection_head(in_dim: int, hidden_dim: int, out_dim: int, *, layers: int, batch_norm: str) -> nn.Sequential:
    """g: `layers` linear maps with ReLU between (2: SimCLR v1, section 4.2; 3: SimCLR v2, arXiv 2006.10029 section 3).

    batch_norm: "all" also normalises z, as the authors' code does; "hidden" leaves z alone; "none" has biases instead.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, layers + 1):
        last = i == layers
        normalised = batch_norm == "all" or (batch_norm == "hidden" and not last)
        width = out_dim if last else hidden_dim
        parts[f"linear{i}"] = nn.Linear(in_dim, width, bias=not normalised)
        if normalised:
            parts[f"bn{i}"] = nn.BatchNorm1d(width)
        if not last:
            parts[f"relu{i}"] = nn.ReLU(inplace=True)
        in_dim = width
    return nn.Sequential(parts)
