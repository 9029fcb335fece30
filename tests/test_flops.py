"""FLOPs against a count layer by layer, and against what the literature says of ResNet-50."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.config import load_config
from simclr_dist.network.flops import forward_flops, peak_flops, train_flops
from simclr_dist.network.inputs import images
from simclr_dist.network.simclr import build_model
from tests.conftest import REPOSITORY


def by_layers(model: nn.Module, image_size: int) -> int:
    """Twice the multiply-adds that each convolution and linear layer makes of a real image."""
    total = 0

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        weight: Tensor = layer.weight  # type: ignore[assignment]
        per_output = weight[0].numel()  # inputs of one output: channels of its group, times the kernel
        total += 2 * out.numel() * per_output

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, image_size, image_size))
    return total


@pytest.mark.parametrize("encoder", ["resnet_small", "resnet18", "mobilenet_v3_small"])
def test_forward_flops_are_those_of_the_layers(encoder: str) -> None:
    config = load_config(REPOSITORY / "configs" / "smoke.yaml", [f"model.encoder={encoder}"])
    model = build_model(config.model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert forward_flops(model, images(32)) == by_layers(model, 32)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_resnet50_takes_what_its_paper_says() -> None:
    config = load_config(REPOSITORY / "configs" / "imagenet_resnet50_100ep.yaml", check_data=False)
    encoder = build_model(config.model).get_submodule("encoder")
    assert forward_flops(encoder, images(224)) == pytest.approx(2 * 4.1e9, rel=0.01)  # torchvision: 4.09 GMAC


def test_attention_counts() -> None:
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), attention)
    T, D = 3, 16  # tokens, width: an image of 4 x 4 pixels and three channels is three tokens
    products = 4 * T * D * D + 2 * T * T * D + 2 * T * D * 32
    assert forward_flops(model, images(4)) == 2 * products


def test_a_network_that_asks_for_numbers_has_no_count() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.mean())

    assert forward_flops(Asks(), images(8)) is None


def test_a_training_step_is_six_forwards_and_peaks_are_those_of_the_device() -> None:
    assert train_flops(10, num_views=2) == 60  # each view forward, and twice that backward
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A10", "bf16") == 125e12
    assert peak_flops("NVIDIA A10G", "bf16") == 70e12
    assert peak_flops("NVIDIA GH200 480GB", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA GB200", "bf16") == 2500e12
    assert peak_flops("NVIDIA B200", "bf16") == 2250e12
    assert peak_flops("NVIDIA L40", "bf16") == 181e12
    assert peak_flops("Tesla T4", "fp16") == 65e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("CPU", "bf16") is None
