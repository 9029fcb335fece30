"""Trainings on texts and proteins keep the promises of those on images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.tokens.folder import open_tokens
from simclr_dist.evaluation.embeddings_file import load_embeddings
from tests.fork_server import ModuleProcess
from tests.token_data import write_protein_folder, write_text_folder
from tests.training import Training

CONFIG = """
name: tokens
data:
  kind: {kind}
  train: none
  tokens: {tokens}
model: {{encoder: {encoder}, vocabulary: {vocabulary}, width: 32, depth: 2}}
loss: {{temperature: 0.2}}
optim: {{optimizer: adamw, lr_scaling: none, warmup_epochs: 1}}
train: {{global_batch_size: 64, epochs: 3, precision: fp32}}
evaluation: {{knn_k: 10}}
"""
VIEWS = {
    "text": "{max_tokens: 16, mutate_p: 0.1}",
    "proteins": "{views: spans, span_min: 30, span_max: 60, mask_p: 0.1, mutate_p: 0.1, spans_touch: false}",
}
ENCODERS = {"text": "transformer_small", "proteins": "gated_cnn"}
TINY = "model.width=32", "model.head_hidden_dim=32", "optim.base_lr=0.003"


class Data:
    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.train, self.test = kind, folder / "train.tokens", folder / "test.tokens"
        if kind == "text":
            write_text_folder(self.train, 512, seed=1)
            write_text_folder(self.test, 96, seed=2, tokenizer=self.train)
        else:
            write_protein_folder(self.train, 512, seed=1)
            write_protein_folder(self.test, 96, seed=2)
        vocabulary = open_tokens(self.train).vocabulary.size
        self.config = folder / "tokens.yaml"
        self.config.write_text(
            CONFIG.format(kind=kind, tokens=VIEWS[kind], vocabulary=vocabulary, encoder=ENCODERS[kind])
        )

    def training(self, name: str, *overrides: str, world_size: int = 1) -> Training:
        runs = self.config.parent
        return Training(self.train, runs, name, *TINY, *overrides, world_size=world_size, config=self.config)


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Data:
    return Data(tmp_path, request.param)


def run(*arguments: str, code: int = 0) -> str:
    process = ModuleProcess("simclr_dist.cli", list(arguments), {**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait(200) == code, process.output()
    return process.output()


@pytest.mark.distributed
@pytest.mark.parametrize("data", ["text", "proteins"], indirect=True)
def test_tokens_train_alike_on_two_processes_and_end_with_the_same_bytes_after_a_kill(data: Data) -> None:
    test = f"data.test={data.test}", "evaluation.knn_every_epochs=3", "evaluation.online_probe=true"
    alone = data.training("alone", *test)
    assert alone.wait() == [0], alone.output
    killed = data.training("killed", *test, "checkpoint.every_steps=3", world_size=2)
    killed.wait_until(lambda: killed.has_logged(int(np.random.default_rng().integers(7, 15))))
    killed.kill()
    resumed = data.training("killed", *test, world_size=2)
    assert resumed.wait() == [0, 0], resumed.output
    whole = data.training("whole", *test, world_size=2)
    assert whole.wait() == [0, 0], whole.output
    assert resumed.final_bytes() == whole.final_bytes()
    np.testing.assert_allclose(whole.losses(), alone.losses(), rtol=1e-4)

    noun = {"text": "text", "proteins": "protein"}[data.kind]
    assert f"512 {noun}s, 2 views of at most" in alone.output[0]
    assert f" {noun}s/s" in alone.output[0]
    assert "Dropout: the same on any number of processes" in alone.output[0]
    shown = run("evaluate", "knn", str(alone.run_dir), "--no-cache", "--baselines")
    for name in {"text": ("TF-IDF", "character n-grams"), "proteins": ("amino acids", "3-mers")}[data.kind]:
        assert name in shown
    *_, online, offline = [json.loads(line) for line in (alone.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert online["top1"] == offline["top1"] > 0.5  # chance is a quarter
    assert offline["tokenizer"] == open_tokens(data.train).vocabulary.digest


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("data", ["text", "proteins"], indirect=True)
def test_tokens_train_alike_on_four_processes(data: Data) -> None:
    runs = [data.training(f"on{size}", world_size=size) for size in (1, 4)]
    for started in runs:
        assert set(started.wait()) == {0}, started.output
    np.testing.assert_allclose(runs[1].losses(), runs[0].losses(), rtol=1e-4)


@pytest.mark.parametrize("data", ["text"], indirect=True)
def test_a_run_of_texts_is_continued_with_the_same_tokens_only(data: Data) -> None:
    first = data.training("run", "train.max_steps=2")
    assert first.wait() == [0], first.output
    for setting, message in (
        ("data.tokens.max_tokens=12", "data.tokens.max_tokens: 16 then, 12 now"),
        ("data.tokens.length_window=4", "data.tokens.length_window: 16 then, 4 now"),
        ("data.tokens.mask_p=0.2", "data.tokens.mask_p: 0.0 then, 0.2 now"),
    ):
        again = data.training("run", setting)
        assert again.wait() == [2]
        assert message in again.output[0]
    write_text_folder(data.train.with_name("other.tokens"), 700, seed=5)
    vocabulary = open_tokens(data.train.with_name("other.tokens")).vocabulary.size
    other = data.training("run", f"data.train={data.train.with_name('other.tokens')}", f"model.vocabulary={vocabulary}")
    assert other.wait() == [2]
    assert "the texts' fingerprint: " in other.output[0]
    assert "the tokenizer's: " in other.output[0]


@pytest.mark.parametrize("data", ["proteins"], indirect=True)
def test_other_commands_take_tokens_or_say_that_they_do_not(data: Data) -> None:
    test, config = f"data.test={data.test}", str(data.config)
    trained = data.training("run", test, "monitor.projector_every_epochs=3")
    assert trained.wait() == [0], trained.output
    out = data.train.with_name("h.parquet")
    run("embed", str(trained.run_dir), str(data.train), str(out))
    assert load_embeddings(out).h.shape == (512, 32)
    run("evaluate", "linear", str(trained.run_dir), "--no-cache")
    assert "those from hf/FOLDER are exported" in run("export", str(trained.run_dir), "--crop", "1", code=2)
    examined = run("doctor", config, f"data.train={data.train}", test)
    assert "512 proteins in 4 classes" in examined
    assert "only your script knows" not in examined
    wrong_size = run("doctor", config, f"data.train={data.train}", test, "model.vocabulary=99", code=1)
    assert "has 22 tokens; set it to 22" in wrong_size
    missing = run("doctor", config, f"data.train={data.train}.not", code=1)
    assert "no token folder" in missing
    run("plan", config, f"data.train={data.train}", test)
