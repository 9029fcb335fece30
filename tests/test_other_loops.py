"""The examples of other people's loops: two processes have the losses of one that holds the whole batch.

The losses of later steps depend on the gradients of all before.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simclr_dist
from tests.conftest import REPOSITORY
from tests.doc_commands import blocks
from tests.fork_server import ModuleProcess


def losses(example: str, processes: int, *arguments: str) -> list[float]:
    """Those that the main process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    if processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        env |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    started = [ModuleProcess(f"examples.{example}", list(arguments), {**env, **rank}) for rank in ranks]
    try:
        for process in started:
            assert process.wait(200) == 0, process.output()
    finally:
        for process in started:
            process.kill()
    return [float(value) for value in re.findall(r"loss (\d\S+)", started[0].output())]


def check(example: str, *arguments: str, steps: int = 4) -> None:
    one, two = losses(example, 1, *arguments), losses(example, 2, *arguments)
    assert len(one) == steps
    assert len(set(one)) == steps  # it learns, or at least moves
    assert two == pytest.approx(one, abs=5e-4)


@pytest.mark.distributed
def test_plain_ddp() -> None:
    check("loop_ddp")


@pytest.mark.distributed
@pytest.mark.slow  # imports Lightning three times
def test_lightning() -> None:
    pytest.importorskip("lightning")
    check("loop_lightning")


@pytest.mark.slow
def test_the_guides_lines_for_lightning_run_and_learn(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    guide = REPOSITORY / "docs" / "guides" / "your_own_loop.md"
    (lines,) = [text for language, text in blocks(guide) if language == "python" and "import lightning" in text]
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"^tensor\((.*)\)$", done.stdout, re.MULTILINE)
    assert 0 < float(loss) < math.log(63)  # of a guess among 63


@pytest.mark.distributed
@pytest.mark.slow  # imports transformers three times
def test_transformers_trainer() -> None:
    pytest.importorskip("transformers")
    check("loop_hf_trainer")


@pytest.mark.distributed
@pytest.mark.slow  # imports sentence-transformers three times
def test_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    check("loop_sentence_transformers", tiny_sentence_model(tmp_path))


def tiny_sentence_model(folder: Path) -> str:
    """A BERT with random weights: it becomes one with mean pooling. Dropout would depend on the number of processes."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["a", "that", "is", "red", "green", "blue", "grey", "cat", "dog", "bird", "fish"]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    random = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=16, max_position_embeddings=32, **shape, **random)).save_pretrained(folder)
    return str(folder)


def test_views_do_not_depend_on_how_they_are_read() -> None:
    """An epoch is an iteration; a step can be entered directly; what is decoded is the trainer's."""
    with simclr_dist.load_views("synthetic", image_size=16, global_batch_size=128, preset="simclr_cifar") as loader:
        first = [(views.clone(), ids) for views, ids in loader]
        assert len(first) == len(loader)
        assert first[0][0].shape == (2, 128, 3, 16, 16)
        assert torch.equal(next(loader.from_step(2))[0], first[2][0])
        second = next(iter(loader))
        assert not torch.equal(second[1], first[0][1])
        assert torch.equal(second[0], next(loader.from_step(len(loader)))[0])
    with pytest.raises(ValueError, match="preset"):
        simclr_dist.load_views("synthetic", image_size=32, global_batch_size=64, preset="simclr_cifra")
