"""Encoders by name: what h is, whose parameter names they have, what a wrong name is answered with."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dist.config import Config, ModelConfig
from simclr_dist.errors import ConfigError
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.encoders import build_encoder
from simclr_dist.network.simclr import build_model
from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_encoder_parameters_carry_torchvisions_names(name: str) -> None:
    ours = build_model(ModelConfig(encoder=name)).encoder.state_dict()
    theirs = getattr(torchvision.models, name)().state_dict()
    assert set(theirs) - set(ours) == {"fc.weight", "fc.bias"}
    assert set(ours) <= set(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = build_model(ModelConfig(encoder="resnet18", stem="cifar")).encoder
    x = encoder.maxpool(encoder.conv1(torch.randn(1, 3, 32, 32)))
    assert x.shape == (1, 64, 32, 32)


def test_the_small_resnets_values_and_gradients_have_one_layout() -> None:
    """Where two layouts meet, an operation takes ten times as long on a CPU."""
    encoder = build_encoder(ModelConfig(encoder="resnet_small", width=8))[0].to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 24, 24).to(memory_format=torch.channels_last)
    meetings: list[set[tuple[int, ...]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            maps = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4]
            if len(maps) > 1 and maps[0].shape == maps[1].shape:
                meetings.append({x.stride() for x in maps[:2]})
            return function(*args, **(kwargs or {}))

    with Watch():
        encoder(images).square().sum().backward()
    assert len(meetings) > 15
    assert all(len(layouts) == 1 for layouts in meetings)


@pytest.mark.parametrize(
    ("name", "layer", "width"),
    [
        ("resnet18", "avgpool", 512),
        ("convnext_tiny", "classifier.1", 768),  # pooled and normalised, flattened
        ("vit_b_32", "encoder", 768),  # normalised tokens, the class token first
        ("mobilenet_v3_small", "classifier.1", 1024),
    ],
)
def test_h_is_what_the_class_layer_of_torchvision_sees(name: str, layer: str, width: int) -> None:
    torch.manual_seed(1)
    encoder, feature_dim = build_encoder(ModelConfig(encoder=name, image_size=32))
    theirs = getattr(torchvision.models, name)(**({"image_size": 32} if name.startswith("vit") else {})).eval()
    missing, unexpected = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert len(missing) == 2  # weight and bias of the class layer
    assert unexpected == []
    seen = []
    theirs.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs(images)
        h = encoder.eval()(images)
    expected = seen[0][:, 0] if layer == "encoder" else seen[0].flatten(1)
    assert h.shape == (2, feature_dim) == (2, width)
    torch.testing.assert_close(h, expected)


def test_the_dropout_of_a_class_layer_does_not_disturb_h() -> None:
    torch.manual_seed(0)
    encoder, feature_dim = build_encoder(ModelConfig(encoder="mobilenet_v2"))
    encoder.eval()
    encoder.get_submodule("classifier").train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images))
    assert feature_dim == 1280


def test_a_vit_is_built_for_the_size_of_its_images() -> None:
    config = Config.model_validate(
        {
            "name": "vit",
            "data": {"train": "synthetic", "image_size": 64},
            "model": {"encoder": "vit_b_32"},
            "optim": {"warmup_epochs": 0.0},
            "train": {"global_batch_size": 8, "epochs": 1},
        }
    )
    assert config.model.image_size == 64
    assert Config.model_validate_json(config.model_dump_json()) == config
    h, z = build_model(config.model)(torch.randn(2, 3, 64, 64))
    assert (h.shape, z.shape) == ((2, 768), (2, 128))
    with pytest.raises(ConfigError, match="vit_b_32 cannot be built for images of 50 px"):
        build_encoder(ModelConfig(encoder="vit_b_32", image_size=50))
    with pytest.raises(ValueError, match=r"model.image_size .32. must be data.image_size .64."):
        Config.model_validate({**config.model_dump(), "model": {"encoder": "vit_b_32", "image_size": 32}})


@pytest.mark.parametrize(
    ("name", "width"),
    [("test_vit", 64), ("test_convnext", 64), ("resnet18", 512), ("test_efficientnet", 256), ("skresnet18", 512)],
)
def test_timms_encoders_give_what_timm_calls_features(name: str, width: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder, feature_dim = build_encoder(ModelConfig(encoder=f"timm/{name}", image_size=32))
    sized = {"img_size": 32} if name == "test_vit" else {}
    theirs = timm.create_model(name, num_classes=7, **sized).eval()
    missing, unexpected = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith(("head", "fc", "classifier")) for key in missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        h = encoder.eval()(images)
    assert h.shape == (2, feature_dim) == (2, width)
    torch.testing.assert_close(h, expected)


def _h_of_timms_fused_batch_norm(rank: int, world_size: int, name: str) -> torch.Tensor:
    torch.manual_seed(0)
    encoder, _ = build_encoder(ModelConfig(encoder=name))
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    encoder = convert_to_global_batch_norm(encoder.double()).train()
    share = 8 // world_size
    return encoder(images[rank * share : (rank + 1) * share]).detach()


@pytest.mark.distributed
def test_global_batch_norm_keeps_timms_activations() -> None:
    pytest.importorskip("timm")
    expected = _h_of_timms_fused_batch_norm(0, 1, "timm/test_efficientnet")
    found = torch.cat(run_ranks(2, _h_of_timms_fused_batch_norm, "timm/test_efficientnet"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet19",
            r"'resnet19'; did you mean resnet1.*Known are resnet_small, transformer_small, gated_cnn, torchvision's",
        ),
        ("ViT_B_16", r"unknown encoder 'ViT_B_16'; did you mean vit_b_16"),
        ("googlenet", "unknown encoder 'googlenet'"),
        ("squeezenet1_0", "SqueezeNet has no linear class layer whose input could be h"),
    ],
)
def test_a_name_that_cannot_be_is_answered_with_those_that_can(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(ModelConfig(encoder=name))


def test_names_that_timm_would_download_from_are_unknown() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="unknown encoder 'timm/hf-hub:"):
        build_encoder(ModelConfig(encoder="timm/hf-hub:somebody/something"))
    with pytest.raises(ConfigError, match="did you mean timm/vit_tiny_patch16_224"):
        build_encoder(ModelConfig(encoder="timm/vit_tiny_patch16_244"))


def test_timm_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm/resnet18 needs timm: pip install 'simclr-dist\[timm\]'"):
        build_encoder(ModelConfig(encoder="timm/resnet18"))


def test_the_cifar_stem_is_for_resnets() -> None:
    with pytest.raises(ConfigError, match="cifar is for ResNets only; convnext_tiny takes `stem: imagenet`"):
        build_encoder(ModelConfig(encoder="convnext_tiny", stem="cifar"))


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_a_block_of_a_resnet_begins_at_zero_or_as_torchvision_has_it(name: str, last: str) -> None:
    torch.manual_seed(0)
    zero = build_encoder(ModelConfig(encoder=name))[0].state_dict()
    torch.manual_seed(0)
    one = build_encoder(ModelConfig(encoder=name, zero_init_residual=False))[0].state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().state_dict()
    ends = {key for key in one if key.endswith(f"{last}.weight")}
    assert all(not zero[key].any() for key in ends)
    assert all(torch.equal(one[key], theirs[key]) for key in one)
    assert {key for key in one if not torch.equal(zero[key], one[key])} == ends


def test_blocks_that_begin_at_zero_are_torchvisions_resnets_alone() -> None:
    for name in ("vit_b_16", "timm/resnet18"):
        with pytest.raises(ConfigError, match=rf"zero_init_residual: false is .* not for {name}"):
            build_encoder(ModelConfig(encoder=name, zero_init_residual=False))


def test_a_narrow_resnet_small_has_the_gradient_of_the_strided_convolution() -> None:
    """Its shortcuts avoid oneDNN's strided 1x1 kernel, which corrupts memory below 8 channels."""
    torch.manual_seed(0)
    shortcut = build_encoder(ModelConfig(encoder="resnet_small", width=4))[0].get_submodule("layer2.downsample.0")
    images = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = shortcut.weight.detach().double().requires_grad_()  # type: ignore[union-attr]
    expected = torch.nn.functional.conv2d(images, weight, stride=2)  # float64: not by oneDNN
    found = shortcut.double()(images)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.square().sum(), shortcut.weight)
    (expected_slope,) = torch.autograd.grad(expected.square().sum(), weight)
    torch.testing.assert_close(slope, expected_slope)
