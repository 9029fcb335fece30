"""`transformer_small`: a pre-norm transformer over token ids. Tokens in, h out.

Padding changes nothing: it is masked in attention and in pooling, and nothing is normalised over rows or positions.
Positions are rotary (Su et al. 2021, arXiv:2104.09864): of any length, also longer than those trained on.

Letters: n rows, T positions, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import ModelConfig
from simclr_dist.errors import ConfigError


class TransformerSmall(nn.Module):
    """int64 [n, T], 0 for padding, to h [n, D]. vocabulary: token ids are 1 .. vocabulary."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, dropout: float, pooling: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pooling = pooling
        self.head_width = width // heads
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embedding.weight[0].zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.dropout(self.embedding(tokens))
        turns = rotations(tokens.shape[1], self.head_width, x)
        for block in self.blocks:
            x = block(x, real, turns)
        x = self.norm(x)
        return pool(x, real, self.pooling)


class Block(nn.Module):
    """Attention, then a perceptron, each on normalised input and added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """x [n, T, D]; real bool [n, T]: no padding."""
        n, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(turn(q, turns), turn(k, turns), v, attn_mask=real[:, None, None])
        x = x + self.dropout1(self.out(attended.transpose(1, 2).reshape(n, T, D)))
        return x + self.dropout2(self.down(F.gelu(self.up(self.norm2(x)))))


def pool(x: Tensor, real: Tensor, pooling: str) -> Tensor:
    """[n, D] of x [n, T, D]: the mean over the real positions, or the first. real bool [n, T]."""
    if pooling == "first":
        return x[:, 0]
    weights = real.to(x.dtype)[..., None]
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)


def rotations(T: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, width / 2] of each position's angles."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(T, device=like.device)[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def turn(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., T, width] with each pair of channels turned by its position's angle."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), turns
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def transformer_small(config: ModelConfig) -> tuple[nn.Module, int]:
    """The encoder and D, its width. Raises ConfigError."""
    vocabulary = vocabulary_of(config)
    if config.width % (2 * config.heads):
        raise ConfigError(
            [
                f"model.width: {config.width} is no multiple of 2 x model.heads ({config.heads}); rotary positions "
                "need that"
            ]
        )
    network = TransformerSmall(vocabulary, config.width, config.depth, config.heads, config.dropout, config.pooling)
    return network, config.width


def vocabulary_of(config: ModelConfig) -> int:
    """How many tokens an encoder of ours knows. Raises ConfigError."""
    if config.vocabulary is None:
        raise ConfigError(
            [f"model.vocabulary: is missing; {config.encoder} needs the number of tokens that `prepare` has printed"]
        )
    return config.vocabulary
