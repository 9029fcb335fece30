"""The network of SimCLR (Chen et al. 2020, section 2): an encoder f yields h, a projection head g yields z.

Encoders are built in encoders.py; the head is a small perceptron. Of images with texts there are two of each.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import ModelConfig
from simclr_dist.network.encoders import build_encoder
from simclr_dist.network.first_layer import first_convolution
from simclr_dist.network.keyed_dropout import Draws


class SimCLR(nn.Module):
    """Images [n, C, H, W] to h [n, D], the representation, and z [n, K], what the loss compares (not normalised)."""

    def __init__(self, encoder: nn.Module, projection_head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = projection_head
        self.feature_dim = feature_dim
        self.draws: Draws | None = None

    def draw_by(self, draws: Draws) -> None:
        """From now on modules of this network draw by key (random_layers.py)."""
        self.draws = draws
        self.register_buffer("layer_hashes", draws.hashes(), persistent=False)  # to be where the network is

    def forward(self, images: Tensor, row_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """row_keys: int32 [n, 2], what dropout and its like draw from (`draw_keys`). None: from torch's generator."""
        if self.draws is not None:
            self.draws.begin(row_keys, self.get_buffer("layer_hashes"))
        h = self.encoder(images)
        z = self.projection_head(h)
        if self.draws is not None:
            self.draws.end()
        return h, z


class TwoTowers(SimCLR):
    """Images and texts: an encoder and a head for each, as in CLIP (Radford et al. 2021, arXiv:2103.00020).

    One module, which DDP wraps as any other. The names of the images' parameters are those of a network of images
    alone, so that evaluations, weights and exports of `encoder` need not know of the texts; theirs begin with "text.".
    """

    def __init__(self, images: SimCLR, text: SimCLR, image_size: int, channels: int = 3) -> None:
        super().__init__(images.encoder, images.projection_head, max(images.feature_dim, text.feature_dim))
        self.text = text
        self.width_of_images = images.feature_dim
        self.image_shape = image_size, image_size, channels

    def of_images(self) -> SimCLR:
        """Encoder and head of the images, the same modules."""
        return SimCLR(self.encoder, self.projection_head, self.width_of_images)

    def draw_by(self, draws: Draws) -> None:
        super().draw_by(draws)
        for layer in draws.layers:
            layer.part = int(layer.name.startswith("text.")), 2

    def forward(self, rows: Tensor, row_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """rows [2n, L] of `pack_pairs`, the images and then their texts, to h [2n, D] and z [2n, K].

        D is that of the wider encoder; the other's h ends with zeros. row_keys: int32 [2n, 2].
        """
        images, tokens = unpack_pairs(rows, self.image_shape)
        if self.draws is not None:
            self.draws.begin(row_keys, self.get_buffer("layer_hashes"))
        both = [self.encoder(images), self.text.encoder(tokens)]
        z = torch.cat([self.projection_head(both[0]), self.text.projection_head(both[1])])
        if self.draws is not None:
            self.draws.end()
        return torch.cat([F.pad(h, (0, self.feature_dim - h.shape[1])) for h in both]), z


def pack_pairs(images: Tensor, tokens: Tensor) -> Tensor:
    """Images float [n, C, S, S] and texts int64 [n, T] as rows of one width, float [2, n, C*S*S + T].

    So a pair is two views like any others to whatever cuts, sends or counts them. Numbers of tokens below 2**24 are
    exact in float32. Memory: an image's once more, a hundredth of what a ResNet keeps of it.
    """
    rows = images.permute(0, 2, 3, 1).flatten(1)
    T = tokens.shape[1]
    return torch.stack([F.pad(rows, (0, T)), F.pad(tokens.to(rows.dtype), (rows.shape[1], 0))])


def unpack_pairs(rows: Tensor, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Of `pack_pairs`, flattened to [2n, L]: images float [n, C, S, S], channels last, and texts int64 [n, T].

    image_shape: S, S, C.
    """
    first, second = rows.unflatten(0, (2, -1))
    width = math.prod(image_shape)
    images = first[:, :width].unflatten(1, image_shape).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last), second[:, width:].long()


def build_model(config: ModelConfig) -> SimCLR:
    """The freshly initialised network that `config` names. Raises ConfigError for an encoder that cannot be had."""
    images = _build_tower(config)
    if config.text is None:
        return images
    assert config.image_size is not None
    return TwoTowers(images, _build_tower(config.text), config.image_size, config.channels)


def _build_tower(config: ModelConfig) -> SimCLR:
    encoder, feature_dim = build_encoder(config)
    if config.first_layer == "whitened":
        first_convolution(encoder, config.encoder)
    head = build_projection_head(
        feature_dim,
        config.head_hidden_dim or feature_dim,
        config.head_out_dim,
        layers=config.head_layers,
        batch_norm=config.head_batch_norm,
    )
    return SimCLR(encoder, head, feature_dim)


def build_projection_head(in_dim: int, hidden_dim: int, out_dim: int, *, layers: int, batch_norm: str) -> nn.Sequential:
    """g: `layers` linear maps with ReLU between (2: SimCLR v1, section 4.2; 3: SimCLR v2, arXiv 2006.10029 section 3).

    hidden_dim: not looked at where there is one layer. batch_norm: "all" also normalises z, as the authors' code does;
    "hidden" does not; "none" has biases instead.
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
