"""model.first_layer: whitened. Its answers to patches of the images are uncorrelated and equally wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simclr_dist.config import DataConfig, ModelConfig
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.untrained import before_training
from simclr_dist.network import encoders
from simclr_dist.network.encoders import build_encoder
from simclr_dist.network.first_layer import NOISE, first_convolution, whiten
from simclr_dist.network.simclr import build_model
from simclr_dist.views.augment import STD, normalize
from tests.training import Training


def smooth_images(n: int, side: int) -> torch.Tensor:
    """uint8 [n, side, side, 3]: neighbouring pixels and channels are alike, as in pictures."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, side // 4, side // 4, generator=generator)
    coarse = 0.7 * coarse.mean(1, keepdim=True) + 0.3 * coarse
    fine = nn.functional.interpolate(coarse, side, mode="bicubic", align_corners=False)
    fine = fine + 0.05 * torch.randn(fine.shape, generator=generator)
    return (255 * fine).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("kernel", "filters"), [(3, 64), (3, 20), (4, 128), (7, 64)])
def test_answers_to_patches_are_uncorrelated_with_equal_variance(kernel: int, filters: int) -> None:
    images = smooth_images(600, 28)
    convolution = nn.Conv2d(3, filters, kernel, stride=kernel, bias=False)
    before = convolution.weight.detach().clone()
    num = whiten(convolution, images, STD)
    assert num == 2 * min(3 * kernel**2, filters // 2)

    answers = convolution(normalize(images))[:, : num // 2].permute(0, 2, 3, 1).reshape(-1, num // 2)
    found = np.cov(answers.detach().numpy().astype(np.float64), rowvar=False, bias=True)
    patches = nn.functional.unfold(normalize(images), kernel, stride=kernel).transpose(1, 2).flatten(0, 1)
    variances = np.linalg.eigvalsh(np.cov(patches.numpy().astype(np.float64), rowvar=False, bias=True))[::-1]
    expected = variances / (variances + NOISE)
    assert np.abs(found - np.diag(expected[: num // 2])).max() < 1e-4
    assert expected[0] > 0.999

    weight = convolution.weight.detach()
    assert torch.equal(weight[: num // 2], -weight[num // 2 : num])
    assert torch.equal(weight[num:], before[num:])


def test_threads_and_the_order_of_the_images_change_no_bit() -> None:
    images = smooth_images(1500, 16)
    found = []
    for threads, some in ((1, images), (2, images), (2, images.flip(0))):
        convolution = nn.Conv2d(3, 16, 3)
        torch.set_num_threads(threads)
        whiten(convolution, some, STD)
        torch.set_num_threads(1)
        found.append(convolution.weight.detach()[:16])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ("resnet_small", "conv1"),
        ("resnet18", "conv1"),
        ("vit_b_32", "conv_proj"),
        ("efficientnet_b0", "features.0.0"),
        ("timm/vit_tiny_patch16_224", "patch_embed.proj"),
    ],
)
def test_the_first_layer_is_the_one_that_sees_the_pixels(encoder: str, name: str) -> None:
    network, _ = build_encoder(ModelConfig(encoder=encoder, image_size=224))
    assert first_convolution(network, encoder) is network.get_submodule(name)


def test_an_encoder_that_begins_with_something_else_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"first_layer: whitened needs an encoder that begins with a convolution"):
        first_convolution(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "own")
    monkeypatch.setitem(encoders._REGISTERED, "own", lambda config: (nn.Sequential(nn.Linear(12, 3)), 3))
    with pytest.raises(ConfigError, match="own begins with Linear"):
        build_model(ModelConfig(encoder="own", first_layer="whitened"))


@pytest.mark.distributed
def test_a_run_begins_with_it_on_any_number_of_processes_and_a_resume_goes_on(images: Path, tmp_path: Path) -> None:
    settings = ("model.first_layer=whitened", "optim.optimizer=sgd", "optim.weight_decay=0", "optim.momentum=0")
    still = (*settings, "optim.base_lr=1.0e-12", "train.max_steps=1")
    model, data = (
        ModelConfig(encoder="resnet_small", stem="cifar", width=16),
        DataConfig(train=str(images), image_size=32),
    )
    _, whitened = before_training(model.model_copy(update={"first_layer": "whitened"}), data, 0, print)
    expected = whitened.conv1.weight
    assert not torch.allclose(expected, before_training(model, data, 0, print)[1].conv1.weight)
    for world_size in (1, 2):
        run = Training(images, tmp_path, f"still{world_size}", *still, world_size=world_size)
        assert run.wait() == [0] * world_size, run.output
        file = run.run_dir / "checkpoints" / "step_00000001" / "model.safetensors"
        assert torch.allclose(load_file(file)["encoder.conv1.weight"], expected, atol=1e-9)

    whole = Training(images, tmp_path, "whole", *settings, "train.max_steps=4")
    assert whole.wait() == [0], whole.output
    for max_steps in (2, 4):
        part = Training(images, tmp_path, "parts", *settings, f"train.max_steps={max_steps}")
        assert part.wait() == [0], part.output
    assert part.final_bytes() == whole.final_bytes()
