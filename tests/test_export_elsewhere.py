"""Exports load in timm, transformers, onnxruntime and scikit-learn as their cards say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from simclr_dist.data.loading.load_images import are_whole, load_images
from simclr_dist.errors import ExportError
from simclr_dist.export import folders
from simclr_dist.export.export import export
from simclr_dist.network.encoders import build_encoder, torchvision_names
from simclr_dist.network.names_elsewhere import rename, rename_back, timm_twin, torchvision_to_timm
from simclr_dist.views.augment import normalize
from tests.test_export import save_run

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries are their own


def picture(path: Path, height: int, width: int, *, noise: bool = False) -> None:
    """A smooth one, whose pixels hardly depend on how it is resized; noise: for what must be equal."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(4 * x + y), np.cos(3 * y - x), np.sin(3 * x * y)], axis=2)
    pixels = (127.5 + 127.5 * waves).astype(np.uint8)
    if noise:
        pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_card(card: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """All Python of a card, one block after another, where its files lie."""
    for name in ("a", "b"):
        picture(card.parent / f"{name}.png", 32, 32, noise=True)
    monkeypatch.chdir(card.parent)
    names: dict = {}
    for code in blocks(card.read_text()):
        exec(code, names)
    return names


def features_of(folder: Path, encoder: torch.nn.Module, size: int) -> Tensor:
    """h of a.png and b.png, as an evaluation here computes it."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{n}.png"))) for n in "ab"])
    with torch.no_grad():
        return encoder(normalize(images))


@pytest.mark.parametrize(
    ("encoder", "stem", "format"),
    [
        ("resnet18", "imagenet", "timm"),
        ("timm/test_vit", "imagenet", "timm"),
        ("resnet18", "imagenet", "hf"),
        ("timm/test_vit", "imagenet", "hf"),
        ("resnet18", "cifar", "torchvision"),
        ("resnet_small", "imagenet", "safetensors"),
    ],
)
def test_every_line_of_the_card_runs_and_gives_the_features_of_an_evaluation(
    tmp_path: Path, encoder: str, stem: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = save_run(tmp_path / "runs", encoder=encoder, stem=stem)
    result = export(run, tmp_path / "out" / "the export", format=format, crop_share=1)
    card = result.card
    if format in ("timm", "hf"):  # lies in the folder, and speaks of it from outside
        card = tmp_path / "out" / "card.md"
        card.write_text(result.card.read_text())
    names = run_card(card, monkeypatch)
    expected = features_of(card.parent, model.encoder, 32)
    assert np.abs(names["features"](["a.png", "b.png"]) - expected.numpy()).max() < 1e-5 * max(1, expected.abs().max())
    assert names["classifier"].predict(names["features"](["a.png", "b.png"])).tolist() == [0, 1]


def test_a_timm_folder_is_a_timm_model_that_can_be_trained_and_opens_in_transformers(tmp_path: Path) -> None:
    import timm
    from transformers import AutoImageProcessor, AutoModel

    run, model = save_run(tmp_path, encoder="resnet18", image_size=64)
    folder = export(run, tmp_path / "f#o?o", format="timm", license="mit").path
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    assert (tuple(data["input_size"]), data["crop_pct"], data["interpolation"]) == ((3, 64, 64), 0.875, "bilinear")
    with_classes = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = model.encoder(images)
        torch.testing.assert_close(
            with_classes.eval().forward_head(with_classes.forward_features(images), True), expected
        )
        assert with_classes(images).shape == (2, 7)
        opened = AutoModel.from_pretrained(folder).eval()
        torch.testing.assert_close(opened(pixel_values=images).pooler_output.flatten(1), expected)
    assert AutoImageProcessor.from_pretrained(folder).data_config["crop_pct"] == 0.875
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (front["library_name"], front["license"], front["pipeline_tag"]) == (
        "timm",
        "mit",
        "image-feature-extraction",
    )


def test_transformers_processor_gives_what_an_evaluation_gives(tmp_path: Path) -> None:
    """Exactly for pictures that an evaluation leaves whole; for others nearer than a shift by half a pixel."""
    from transformers import AutoImageProcessor

    run, _ = save_run(tmp_path / "runs", encoder="timm/test_vit", image_size=64)
    sizes = {"large": [(150, 200), (90, 70), (64, 300)], "whole": [(64, 64), (64, 64)]}
    for kind, shapes in sizes.items():
        images = tmp_path / kind
        (images / "class").mkdir(parents=True)
        for i, shape in enumerate(shapes):
            picture(images / "class" / f"{i}.png", *shape, noise=kind == "whole")
        assert are_whole(str(images), 64) is (kind == "whole")
        out = export(run, tmp_path / f"hf_{kind}", format="hf", crop_share=1 if kind == "whole" else 0.875).path
        processor = AutoImageProcessor.from_pretrained(out)
        ((pixels, _, _),) = load_images(str(images), 64, batch_size=8)
        expected = normalize(pixels)
        files = [Image.open(images / "class" / f"{i}.png") for i in range(len(shapes))]
        found = processor(files, return_tensors="pt")["pixel_values"]
        if kind == "whole":
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        else:
            by_a_pixel = (expected[..., 1:, 1:] - expected[..., :-1, :-1]).abs().mean()
            assert (found - expected).abs().mean() < by_a_pixel / 2


@pytest.mark.parametrize(
    ("encoder", "stem", "format", "message"),
    [
        ("resnet18", "cifar", "timm", r"resnet18 with the cifar stem.*stride 2; use --format torchvision or"),
        ("resnet_small", "imagenet", "timm", r"not among timm's models; use --format safetensors or --format onnx"),
        ("resnet18", "cifar", "hf", r"transformers has no network that computes resnet18 with the cifar stem"),
        ("mobilenet_v2", "imagenet", "hf", r"its families are ResNet, ViT, ConvNeXt and Swin; use --format timm or"),
        ("timm/test_resnet", "imagenet", "hf", r"ResNetModel has no .*; use --format timm or"),
        ("timm/resnet10t", "imagenet", "hf", r"ResNetModel has no .*; use --format timm or"),
    ],
)
def test_what_a_library_does_not_have_is_refused_with_the_formats_that_can(
    tmp_path: Path, encoder: str, stem: str, format: str, message: str
) -> None:
    run, _ = save_run(tmp_path, encoder=encoder, stem=stem)
    with pytest.raises(ExportError, match=message):
        export(run, tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_network_of_the_same_names_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_epsilon(*arguments: object) -> dict:
        return {**describe(*arguments), "layer_norm_eps": 0.1}  # type: ignore[arg-type]

    describe = folders._describe
    monkeypatch.setattr(folders, "_describe", other_epsilon)
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    with pytest.raises(ExportError, match="at 32 px self-check failed"):
        export(run, tmp_path / "out", format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_a_missing_library_is_named_with_the_command(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"timm": "timm", "hf": "transformers"}[format]
    monkeypatch.setitem(sys.modules, library, None)
    run, _ = save_run(tmp_path, encoder="resnet18")
    with pytest.raises(ExportError, match=rf"--format {format} needs {library}: pip install 'simclr-dist\[{format}\]'"):
        export(run, tmp_path / "out", format=format)


def test_a_folder_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path / "runs", encoder="timm/test_vit")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for overwrite, message in ((False, "out exists"), (True, r"thesis\.tex is no part of an export")):
        with pytest.raises(ExportError, match=message):
            export(run, out, format="timm", overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "thesis.tex").unlink()
    export(run, out, format="timm", overwrite=True)
    export(run, out, format="timm", overwrite=True, license="mit")
    assert "license: mit" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


TWINS = sorted(name for name in torchvision_names() if timm_twin(name))


@pytest.mark.parametrize(
    "encoder", ["regnet_x_400mf", "mobilenet_v3_small", "convnext_tiny", "mnasnet0_5", "densenet121"]
)
def test_timms_twin_computes_the_same(encoder: str) -> None:
    """One of each kind of names: rules, the same names, names by position."""
    import timm

    from simclr_dist.config import ModelConfig

    torch.manual_seed(0)
    ours, _ = build_encoder(ModelConfig(encoder=encoder, image_size=64))
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    twin = timm_twin(encoder)
    assert twin is not None
    theirs = timm.create_model(twin.name, num_classes=0, **twin.arguments)
    state, like = ours.state_dict(), theirs.state_dict()
    table = torchvision_to_timm(encoder, state, like)
    renamed = rename(state, table, like)
    theirs.load_state_dict(renamed, strict=True)
    back = rename_back(renamed, table, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), ours.eval()(images), atol=1e-5, rtol=1e-5)


def test_the_configuration_of_a_folder_is_plain_json(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    for format in ("timm", "hf"):
        facts = json.loads((export(run, tmp_path / format, format=format).path / "config.json").read_text())
        assert facts["producer"].startswith("simclr_dist")
        assert facts.get("architecture", facts.get("model_type")) in ("test_vit", "vit")
