"""Weights of any origin: found by names and shapes, adapted knowingly, refused where they cannot be meant.

Each peer's file is made here from a network of torchvision or timm, by its naming, and must give that network's h.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from simclr_dist.checkpoint.pretrained import ForeignEncoder, load_pretrained
from simclr_dist.checkpoint.weights import fit, open_weights, plan_start
from simclr_dist.config import ModelConfig
from simclr_dist.data.normalisation import MEAN, STD
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.network import library_weights, weights
from simclr_dist.network.encoders import build_encoder, remove_class_layer
from simclr_dist.network.freezing import freeze_matching
from simclr_dist.network.simclr import build_model
from simclr_dist.network.weight_files import Weights, conversion_recipe, read_weights
from tests.conftest import REPOSITORY
from tests.test_export import save_run

State = dict[str, Tensor]


def small_resnet(seed: int = 0, classes: int = 7) -> ResNet:
    """torchvision's, narrow, with one block a stage, and running statistics that are not the initial ones."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    network.inplanes = 8
    network.conv1, network.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    for i in range(4):
        setattr(network, f"layer{i + 1}", network._make_layer(BasicBlock, 8 << i, 1, stride=2 if i else 1))
    network.fc = nn.Linear(64, classes)
    return trained(network)


def trained(network: nn.Module) -> Any:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5)
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 and "bn" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def without_fc(network: ResNet) -> ResNet:
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network


