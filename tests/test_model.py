"""The network: shapes of h and z, the heads of SimCLR v1 and v2. Encoders: test_encoders.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simclr_dist.config import ModelConfig, Precision
from simclr_dist.network.precision import autocast
from simclr_dist.network.simclr import build_model, build_projection_head


@pytest.mark.parametrize(
    ("encoder", "stem", "width", "feature_dim"),
    [("resnet18", "cifar", 64, 512), ("resnet18", "imagenet", 64, 512), ("resnet_small", "cifar", 8, 32)],
)
def test_h_and_z_have_their_widths(encoder: str, stem: str, width: int, feature_dim: int) -> None:
    config = ModelConfig(encoder=encoder, stem=stem, width=width, head_out_dim=16)
    model = build_model(config)
    h, z = model(torch.randn(4, 3, 32, 32))
    assert model.feature_dim == feature_dim
    assert (h.shape, z.shape) == ((4, feature_dim), (4, 16))


@pytest.mark.parametrize(
    ("layers", "batch_norm", "expected"),
    [
        (1, "all", ["Linear", "BatchNorm1d"]),
        (1, "hidden", ["Linear"]),
        (1, "none", ["Linear"]),
        (2, "all", ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]),
        (2, "none", ["Linear", "ReLU", "Linear"]),
        (3, "hidden", ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]),
    ],
)
def test_heads_have_their_layers(layers: int, batch_norm: str, expected: list[str]) -> None:
    head = build_projection_head(8, 16, 4, layers=layers, batch_norm=batch_norm)
    assert [type(part).__name__ for part in head] == expected
    for part, following in zip(head, [*list(head)[1:], None], strict=True):
        if isinstance(part, nn.Linear):
            assert (part.bias is None) == isinstance(following, nn.BatchNorm1d)
    assert head(torch.randn(5, 8)).shape == (5, 4)


def test_a_head_of_one_layer_is_a_linear_projection() -> None:
    """Whatever head_hidden_dim says; normalised over the batch where head_batch_norm does."""
    h = torch.randn(32, 8)
    plain = build_projection_head(8, 3, 4, layers=1, batch_norm="none")
    linear = nn.Linear(8, 4)
    linear.load_state_dict({"weight": plain.linear1.weight, "bias": plain.linear1.bias})
    torch.testing.assert_close(plain(h), linear(h))
    normalised = build_projection_head(8, 3, 4, layers=1, batch_norm="all")
    z = h @ normalised.linear1.weight.T
    expected = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(normalised(h), expected)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_the_type_that_networks_compute_in(precision: Precision, dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype
