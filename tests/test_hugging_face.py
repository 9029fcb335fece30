"""A local folder of transformers is an encoder of texts: the same h, whatever the padding, and nothing of it is run."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from simclr_dist.checkpoint.lineage import find_checkpoint
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.checkpoint.weights import describe_weights, plan_start
from simclr_dist.config import DataConfig, ModelConfig
from simclr_dist.data.tokens.prepare import prepare_proteins
from simclr_dist.errors import CheckpointError, ConfigError, DataError, ExportError
from simclr_dist.evaluation.embed import embed
from simclr_dist.export.card import text_loading
from simclr_dist.export.export import Format, export
from simclr_dist.kinds import kind_of
from simclr_dist.network.inputs import Inputs, images
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.network.trial import try_model
from simclr_dist.report.write import write_report
from tests.hugging_face import FAMILIES, prepare_folder, texts, write_folder, write_tokenizer
from tests.training import Training

INPUTS = Inputs("texts", "9 tokens", lambda n: texts(n, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folders") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer."""
    folder = write_folder(tmp_path_factory.mktemp("folders") / "bert")
    write_tokenizer(folder)
    return folder


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
        ({"model_type": "t5"}, "an encoder with a decoder"),
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


def test_a_library_that_is_missing_and_what_a_folder_is_of_are_said(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = dict(describe_weights(bert, print))
    assert rows["fits"] == f"--encoder hf/{bert} (100 %)"
    with pytest.raises(ConfigError, match=rf"is an encoder of tokens.* begin one with model\.encoder=hf/{bert}"):
        load_pretrained(bert)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"hf/FOLDER needs transformers: pip install 'simclr-dist\[hf\]'"):
        build_model(section(bert))


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


# ---------------------------------------------------------------------------------------------------------------------
# With token folders