def of_tensors(tensors: dict[str, Any], **facts: Any) -> Weights:
    return Weights("made.pth", "0" * 64, tensors, "a file of torch", **facts)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """A twin that must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


def numbered(state: State, kept: list[str]) -> State:
    parts = {name.partition("."): tensor for name, tensor in state.items()}
    return {f"{kept.index(top)}.{rest}": tensor for (top, _, rest), tensor in parts.items() if top in kept}


CHILDREN = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
PEERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "torchvision": lambda s: s,
    "DistributedDataParallel": lambda s: under("module.", s),
    "MoCo v1, v2": lambda s: {
        "state_dict": {
            **under("module.encoder_k.", other(s)),
            **under("module.encoder_q.", s),
            "module.queue": torch.randn(128, 64),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}}},
    },
    "MoCo v3": lambda s: {
        "state_dict": {**under("module.momentum_encoder.", other(s)), **under("module.base_encoder.", s)}
    },
    "SimSiam": lambda s: {
        "state_dict": {**under("module.encoder.", s), "module.predictor.0.weight": torch.zeros(4, 4)}
    },
    "SwAV": lambda s: {**under("module.", s), "module.prototypes.weight": torch.randn(30, 128)},
    "Barlow Twins": lambda s: {
        "model": {**under("module.backbone.", s), "module.projector.0.weight": torch.ones(8, 8)}
    },
    "DINO": lambda s: {"student": under("module.backbone.", other(s)), "teacher": under("backbone.", s)},
    "BYOL": lambda s: {**under("target_encoder.net.", other(s)), **under("online_encoder.net.", s)},
    "solo-learn": lambda s: {"state_dict": {**under("momentum_backbone.", other(s)), **under("backbone.", s)}},
    "lightly": lambda s: {"state_dict": under("backbone.", numbered(s, CHILDREN))},
    "Lightning": lambda s: {"state_dict": under("model.backbone.", s), "global_step": 3},
    "a Sequential without pooling": lambda s: under("f.", numbered(s, [x for x in CHILDREN if x != "maxpool"])),
    "VISSL": lambda s: {
        "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", s), "heads": {}}}}
    },
    "timm's training": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "half precision": lambda s: {name: x.to(torch.float64) if x.is_floating_point() else x for name, x in s.items()},
}


@pytest.mark.parametrize("peer", PEERS)
def test_each_peers_file_gives_the_h_of_its_network(peer: str, tmp_path: Path) -> None:
    network = small_resnet()
    torch.save(PEERS[peer](network.state_dict()), tmp_path / "made.pth")
    read = read_weights(tmp_path / "made.pth")
    encoder = without_fc(small_resnet(seed=1))
    found = weights.match(read, encoder)
    weights.refuse_too_little(read, found, "this resnet", partial=False)
    weights.load(encoder, found)
    assert found.share == 1
    assert found.new == []
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), without_fc(network)(images), rtol=1e-6, atol=1e-6)


def test_what_is_taken_left_out_and_chosen_is_told() -> None:
    state = small_resnet().state_dict()
    made = {
        "state_dict": {**under("module.encoder_q.", state), **under("module.encoder_k.", other(state))},
    }
    flat = {f"state_dict.{name}": tensor for name, tensor in made["state_dict"].items()}
    read = of_tensors(flat)
    found = weights.match(read, without_fc(small_resnet()))
    said = weights.sentence(read, found)
    assert "100 % of the encoder" in said
    assert "prefix state_dict.module.encoder_q., not state_dict.module.encoder_k." in said
    assert "nothing is new" in said
    assert f"left out: {len(state) + 2}" in said  # the twin, and the class layer of this one


def h_of(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval()(images)


def torchvision_vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5))


def timm_vit(seed: int, size: int = 32, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=size, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=0, **options
    )
    return trained(vit)


def into(encoder: nn.Module, tensors: State) -> weights.Match:
    found = weights.match(of_tensors(tensors), encoder)
    weights.load(encoder, found)
    return found


def test_timms_and_torchvisions_vit_take_each_others_weights() -> None:
    images = torch.randn(2, 3, 32, 32)
    theirs, ours = torchvision_vit(0), timm_vit(1)
    assert into(ours, theirs.state_dict()).share == 1
    theirs.heads = nn.Identity()
    torch.testing.assert_close(h_of(ours, images), h_of(theirs, images), rtol=1e-6, atol=1e-6)
    again = torchvision_vit(2)
    again.heads = nn.Identity()
    assert into(again, under("module.base_encoder.", ours.state_dict())).share == 1
    torch.testing.assert_close(h_of(again, images), h_of(ours, images), rtol=1e-6, atol=1e-6)


def test_positions_are_interpolated_as_timm_does_it() -> None:
    timm = pytest.importorskip("timm")
    given = timm_vit(0, size=32).state_dict()
    larger = timm_vit(1, size=64)
    found = into(larger, given)
    expected = timm.layers.resample_abs_pos_embed(given["pos_embed"], [8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(larger.state_dict()["pos_embed"], expected, rtol=0, atol=1e-6)
    assert found.adapted == ["pos_embed: positions interpolated from 4x4 to 8x8 patches"]
    assert found.share == 1


@pytest.mark.parametrize("kind", ["ResNet", "ViT", "Dinov2"])
def test_transformers_folders_give_transformers_h(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    vit = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == "ResNet":
        settings = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic"
        )
        theirs, ours = transformers.ResNetForImageClassification(settings), without_fc(small_resnet(1))
    elif kind == "ViT":
        settings = transformers.ViTConfig(**vit, intermediate_size=48, layer_norm_eps=1e-6)
        theirs, ours = transformers.ViTModel(settings, add_pooling_layer=False), timm_vit(1)
    else:
        settings = transformers.Dinov2Config(**vit, mlp_ratio=2)
        theirs, ours = transformers.Dinov2Model(settings), timm_vit(1, init_values=0.5)
    trained(theirs).save_pretrained(tmp_path)
    read = read_weights(tmp_path)
    found = weights.match(read, ours)
    weights.load(ours, found)
    assert read.kind == "a folder of transformers"
    assert found.share == 1, found
    base = getattr(theirs, "resnet", theirs)
    with torch.no_grad():
        out = base(images)
    expected = out.pooler_output.flatten(1) if kind == "ResNet" else out.last_hidden_state[:, 0]
    torch.testing.assert_close(h_of(ours, images), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Stems, channels, normalisation


def test_a_stem_of_another_size_or_other_channels_keeps_the_response_to_an_even_picture() -> None:
    state = small_resnet().state_dict()
    encoder = without_fc(small_resnet(1))
    encoder.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
    encoder.maxpool = nn.Identity()  # type: ignore[assignment]
    found = into(encoder, state)
    assert "conv1.weight: 7x7 in the file, 3x3 here: resampled" in found.adapted[0]
    assert "pooling after it is left out" in found.adapted[0]
    torch.testing.assert_close(encoder.conv1.weight.sum((2, 3)), state["conv1.weight"].sum((2, 3)))
    for channels in (1, 4):
        given = {**state, "conv1.weight": torch.randn(8, channels, 7, 7)}
        encoder = without_fc(small_resnet(1))
        found = into(encoder, given)
        assert found.adapted[0].startswith(f"conv1.weight: {channels} input channel")
        grey = torch.randn(1, 1, 16, 16)
        expected = nn.functional.conv2d(grey.expand(-1, channels, -1, -1), given["conv1.weight"], None, 2, 3)
        torch.testing.assert_close(encoder.conv1(grey.expand(-1, 3, -1, -1)), expected, rtol=1e-5, atol=1e-4)


def test_other_normalisation_is_folded_into_a_stem_that_allows_it() -> None:
    theirs, ours = timm_vit(0), timm_vit(1)
    read = of_tensors(theirs.state_dict(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found = weights.match(read, ours)
    said = weights.fold_normalisation(read, found, ours, MEAN, STD)
    weights.load(ours, found)
    pixels = torch.rand(2, 3, 32, 32)
    with_imagenets = torchvision.transforms.functional.normalize(pixels, list(MEAN), list(STD))
    torch.testing.assert_close(h_of(ours, with_imagenets), h_of(theirs, 2 * pixels - 1), rtol=0, atol=1e-5)
    assert "patch_embed.proj.weight and patch_embed.proj.bias have been changed" in said
    resnet = of_tensors(small_resnet().state_dict(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    encoder = without_fc(small_resnet(1))
    assert "differs a little" in weights.fold_normalisation(resnet, weights.match(resnet, encoder), encoder, MEAN, STD)
    as_here = of_tensors(small_resnet().state_dict(), mean=MEAN, std=STD)
    assert weights.fold_normalisation(as_here, weights.match(as_here, encoder), encoder, MEAN, STD) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_weights_of_another_network_are_refused_with_what_they_are_of() -> None:
    deeper = torchvision.models.resnet34().state_dict()
    network = build_model(ModelConfig(encoder="resnet18"))
    with pytest.raises(CheckpointError, match=r"larger network than resnet18: it has 96 tensors more.*fits resnet34"):
        fit(of_tensors(deeper), network, "resnet18", partial=False)
    assert fit(of_tensors(deeper), network, "resnet18", partial=True).record["share"] == 1
    little = {name: x for name, x in torchvision.models.resnet18().state_dict().items() if "layer4" not in name}
    with pytest.raises(CheckpointError, match=r"only 24.\d % of resnet18 is in it \(not in the file: layer4.0.conv1"):
        fit(of_tensors(little), network, "resnet18", partial=False)
    taken = fit(of_tensors(little), network, "resnet18", partial=True)
    assert "layer4.1.bn2.running_var" in taken.record["new"]
    with pytest.raises(CheckpointError, match=r"nothing in it fits resnet18\. It holds 1 tensors: text.embedding"):
        fit(of_tensors({"text.embedding": torch.ones(3, 3)}), network, "resnet18", partial=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_numbers_are_refused(value: float) -> None:
    state = small_resnet().state_dict()
    state["layer2.0.bn1.running_var"][3] = value
    with pytest.raises(CheckpointError, match=r"layer2.0.bn1.running_var holds NaN or infinity"):
        weights.match(of_tensors(state), without_fc(small_resnet()))
    counted = {name: x.long() for name, x in small_resnet().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"holds torch\.int64, which is no type of weights"):
        weights.match(of_tensors(counted), without_fc(small_resnet()))


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_would_run_code_is_refused_and_can_be_converted_elsewhere(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": {"a.b": torch.ones(2)}, "code": RunsCode(marker)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="holds getattr beside its weights"):
        read_weights(tmp_path / "bad.pth")
    assert not marker.exists()
    torch.save(
        {"args": argparse.Namespace(lr=0.1), "model": nn.Linear(2, 2), "o": [torch.ones(1)]}, tmp_path / "it's.pth"
    )
    with pytest.raises(CheckpointError, match=r"holds .*(Namespace|Linear) beside its weights") as refused:
        read_weights(tmp_path / "it's.pth")
    recipe = conversion_recipe(tmp_path / "it's.pth", tmp_path / "it's.safe.pth")
    assert recipe in str(refused.value)
    lines = "\n".join(line.removeprefix("    ") for line in recipe.splitlines())
    exec(lines, {})  # as a person would, who trusts the file
    assert read_weights(tmp_path / "it's.safe.pth").tensors.keys() == {"model.weight", "model.bias"}


def test_files_that_are_no_weights_are_named_for_what_they_are(tmp_path: Path) -> None:
    def refused(name: str, message: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / name)

    refused("none.pth", "no such file or directory")
    refused("junk.pth", "no whole file of torch", b"junk" * 100)
    refused("junk.safetensors", "no whole safetensors file", b"junk" * 100)
    refused("graph.onnx", "is an ONNX graph", b"")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    refused("list.pth", "holds a list and no state dict")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    refused("empty.pth", "holds no tensors")
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "bomb.pth")
    refused("bomb.pth", "w claims to be larger than what the file holds")
    torch.save({"w": torch.zeros(1 << 12)}, tmp_path / "whole.pth")
    (tmp_path / "script.pt").write_bytes((tmp_path / "whole.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "script.pt", "a") as script:
        script.writestr("script/constants.pkl", b"")
    refused("script.pt", "TorchScript")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as there,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in there.infolist():
            packed.writestr(entry.filename, there.read(entry))
    refused("packed.pth", "compressed archive")
    whole = (tmp_path / "whole.pth").read_bytes()
    refused("cut.pth", "no whole file of torch", whole[: len(whole) // 2])
    (tmp_path / "folder").mkdir()
    refused("folder", "neither checkpoints of a run nor any of model.safetensors")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "../whole.safetensors"}})
    )
    refused("folder", "names no files beside it")


def test_names_from_a_file_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    save_file({"\x1b[2Jw\n": torch.ones(1), "x" * 5000: torch.ones(1)}, tmp_path / "a.safetensors")
    read = read_weights(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as refused:
        fit(read, build_model(ModelConfig(encoder="resnet_small")), "resnet_small", partial=False)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 1000


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of sources


def test_large_models_in_parts_and_timms_folders_are_read(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    state = build_encoder(ModelConfig(encoder="timm/test_vit", image_size=160))[0].state_dict()
    names = sorted(state)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: state[name].contiguous() for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    known = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 160, 160]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit.r160_in1k", "pretrained_cfg": known}))
    said: list[str] = []
    model, checkpoint = load_pretrained(tmp_path, said.append)
    assert checkpoint.config.model.encoder == "timm/test_vit"
    assert checkpoint.config.data.image_size == 160
    assert not checkpoint.of_run
    torch.testing.assert_close(model.encoder.state_dict()["blocks.0.norm1.weight"], state["blocks.0.norm1.weight"])
    assert any("100 % of the encoder" in line for line in said)
    assert any("have been changed so that they give the same" in line for line in said)


def test_runs_checkpoints_and_exports_of_ours_bring_their_head(tmp_path: Path) -> None:
    from simclr_dist.export.export import export

    run, model = save_run(tmp_path, encoder="resnet_small")
    export(run, tmp_path / "e.safetensors", format="safetensors")
    for source, head in ((run, True), (next((run / "checkpoints").iterdir()), True), ("e.safetensors", False)):
        network = build_model(ModelConfig(encoder="resnet_small", width=8, weights=str(tmp_path / source)))
        config = ModelConfig(encoder="resnet_small", width=8, weights=str(tmp_path / source))
        start = plan_start(config, network, lambda _: None)
        start.load_into(network)
        for name, tensor in model.encoder.state_dict().items():
            assert torch.equal(network.encoder.state_dict()[name], tensor)
        same = torch.equal(network.projection_head.linear1.weight, model.projection_head.linear1.weight)  # type: ignore[union-attr, arg-type]
        assert same == head
        assert start.record["projection_head"] == ("taken" if head else "new")
    found, checkpoint = load_pretrained(tmp_path / "e.safetensors")
    assert checkpoint.config.name == "tiny"
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(h_of(found.encoder, images), h_of(model.encoder, images), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="knows its own encoder; leave out"):
        load_pretrained(ForeignEncoder(str(run), "resnet18"))


def test_a_run_of_release_0_1_can_be_started_from() -> None:
    released = REPOSITORY / "tests" / "golden" / "released_run"
    read = open_weights(released, ModelConfig(encoder="resnet_small"), lambda _: None)
    _, checkpoint = load_pretrained(released)
    start = fit(read, build_model(checkpoint.config.model), "resnet_small", partial=False)
    assert start.record["share"] == 1
    assert start.record["projection_head"] == "taken"


def test_published_weights_come_from_the_librarys_cache_or_say_what_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.ResNet18_Weights.DEFAULT
    file = tmp_path / "hub" / "checkpoints" / published.url.rpartition("/")[2]

    def no_network(*args: Any, **options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(CheckpointError) as refused:
        library_weights.library_weights("resnet18", 32, lambda _: None)
    for part in ("cannot be downloaded", published.url, str(file), "give its path as model.weights"):
        assert part in str(refused.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), file)
    config = ModelConfig(encoder="resnet18", weights="pretrained")
    network = build_model(config)
    start = plan_start(config, network, lambda _: None)
    start.load_into(network)
    assert torch.equal(network.encoder.state_dict()["layer3.0.conv1.weight"], theirs.layer3[0].conv1.weight)
    assert "ResNet18_Weights.IMAGENET1K_V1 of torchvision" in start.sentences[0]
    with pytest.raises(ConfigError, match="nobody publishes weights of resnet_small"):
        library_weights.library_weights("resnet_small", 32, lambda _: None)


def test_timms_published_weights_say_what_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def no_network(*args: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(library_weights, "timm_network", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", "/caches/hub")
    with pytest.raises(CheckpointError, match=r"(?s)timm/resnet18 cannot be.*huggingface.co/timm/.*to:   /caches/hub"):
        library_weights.library_weights("timm/resnet18", 32, lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_frozen_parameters_and_their_batch_norms_stay_as_they_are() -> None:
    network = build_model(ModelConfig(encoder="resnet_small", width=8))
    frozen = freeze_matching(network, ("encoder.conv1.*", "encoder.bn1.*", "encoder.layer1.*"))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    network.eval()
    network.train()  # as a loop of one's own may do it
    _, z = network(torch.randn(8, 3, 32, 32))
    z.square().mean().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in network.named_parameters())
    changed = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert not any(name.startswith(("encoder.bn1", "encoder.layer1")) for name in changed)
    half = build_model(ModelConfig(encoder="resnet_small", width=8))
    freeze_matching(half, ("encoder.bn1.weight",))
    assert half.encoder.bn1.training  # type: ignore[union-attr]  # its bias is trained: it goes on


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    network = build_model(ModelConfig(encoder="resnet_small", width=8))
    with pytest.raises(ConfigError) as refused:
        freeze_matching(network, ("layer1.*", "encoder.layr2.*", "*"))
    text = str(refused.value)
    assert "'layer1.*' matches no parameter; did you mean encoder.layer1.*" in text
    assert "encoder.layer2.*" in text
    assert "nothing is left to train" in text
    assert all(p.requires_grad for p in network.parameters())


def test_a_class_layer_is_no_deeper_network() -> None:
    """mobilenet_v3's class layer is as large as half of its encoder, and lies beside layers that are taken."""
    theirs = torchvision.models.mobilenet_v3_small()
    encoder = torchvision.models.mobilenet_v3_small()
    remove_class_layer(encoder)
    found = weights.match(of_tensors(theirs.state_dict()), encoder)
    assert (found.share, found.deeper) == (1, [])
    assert np.isclose(found.deeper_share, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"<!DOCTYPE html><title>404</title>",
        bytes(range(1, 255)),
        b"",
    ],
    ids=["pointer of Git LFS", "page", "noise", "empty"],
)
def test_what_no_torch_has_written_is_not_taken_for_an_unsafe_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pth: is no whole file of torch: it begins with b"):
        read_weights(tmp_path / "w.pth")
