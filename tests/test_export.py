"""Exported files load elsewhere, give the same h, and are never left half-written. pytest tests/test_export.py"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from simclr_dist.config import Config
from simclr_dist.errors import ExportError
from simclr_dist.export import formats
from simclr_dist.export.export import check_same_outputs, export
from simclr_dist.network import encoders
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.safe_text import printable
from simclr_dist.views.augment import MEAN
from tests.test_evaluate import save_checkpoint


def save_run(folder: Path, *, encoder: str, stem: str = "imagenet", image_size: int = 32) -> tuple[Path, SimCLR]:
    """A run with one checkpoint of a network whose running statistics are not the initial ones."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "runs_dir": str(folder),
            "data": {"train": "synthetic", "image_size": image_size},
            "model": {"encoder": encoder, "stem": stem, "width": 8},
            "optim": {"warmup_epochs": 0.0},
            "train": {"global_batch_size": 8, "epochs": 1},
        }
    )
    torch.manual_seed(0)
    model = build_model(config.model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return save_checkpoint(config, model), model.eval()


@pytest.mark.parametrize("encoder", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvision_loads_it_strictly(tmp_path: Path, encoder: str) -> None:
    run, model = save_run(tmp_path, encoder=encoder)
    result = export(run, tmp_path / "encoder.pt", format="torchvision")
    theirs = getattr(torchvision.models, encoder)()
    theirs.load_state_dict(torch.load(result.path, weights_only=True), strict=True)
    theirs.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert theirs(images).abs().max() == 0  # fc is zeros, as the card says
        theirs.fc = nn.Identity()
        torch.testing.assert_close(theirs(images), model.encoder(images))
    assert any("all zeros" in note for note in result.notes)
    assert "fc was not trained" in result.card.read_text()


@pytest.mark.parametrize(
    ("encoder", "stem", "format"),
    [
        ("resnet18", "imagenet", "torchvision"),
        ("resnet18", "cifar", "torchvision"),
        ("resnet18", "cifar", "safetensors"),
        ("resnet_small", "imagenet", "safetensors"),
        ("convnext_tiny", "imagenet", "torchvision"),
        pytest.param("vit_b_32", "imagenet", "torchvision", marks=pytest.mark.slow),  # 88 million parameters
        ("timm/test_vit", "imagenet", "safetensors"),
    ],
)
def test_the_lines_on_the_card_load_it(
    tmp_path: Path, encoder: str, stem: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder.startswith("timm/"):
        pytest.importorskip("timm")
    run, model = save_run(tmp_path, encoder=encoder, stem=stem)
    result = export(run, tmp_path / "the encoder.bin", format=format)
    code = result.card.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    loaded = (names["model"] if format == "torchvision" else names["encoder"]).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.encoder(images))


def test_safetensors_carries_what_a_user_needs(tmp_path: Path) -> None:
    run, model = save_run(tmp_path, encoder="resnet_small")
    result = export(run, tmp_path / "out.safetensors", format="safetensors", license="cc-by-4.0")
    with safe_open(result.path, framework="pt") as file:
        metadata = file.metadata()
    assert Config.model_validate(json.loads(metadata["config"])).model.encoder == "resnet_small"
    assert metadata["step"] == "7"
    assert metadata["license"] == "cc-by-4.0"
    assert [float(value) for value in metadata["mean"].split()] == list(MEAN)
    assert load_file(result.path).keys() == model.encoder.state_dict().keys()


def test_card_shows_licence_data_and_accuracy(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="resnet_small")
    card = export(
        run, tmp_path / "out", format="safetensors", license="apache-2.0", accuracy={"kNN top-1": 0.4832}
    ).card.read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| kNN top-1 | 48.32 % |" in card
    assert "f00d" in card
    assert "global_batch_size: 8" in card


@pytest.mark.parametrize(
    "license", ["mit\nmalicious: yes", "no", "a: b", "---", "x | y <b>", "\x1b[31mred", "[1]", "# c"]
)
def test_names_stay_names_on_the_card(tmp_path: Path, license: str) -> None:
    run, _ = save_run(tmp_path, encoder="resnet_small")
    accuracy = {"knn on a|b\n| x | <script>": 0.5}
    card = export(run, tmp_path / 'o"`ut', format="safetensors", license=license, accuracy=accuracy).card.read_text()
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts.keys() == {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert (facts["license"], facts["license_name"]) == ("other", printable(license))
    assert card.isprintable() or all(c == "\n" or c.isprintable() for c in card)
    assert "<script>" not in text
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| Licence", "| knn"))]
    assert [row.count("|") for row in rows] == [3, 3]


def test_an_encoder_unknown_to_torchvision_is_refused(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="resnet_small")
    with pytest.raises(ExportError, match="resnet_small is none of torchvision's; use --format safetensors"):
        export(run, tmp_path / "out.pt", format="torchvision")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_existing_file_stays_unless_overwritten(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="resnet_small")
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(ExportError, match="out exists"):
        export(run, out, format="safetensors")
    assert out.read_text() == "precious"
    export(run, out, format="safetensors", overwrite=True)
    assert load_file(out)


def test_a_failed_self_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path, encoder="resnet_small")

    def save_damaged(state: dict, path: Path, metadata: dict) -> None:
        state["conv1.weight"] = state["conv1.weight"] * 1.01
        save_file(state, path, metadata)

    save_file = formats.save_file
    monkeypatch.setattr(formats, "save_file", save_damaged)
    with pytest.raises(RuntimeError, match="self-check failed"):
        export(run, tmp_path / "out", format="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_self_check_refuses_nan_and_other_widths() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    check_same_outputs(encoder, encoder, 4)
    with pytest.raises(RuntimeError, match="self-check failed"):
        check_same_outputs(encoder, lambda images: encoder(images) * float("nan"), 4)
    with pytest.raises(RuntimeError, match="self-check failed"):
        check_same_outputs(encoder, lambda images: encoder(images)[:, :3], 4)


@pytest.mark.filterwarnings("ignore")  # those of onnxscript are its own
@pytest.mark.parametrize(
    ("encoder", "stem"),
    [
        ("resnet_small", "imagenet"),
        pytest.param("resnet18", "cifar", marks=pytest.mark.slow),
        ("timm/test_vit", "imagenet"),
    ],
)
def test_onnx_runs_with_any_number_of_images_of_any_size(tmp_path: Path, encoder: str, stem: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `export`)")
    if encoder.startswith("timm/"):
        pytest.importorskip("timm")
    import onnxruntime

    run, model = save_run(tmp_path, encoder=encoder, stem=stem)
    result = export(run, tmp_path / "encoder.onnx", format="onnx", license="mit")
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["license"] == "mit"
    assert session.get_modelmeta().custom_metadata_map["free_image_size"] == "true"
    assert "any height and width" in result.notes[0]
    for n, size in itertools.product((1, 3, 8), ((32, 32), (48, 80))):
        images = torch.randn(n, 3, *size)
        (h,) = session.run(["h"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(h), model.encoder(images), atol=1e-5, rtol=1e-5)
    names: dict = {}
    code = result.card.read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("encoder.onnx", str(result.path)), names)
    assert names["h"].shape == (1, model.feature_dim)


@pytest.mark.filterwarnings("ignore")  # those of onnxscript are its own
def test_a_network_for_one_size_gives_a_graph_for_one_size_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `export`)")
    monkeypatch.setattr(encoders, "_REGISTERED", {})
    encoders.register("flat", lambda config: (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)), 8))
    run, _ = save_run(tmp_path, encoder="flat")
    result = export(run, tmp_path / "encoder.onnx", format="onnx")
    assert "of 32 x 32 pixels only: " in result.notes[0]
    assert "32 x 32 pixels only" in result.card.read_text()


def test_without_onnx_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    run, _ = save_run(tmp_path, encoder="resnet_small")
    with pytest.raises(ExportError, match="--format onnx needs onnx: pip install 'simclr-dist"):
        export(run, tmp_path / "encoder.onnx", format="onnx")
