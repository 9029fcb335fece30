"""The network of SimCLR (Chen et al. 2020, section 2): an encoder f yields h, a projection head g yields z.

Encoders are built in encoders.py; the head is a small perceptron.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

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


def build_model(config: ModelConfig) -> SimCLR:
    """The freshly initialised network that `config` names. Raises ConfigError for an encoder that cannot be had."""
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
