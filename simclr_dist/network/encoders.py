"""Encoders by name: torchvision's networks, timm's as `timm/NAME`, `resnet_small`, and your own. Images in, h out.

h is what the network's own class layer would have seen: pooled features of a ResNet, the normalised pooled features of
a ConvNeXt, the class token of a ViT. Parameters keep their library's names, so that exporting is a matter of copying.
Weights are always drawn afresh: nothing is downloaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from simclr_dist.config import ModelConfig
from simclr_dist.errors import ConfigError

TIMM = "timm/"
RESNETS: dict[str, Callable[..., ResNet]] = {
    name: partial(getattr(torchvision.models, name), zero_init_residual=True)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
}
NUM_CLASSES = 1000  # torchvision's default
Build = Callable[[ModelConfig], tuple[nn.Module, int]]
_REGISTERED: dict[str, Build] = {}
# They give several outputs while they train, which no projection head understands.
_AUXILIARY = frozenset({"googlenet", "inception_v3"})


def build_encoder(config: ModelConfig) -> tuple[nn.Module, int]:
    """The freshly initialised encoder and D, the width of its h. Raises ConfigError."""
    if config.encoder in _REGISTERED:
        return _REGISTERED[config.encoder](config)
    if config.encoder == "resnet_small":
        small = SmallResNet(config.width, stride=1 if config.stem == "cifar" else 2)
        return small, small.feature_dim
    if config.stem == "cifar" and config.encoder not in RESNETS:
        raise ConfigError([f"model.stem: cifar is a ResNet's; {config.encoder} takes `stem: imagenet`"])
    if config.encoder.startswith(TIMM):
        return _timm_encoder(config.encoder.removeprefix(TIMM), config.image_size)
    network = torchvision_network(config)
    return network, take_off_class_layer(network)


def register(name: str, build: Build) -> None:
    """Makes `model.encoder: NAME` mean what build(config.model) gives: images [n, 3, S, S] to h [n, D], and D.

    For a script that then trains or evaluates (docs/guides/extending.md). A configuration cannot name code itself:
    it may come from somebody else. Raises ValueError for a name that means something already.
    """
    if name in ("resnet_small", *torchvision_names()) or name.startswith(TIMM):
        raise ValueError(f"encoder {name!r} is taken; choose another name")
    _REGISTERED[name] = build


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


@cache
def torchvision_names() -> tuple[str, ...]:
    """Of its networks that can be encoders."""
    return tuple(sorted(set(torchvision.models.list_models(module=torchvision.models)) - _AUXILIARY))


def torchvision_network(config: ModelConfig) -> nn.Module:
    """The network as torchvision builds it, class layer included, with the configured stem. Raises ConfigError."""
    if config.encoder not in torchvision_names():
        raise ConfigError([f"model.encoder: unknown encoder {config.encoder!r}{_near(config.encoder)}"])
    with _SizeIsSaid(config.encoder, config.image_size):
        if config.encoder not in RESNETS:
            build = getattr(torchvision.models, config.encoder)
            return build(**torchvision_options(config))
    network = RESNETS[config.encoder]()
    if config.stem == "cifar":  # Chen et al. 2020, appendix B.9
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()  # type: ignore[assignment]
    return network


def torchvision_options(config: ModelConfig) -> dict[str, Any]:
    """What torchvision's constructor is told: a ViT has one position for each patch of the image."""
    sized = config.encoder.startswith("vit_") and config.image_size is not None
    return {"image_size": config.image_size} if sized else {}


def class_layer(network: nn.Module) -> str:
    """Name of the layer that gives one score a class, torchvision's last. Raises ConfigError if it is not linear."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != NUM_CLASSES:
        kind = type(network).__name__
        raise ConfigError([f"model.encoder: {kind} has no linear class layer whose input could be h; take another"])
    return linear[-1]


def take_off_class_layer(network: nn.Module) -> int:
    """Makes the network give h, the input of its class layer, without that layer's dropout. Returns D."""
    name = class_layer(network)
    width = network.get_submodule(name).in_features
    parent, _, leaf = name.rpartition(".")
    siblings = network.get_submodule(parent)
    setattr(siblings, leaf, nn.Identity())
    if isinstance(siblings, nn.Sequential) and leaf.isdigit() and int(leaf) > 0:
        before = int(leaf) - 1
        if isinstance(siblings[before], nn.Dropout):
            siblings[before] = nn.Identity()
    return int(width)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _timm_encoder(name: str, image_size: int | None) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError:
        raise ConfigError([f"model.encoder: {TIMM}{name} needs timm: pip install 'simclr-dist[timm]'"]) from None
    # Only names that timm lists: it would take others for addresses to download from.
    if name not in timm.list_models():
        raise ConfigError([f"model.encoder: unknown encoder {TIMM + name!r}{_near(TIMM + name)}"])
    known = timm.get_pretrained_cfg(name)
    sized = known is not None and known.fixed_input_size and image_size is not None
    options: dict[str, Any] = {"img_size": image_size} if sized else {}
    with _SizeIsSaid(TIMM + name, image_size):
        network = timm.create_model(name, num_classes=0, **options)
    return network, int(network.head_hidden_size)  # type: ignore[arg-type]


class _SizeIsSaid:
    """Turns a library's complaint about the image size into one for the person who chose it."""

    def __init__(self, name: str, image_size: int | None) -> None:
        self.name, self.image_size = name, image_size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (AssertionError, ValueError, TypeError)):
            raise ConfigError(
                [f"model.encoder: {self.name} cannot be built for images of {self.image_size} px: {error}"]
            ) from error


def _near(name: str) -> str:
    """The rest of a message about a name that is not known."""
    known = ["resnet_small", *_REGISTERED, *torchvision_names()]
    if name.startswith(TIMM):
        import timm

        known = [TIMM + other for other in timm.list_models()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"{hint} Known are resnet_small, torchvision's classification networks (resnet50, convnext_tiny, vit_b_16, …) "
        "and timm's as timm/NAME"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ours


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
