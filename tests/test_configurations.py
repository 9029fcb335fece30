"""Every configuration that ships is listed for newcomers, planned, and trains. pytest tests/test_configurations.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision

import simclr_dist
from simclr_dist.cli import main
from simclr_dist.config import IMAGE_TEXT, OF_TOKENS, WITH_IMAGES, Config, load_config
from simclr_dist.data.tokens.folder import open_tokens
from tests.conftest import REPOSITORY
from tests.pair_files import image_text
from tests.test_evaluate import save_images
from tests.token_data import write_protein_folder, write_text_folder

CONFIGS = REPOSITORY / "configs"
TRAININGS = sorted(path for folder in (CONFIGS, CONFIGS / "variants") for path in folder.glob("*.yaml"))
SMALLER = {
    **dict.fromkeys(("resnet18", "resnet50"), "resnet_small"),
    **dict.fromkeys(("vit_b_16", "timm/vit_small_patch16_224"), "timm/vit_tiny_patch16_224"),
}
"""Networks for the steps on a CPU; what is planned is the network of the file."""


def test_the_page_of_configurations_lists_every_one_once() -> None:
    page = (REPOSITORY / "docs" / "configurations.md").read_text()
    for path in CONFIGS.rglob("*.yaml"):
        assert page.count(f"[{path.stem}](../{path.relative_to(REPOSITORY)})") == 1, path


def small(path: Path, folder: Path) -> Config:
    """The configuration, on made images of 32 px, 8 at once, for an epoch of two steps."""
    config = load_config(path, check_data=False)
    settings = {
        "runs_dir": str(folder / "runs"),
        **({"data.image_size": 32} if config.data.kind in WITH_IMAGES else {}),
        "model.encoder": SMALLER.get(config.model.encoder, config.model.encoder),
        "model.width": 8,
        "train.global_batch_size": 8,
        "train.max_steps": 2,
        "train.precision": "fp32",
        "evaluation.knn_k": 2,
    }
    if config.data.kind in OF_TOKENS:
        train, test = folder / f"{config.data.kind}.tokens", folder / f"{config.data.kind}_test.tokens"
        settings |= {"data.train": str(train), "data.test": str(test)}
        settings["model.vocabulary"] = open_tokens(train).vocabulary.size
    elif config.data.kind == IMAGE_TEXT:
        settings |= {f"data.{split}": str(folder / "pairs") for split in ("train", "test")}
        settings |= {"model.text.vocabulary": open_tokens(folder / "pairs" / "texts").vocabulary.size}
    elif config.data.train != "synthetic":
        settings |= {"data.train": str(folder / "train")} | (
            {"data.test": str(folder / "test")} if config.data.test else {}
        )
    if config.evaluation.train:
        settings["evaluation.train"] = settings["data.train"]
    if config.evaluation.knn_max_train:
        settings["evaluation.knn_max_train"] = 12
    if config.model.weights:
        settings |= {"model.encoder": "resnet18", "model.weights": str(folder / "resnet18.pth")}
    return load_config(path, settings)


def tokens_of(path: Path, folder: Path) -> list[str]:
    """For a plan: what an encoder of tokens eats is in their folder."""
    kind = load_config(path, check_data=False).data.kind
    if kind == IMAGE_TEXT:
        size = open_tokens(folder / "pairs" / "texts").vocabulary.size
        return [f"data.train={folder / 'pairs'}", f"model.text.vocabulary={size}"]
    if kind not in OF_TOKENS:
        return []
    train = folder / f"{kind}.tokens"
    return [f"data.train={train}", f"model.vocabulary={open_tokens(train).vocabulary.size}"]


def test_every_configuration_is_planned_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One test over all: imports and kernels are met once. For the steps networks are exchanged for small ones."""
    pytest.importorskip("timm")
    for seed, name in enumerate(("train", "test")):
        save_images(tmp_path / name, 6, seed)
    write_text_folder(tmp_path / "text.tokens", 18, 0)
    write_text_folder(tmp_path / "text_test.tokens", 6, 1, tokenizer=tmp_path / "text.tokens")
    write_protein_folder(tmp_path / "proteins.tokens", 18, 0)
    write_protein_folder(tmp_path / "proteins_test.tokens", 6, 1)
    image_text(tmp_path, 18)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    for path in TRAININGS:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(path), "--gpus", "8", "--images", "50000", "--json", *tokens_of(path, tmp_path)])
        assert ended.value.code == 0, path
        planned = json.loads(capsys.readouterr().out)
        config = small(path, tmp_path)
        run = simclr_dist.pretrain(config)
        assert (run.state, run.step) == ("finished", 2), path
        logged = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
        assert planned["num_steps"] > 0
        if config.evaluation.knn_every_epochs and config.data.train != "synthetic":
            assert any("eval/knn_top1" in line for line in logged), path
