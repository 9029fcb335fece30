"""`gated_cnn`: gated convolutions over token ids. Tokens in, h out. Cheap: made for minutes on CPUs.

The first layer sees `model.kernel_size` tokens in a row, so with `model.depth: 1` h is the mean of features of k-mers.
A transformer must learn to look at neighbours before it finds those, which takes it longer than such trainings last.

Padding changes nothing: it is zero before each convolution, as what lies beyond the ends, and masked in pooling.

Letters: n rows, T positions, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import ModelConfig
from simclr_dist.errors import ConfigError
from simclr_dist.network.transformer import pool, vocabulary_of

NARROWER = 8  # an embedding than h: the first convolution is cheaper in proportion


class GatedCNN(nn.Module):
    """int64 [n, T], 0 for padding, to h [n, D]. vocabulary: token ids are 1 .. vocabulary."""

    def __init__(self, vocabulary: int, width: int, depth: int, kernel_size: int, dropout: float, pooling: str) -> None:
        super().__init__()
        narrow = -(-width // NARROWER)
        self.embedding = nn.Embedding(vocabulary + 1, narrow, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            GatedConvolution(width if i else narrow, width, kernel_size, dropout if i else 0.0) for i in range(depth)
        )
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.dropout(self.embedding(tokens))
        for i, layer in enumerate(self.layers):
            x = x + layer(x, real) if i else layer(x, real)
        return pool(x, real, self.pooling)


class GatedConvolution(nn.Module):
    """a * sigmoid(b), a and b being convolutions of x (Dauphin et al. 2017, arXiv:1612.08083, equation 1)."""

    def __init__(self, in_width: int, out_width: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.convolution = nn.Conv1d(in_width, 2 * out_width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [n, T, in_width]; real bool [n, T]: no padding."""
        x = self.dropout(x) * real.to(x.dtype)[..., None]
        return F.glu(self.convolution(x.transpose(1, 2)), dim=1).transpose(1, 2)


def gated_cnn(config: ModelConfig) -> tuple[nn.Module, int]:
    """The encoder and D, its width. Raises ConfigError."""
    vocabulary = vocabulary_of(config)
    if config.kernel_size % 2 == 0:
        raise ConfigError([f"model.kernel_size: {config.kernel_size} has no middle: take an odd number"])
    network = GatedCNN(vocabulary, config.width, config.depth, config.kernel_size, config.dropout, config.pooling)
    return network, config.width
