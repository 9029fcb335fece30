"""A local folder of transformers is an encoder of texts: the same h, whatever the padding, and nothing of it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simclr_dist.checkpoint.weights import plan_start
from simclr_dist.config import ModelConfig
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.network.inputs import Inputs, images
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.network.trial import try_model
from tests.hugging_face import FAMILIES, texts, write_folder

INPUTS = Inputs("texts", "9 tokens", lambda n: texts(n, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folders") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folders") / "bert")


def section(folder: Path, **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"encoder": f"hf/{folder}", "head_out_dim": 8, **more})


def loaded(folder: Path, **more: Any) -> SimCLR:
    network = build_model(section(folder, **more))
    plan_start(section(folder, **more), network, print).load_into(network)
    return network


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_h_is_what_the_library_itself_makes_of_the_folder(folder: Path, pooling: str) -> None:
    from transformers import AutoModel

    start = plan_start(section(folder), build_model(section(folder)), print)
    assert start.match.share == 1.0
    network = loaded(folder, pooling=pooling).eval()
    tokens, theirs = texts(5, 9), AutoModel.from_pretrained(folder, local_files_only=True).eval()
    for row, h in zip(tokens, network.encoder(tokens), strict=True):
        ids = row[row > 0][None] - 1
        states = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        torch.testing.assert_close(h, states.mean(0) if pooling == "mean" else states[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_not_even_what_dropout_drops(folder: Path) -> None:
    """Nor does the company of a text: so results are the same on any number of processes, which pad differently."""
    network = loaded(folder, head_batch_norm="none").train()
    random_layers = key_draws(network, INPUTS)
    assert not random_layers.warning()
    assert "Attention" in random_layers.summary() or family_of(folder) == "mpnet"
    tokens, keys = texts(6, 9), draw_keys(0, 0, 0, torch.arange(6).numpy())[0]
    padded = torch.cat([tokens, torch.zeros(6, 4, dtype=torch.int64)], 1)
    for training in (True, False):
        network.train(training)
        alone = [h_of(network, row[row > 0][None], key[None]) for row, key in zip(tokens, keys, strict=True)]
        h = h_of(network, tokens, keys)
        torch.testing.assert_close(torch.cat(alone), h, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h_of(network, padded, keys), h, atol=1e-5, rtol=1e-5)
        assert torch.equal(h_of(network, tokens, keys.flip(0)), h) != training


def h_of(network: SimCLR, tokens: Tensor, keys: Tensor) -> Tensor:
    h: Tensor = network(tokens, keys)[0]
    return h


def family_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def test_its_weights_are_the_start_unless_its_architecture_alone_is_asked_for(bert: Path) -> None:
    assert section(bert).weights == "pretrained"
    assert section(bert, weights=None).weights is None
    assert section(bert, weights="other").weights == "other"
    assert ModelConfig(encoder="resnet18").weights is None
    start = plan_start(section(bert), build_model(section(bert)), print)
    assert not start.match.new
    assert "100 % of the encoder" in start.sentences[0]
    assert "prefix bert." in start.sentences[0]
    tried = try_model(section(bert), INPUTS)
    assert tried.unused == ()  # the pooler, which nothing here looks at, is left out
    assert not any("pooler" in name for name, _ in tried.network.named_parameters())


@torch.no_grad()
def test_names_of_old_files_and_an_index_of_parts_are_read(bert: Path, tmp_path: Path) -> None:
    expected = loaded(bert).eval().encoder(texts(2, 5))
    tensors = load_file(bert / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    parts = {"a.safetensors": dict(list(old.items())[::2]), "b.safetensors": dict(list(old.items())[1::2])}
    shutil.copy(bert / "config.json", tmp_path)
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(loaded(tmp_path).eval().encoder(texts(2, 5)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "code of its own (auto_map)"),
        ({"model_type": "of_nobody"}, "of_nobody"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": 10**12}, "hidden_size is 1e+12"),
        ({"num_labels": 10**12}, "num_labels is 1e+12"),
        ({"vocab_size": 1e999}, "vocab_size is inf"),
        ({"num_hidden_layers": 100_000}, "100000 layers"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "parameters, and more than"),
        ({"hidden_act": "of_nobody\x1b[31m"}, "of_nobody"),
        ({"hidden_size": "wide"}, "cannot be built"),
        ({"hidden_size": 15}, "cannot be built"),
    ],
)
def test_a_folder_that_would_run_code_or_fill_the_memory_is_refused_by_name(
    bert: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    facts = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | change))
    (tmp_path / "modeling.py").write_text("raise SystemExit('run')")
    with pytest.raises(ConfigError) as error:
        build_model(section(tmp_path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\x1b" not in str(error.value)


def test_pickles_missing_folders_and_too_long_texts_are_refused_by_name(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder with a config\.json\. Nothing is downloaded"):
        build_model(section(tmp_path / "google-bert"))
    shutil.copy(bert / "config.json", tmp_path)
    torch.save(load_file(bert / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which is not read here"):
        loaded(tmp_path)
    with pytest.raises(ConfigError, match="has 32 positions, fewer than the 33 tokens"):
        try_model(section(bert), Inputs("texts", "33 tokens", lambda n: texts(n, 33)))
    with pytest.raises(ConfigError, match="takes tokens"):
        try_model(section(bert), images(32))


@torch.no_grad()
def test_bf16_is_near_fp32(bert: Path) -> None:
    network, tokens = loaded(bert).eval(), texts(6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        h = network.encoder(tokens)
    torch.testing.assert_close(h.float(), network.encoder(tokens), atol=0.05, rtol=0.05)
