"""Encoders by name: torchvision's networks, timm's as `timm/NAME`, our own, and yours. Images in, h out; of
`transformer_small`, `gated_cnn` and `hf/FOLDER` (hugging_face.py), tokens in.

h is the input of the network's own class layer: pooled features of a ResNet, the normalised pooled features of a
ConvNeXt, the class token of a ViT. Parameters keep their library's names, so that an export only copies them. Weights
are freshly initialised here; `model.weights` replaces them (weights.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from simclr_dist.config import HUGGING_FACE, OURS_OF_TOKENS, ModelConfig
from simclr_dist.errors import ConfigError
from simclr_dist.network.gated_cnn import gated_cnn
from simclr_dist.network.transformer import transformer_small

TIMM = "timm/"
OURS = "resnet_small", *OURS_OF_TOKENS
RESNETS: dict[str, Callable[..., ResNet]] = {
    name: getattr(torchvision.models, name)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
}
NUM_CLASSES = 1000  # torchvision's default
Build = Callable[[ModelConfig], tuple[nn.Module, int]]
_REGISTERED: dict[str, Build] = {}
# These return several outputs in training mode, which a projection head cannot take.
_AUXILIARY = frozenset({"googlenet", "inception_v3"})


def build_encoder(config: ModelConfig) -> tuple[nn.Module, int]:
    """The freshly initialised encoder and D, the width of its h. Raises ConfigError."""
    if config.encoder in _REGISTERED:
        return _REGISTERED[config.encoder](config)
    if config.encoder == "resnet_small":
        small = SmallResNet(config.width, stride=1 if config.stem == "cifar" else 2, channels=config.channels)
        return small, small.feature_dim
    if config.encoder == "transformer_small":
        return transformer_small(config)
    if config.encoder == "gated_cnn":
        return gated_cnn(config)
    if config.stem == "cifar" and config.encoder not in RESNETS:
        raise ConfigError([f"model.stem: cifar is for ResNets only; {config.encoder} takes `stem: imagenet`"])
    if not config.zero_init_residual and config.encoder not in RESNETS:
        raise ConfigError([f"model.zero_init_residual: false is for torchvision's ResNets, not for {config.encoder}"])
    if config.encoder.startswith(TIMM):
        return _timm_encoder(config.encoder.removeprefix(TIMM), config.image_size, config.channels)
    if config.encoder.startswith(HUGGING_FACE):
        from simclr_dist.network.hugging_face import hugging_face_encoder  # transformers takes seconds

        return hugging_face_encoder(config)
    network = torchvision_network(config)
    return network, remove_class_layer(network)


def is_from_library(name: str) -> bool:
    """Whether `name` is torchvision's, timm's or ours, and so the same network in every program."""
    return name in OURS or name.startswith(TIMM) or name in torchvision_names()


def register(name: str, build: Build) -> None:
    """Makes `model.encoder: NAME` use build(config.model), which returns a network and D.

    The network takes images [n, config.channels, S, S] to h [n, D]. For a script that then trains or evaluates
    (docs/guides/extending.md); a configuration cannot name code itself, because it may come from somebody else.
    Raises ValueError for a name that is taken.
    """
    if name in (*OURS, *torchvision_names()) or name.startswith((TIMM, HUGGING_FACE)):
        raise ValueError(f"encoder {name!r} is taken; choose another name")
    _REGISTERED[name] = build


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


@cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's networks that can be encoders."""
    return tuple(sorted(set(torchvision.models.list_models(module=torchvision.models)) - _AUXILIARY))