def test_a_tokenizer_other_than_that_of_the_texts_is_refused_by_name(bert: Path, tmp_path: Path) -> None:
    prepared = prepare_folder(bert, tmp_path / "texts")
    check(bert, prepared)
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    write_tokenizer(other, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "another", "order", "of", "words"])
    with pytest.raises(ConfigError, match=rf"tokenizer of {other} .* is not the one that {prepared} was prepared with"):
        check(other, prepared)
    (other / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        check(other, prepared)
    still = write_folder(tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    write_tokenizer(still)
    with pytest.raises(ConfigError, match="the views of a text would be the same"):
        check(still, prepared)
    check(still, prepared, {"mask_p": 0.1})
    with pytest.raises(ConfigError, match=r"knows a tokenizer of texts, and data\.kind is proteins"):
        check(bert, proteins(tmp_path / "proteins"), kind="proteins")
    small = write_folder(tmp_path / "small", vocab_size=20)
    write_tokenizer(small)
    with pytest.raises(ConfigError, match="has 20 tokens, its tokenizer 40"):
        check(small, prepared)


@torch.no_grad()
def test_letters_of_proteins_are_those_of_the_folder_between_its_own_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = write_folder(tmp_path / "esm", "esm")
    names = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    prepared = proteins(tmp_path / "proteins")
    check(folder, prepared, kind="proteins")
    kind = kind_of(tokens_of(prepared, kind="proteins"))
    ((tokens, *_),) = kind.evaluation_batches(str(prepared), np.arange(2), 2)
    assert kind.show(str(prepared), np.arange(2)) == (["MKVLAX", "GGW"], pytest.approx([0, 1]))
    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    for pooling in ("mean", "first"):
        h = loaded(folder, pooling=pooling).eval().encoder(tokens)
        for sequence, row in zip(("MKVLAX", "GGW"), h, strict=True):
            ids = torch.tensor([[names.index(name) for name in ("<cls>", *sequence, "<eos>")]])
            states = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            torch.testing.assert_close(row, states[1:-1].mean(0) if pooling == "mean" else states[0])
    (folder / "vocab.txt").write_text("\n".join(names[:-1]) + "\n")
    with pytest.raises(ConfigError, match=r"has no token for what is hidden"):
        build_model(section(folder))


def tokens_of(prepared: Path, settings: dict[str, Any] | None = None, kind: str = "text") -> DataConfig:
    return DataConfig.model_validate({"kind": kind, "train": str(prepared), "tokens": settings or {}})


def check(folder: Path, prepared: Path, settings: dict[str, Any] | None = None, kind: str = "text") -> None:
    data = tokens_of(prepared, settings, kind)
    kind_of(data).check_encoder(build_model(section(folder)).encoder, section(folder))


def proteins(out: Path) -> Path:
    fasta = out.with_suffix(".fasta")
    fasta.write_text(">a\nMKVLAX\n>b\nGGW\n")
    prepare_proteins(fasta, out)
    return out


@pytest.fixture(scope="module")
def simcse(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run on one process that has ended."""
    place = tmp_path_factory.mktemp("simcse")
    prepared = prepare_folder(bert, place / "texts")
    (place / "simcse.yaml").write_text(CONFIG.format(prepared=prepared, folder=bert))
    return training(place, "alone")


def training(place: Path, name: str, *overrides: str, world_size: int = 1) -> Training:
    settings = ("train.global_batch_size=16", "train.epochs=2", *overrides)
    config = place / "simcse.yaml"
    done = Training(place / "texts", place, name, *settings, world_size=world_size, config=config)
    assert done.wait() == [0] * world_size, done.output
    return done


@pytest.mark.distributed
def test_simcse_from_a_folder_is_one_curve_on_any_number_of_processes_and_the_same_bytes_after_a_stop(
    simcse: Training,
) -> None:
    place = simcse.run_dir.parent
    two = training(place, "two", world_size=2)
    np.testing.assert_allclose(simcse.losses(), two.losses(), rtol=1e-4)
    training(place, "stopped", "train.max_steps=3")
    assert training(place, "stopped").final_bytes() == simcse.final_bytes()
    assert "100 % of the encoder" in simcse.output[0]
    assert "Dropout, 2 BertSelfAttention: the same on any number" in simcse.output[0]
    assert "texts/s" in simcse.output[0]
    events = EventAccumulator(str(simcse.run_dir / "tensorboard")).Reload()
    views = events.Tensors("data/augmented_pairs/text_summary")[0].tensor_proto.string_val[0]
    assert b"&#91;CLS&#93; w" in views
    write_report([simcse.run_dir], place / "page.html", images=20, device=torch.device("cpu"), say=print)
    page = (place / "page.html").read_text()
    assert "[CLS] w" in page
    assert "texts/s since its last start" in page
    assert "neither pictures nor texts" not in page
    (projector,) = (simcse.run_dir / "tensorboard" / "projector").iterdir()
    assert (projector / "labels.tsv").read_text().startswith("label\ttext\n")


@pytest.mark.parametrize("format", ["hf", "sentence-transformers"])
def test_an_exported_folder_gives_the_same_h_by_its_own_library(
    simcse: Training, tmp_path: Path, format: Format
) -> None:
    place, out = simcse.run_dir.parent, tmp_path / "exported"
    h = embed(simcse.run_dir, str(place / "texts"), device="cpu").h
    lines = (place / "texts.txt").read_text().splitlines()
    exported = export(simcse.run_dir, out, format=format)
    code = f"{exported.load_with}\n{text_loading(model_of(simcse), 16, format, str(out), 16).features}"
    names: dict[str, Any] = {}
    with warnings.catch_warnings(action="ignore"), contextlib.chdir(tmp_path):
        exec(code, names)
        np.testing.assert_allclose(names["features"](lines), h, atol=1e-4)
    assert "| Encoder | hf/" in (out / "README.md").read_text()
    again = loaded(out, pooling="first").eval()  # and it is a folder to begin from
    kind = kind_of(tokens_of(place / "texts", {"max_tokens": 16}))
    ((tokens, *_),) = kind.evaluation_batches(str(place / "texts"), np.arange(64), 64)
    np.testing.assert_allclose(again.encoder(tokens).detach(), h, atol=1e-5)
    export(simcse.run_dir, out, format=format, overwrite=True)


def test_formats_that_know_no_texts_are_refused_by_name(simcse: Training, tmp_path: Path) -> None:
    for format in ("torchvision", "safetensors", "onnx", "timm"):
        with pytest.raises(ExportError, match=f"--format {format} has no encoders of texts; use --format hf or sent"):
            export(simcse.run_dir, tmp_path / "out", format=format)


def model_of(run: Training) -> ModelConfig:
    return find_checkpoint(run.run_dir, print).config.model


CONFIG = """
name: simcse
data: {{kind: text, train: {prepared}, tokens: {{max_tokens: 16}}}}
model: {{encoder: hf/{folder}, pooling: first, head_out_dim: 8, head_batch_norm: none}}
optim: {{optimizer: adamw, base_lr: 0.0005, lr_scaling: none, warmup_epochs: 0}}
train: {{precision: fp32}}
monitor: {{health_every_steps: null, image_pairs: 2, projector_every_epochs: 2}}
"""