def torchvision_network(config: ModelConfig) -> nn.Module:
    """The network as torchvision builds it, class layer included, with the configured stem. Raises ConfigError."""
    if config.encoder not in torchvision_names():
        raise ConfigError([f"model.encoder: unknown encoder {config.encoder!r}{_suggestions(config.encoder)}"])
    with explain_size_error(config.encoder, config.image_size):
        if config.encoder not in RESNETS:
            build = getattr(torchvision.models, config.encoder)
            return take_channels(build(**torchvision_options(config)), config.channels)
    network = RESNETS[config.encoder](zero_init_residual=config.zero_init_residual)
    if config.stem == "cifar":  # Chen et al. 2020, appendix B.9
        network.conv1 = nn.Conv2d(config.channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()  # type: ignore[assignment]
        return network
    return take_channels(network, config.channels)


def first_convolution_of(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The name and the convolution that sees the pixels. Raises ConfigError where there is none."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ConfigError([f"model.encoder: {type(network).__name__} has no convolution that could take other channels"])


def take_channels(network: nn.Module, channels: int) -> nn.Module:
    """The network with a first convolution for so many channels, random as the one for three was.

    The deviation of the new weights makes a filter's answer to independent channels as large as before.
    """
    name, before = first_convolution_of(network)
    if channels == before.in_channels:
        return network
    options = (before.out_channels, before.kernel_size, before.stride, before.padding, before.dilation, before.groups)
    now = nn.Conv2d(channels, *options, before.bias is not None, before.padding_mode)  # type: ignore[arg-type]
    with torch.no_grad():
        spread = before.weight.std() * (before.in_channels / channels) ** 0.5
        now.weight.copy_(torch.randn_like(now.weight) * spread)
        if before.bias is not None and now.bias is not None:
            now.bias.copy_(before.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, now)
    return network


def torchvision_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments for torchvision's constructor: a ViT has one position for each patch of the image."""
    sized = config.encoder.startswith("vit_") and config.image_size is not None
    return {"image_size": config.image_size} if sized else {}


def class_layer(network: nn.Module) -> str:
    """Name of the last layer, with one score per class. Raises ConfigError if it is not linear."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != NUM_CLASSES:
        kind = type(network).__name__
        raise ConfigError([f"model.encoder: {kind} has no linear class layer whose input could be h; take another"])
    return linear[-1]


def remove_class_layer(network: nn.Module) -> int:
    """Makes the network return h, the input of its class layer, without that layer's dropout. Returns D."""
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


def _timm_encoder(name: str, image_size: int | None, channels: int) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError:
        raise ConfigError([f"model.encoder: {TIMM}{name} needs timm: pip install 'simclr-dist[timm]'"]) from None
    # Only names that timm lists: it takes other names for addresses to download from.
    if name not in timm.list_models():
        raise ConfigError([f"model.encoder: unknown encoder {TIMM + name!r}{_suggestions(TIMM + name)}"])
    network = timm_network(name, image_size, pretrained=False, channels=channels)
    return network, int(network.head_hidden_size)  # type: ignore[arg-type]


def timm_network(name: str, image_size: int | None, *, pretrained: bool, channels: int = 3) -> nn.Module:
    """Without its class layer. pretrained: with the weights that timm publishes, which it may have to download."""
    import timm

    known = timm.get_pretrained_cfg(name)
    sized = known is not None and known.fixed_input_size and image_size is not None
    options: dict[str, Any] = {"img_size": image_size} if sized else {}
    options |= {"in_chans": channels} if channels != 3 else {}
    with explain_size_error(TIMM + name, image_size):
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)


@contextmanager
def explain_size_error(name: str, image_size: int | None) -> Iterator[None]:
    """Turns a library's error about the image size into a ConfigError that names the encoder and the size."""
    try:
        yield
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError([f"model.encoder: {name} cannot be built for images of {image_size} px: {error}"]) from error


def _suggestions(name: str) -> str:
    """The end of a message about an unknown name: similar names, and which are known."""
    known = [*OURS, *_REGISTERED, *torchvision_names()]
    if name.startswith(TIMM):
        import timm

        known = [TIMM + other for other in timm.list_models()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"{hint} Known are {', '.join(OURS)}, "
        "torchvision's classification networks (resnet50, convnext_tiny, vit_b_16, …) and "
        "timm's as timm/NAME"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Our own


class SmallResNet(nn.Module):
    """Three residual blocks of widths w, 2w, 4w; D = 4w. For small images on CPUs.

    stride: of the first convolution; 2 costs a quarter of 1, and on a CPU more images help more than more pixels.
    """

    def __init__(self, width: int, stride: int, channels: int = 3) -> None:
        super().__init__()
        self.feature_dim = 4 * width
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, stride=2, downsample=_shortcut(width, 2 * width))
        self.layer3 = BasicBlock(2 * width, 4 * width, stride=2, downsample=_shortcut(2 * width, 4 * width))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.permute(0, 2, 3, 1).mean((1, 2))  # AdaptiveAvgPool2d's gradient would lose channels_last


class _PointwiseStride2(nn.Conv2d):
    """A 1x1 convolution with stride 2, computed with stride 1 on every other pixel: the same products and sums.

    oneDNN's own strided kernel writes past its workspace when it computes the gradient of a weight with fewer than 8
    input channels (16 with AVX-512): https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.6 to 2.15.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        every_other = F.avg_pool2d(images, kernel_size=1, stride=2)  # a slice's gradient would lose channels_last
        return F.conv2d(every_other, self.weight)


def _shortcut(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_PointwiseStride2(channels, out_channels), nn.BatchNorm2d(out_channels))
