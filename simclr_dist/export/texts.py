"""Exports of an encoder from `hf/FOLDER`: a folder of transformers again, or one of sentence-transformers.

config.json, model.safetensors   the network, for AutoModel
tokenizer.json, …                those of FOLDER, for AutoTokenizer
modules.json, 1_Pooling/, …      for SentenceTransformer: how h is made of tokens

Each is read back by its library, which must give the same h for the same texts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simclr_dist.bounded_json import read_json
from simclr_dist.data.tokens.tokenizer import load_tokenizer, vocabulary_of
from simclr_dist.errors import DataError, ExportError
from simclr_dist.export.folders import CONFIG, WEIGHTS, import_transformers, quiet
from simclr_dist.network.hugging_face import HuggingFaceEncoder

TOLERANCE = 1e-4
TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt")
_SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling")
FILES = (CONFIG, WEIGHTS, TOKENIZER_CONFIG, *_TOKENIZER, *_SENTENCES)
"""All that such a folder may hold beside its card."""
_TEXTS = ("A sentence.", "Two girls play outside, and it rains!", "x", "many words " * 2000)


def write_texts(
    encoder: HuggingFaceEncoder, feature_dim: int, max_tokens: int, folder: Path, *, sentences: bool
) -> None:
    """max_tokens: more of a text is cut off. sentences: for sentence-transformers.

    Raises ExportError; RuntimeError: the self-check failed.
    """
    transformers = import_transformers()
    encoder.eval()
    network: Any = encoder.network
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    facts = json.loads(network.config.to_json_string(use_diff=True)) | {"architectures": [type(network).__name__]}
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    most = min(max_tokens, encoder.longest or max_tokens)
    _copy_tokenizer(encoder.folder, folder, most)
    if encoder.letters is not None:
        _check_weights(encoder, transformers, folder)
        return
    if sentences:
        _write_modules(folder, feature_dim, encoder.pooling, most)
    expected = torch.cat([_h(encoder, most, text) for text in _TEXTS])
    with quiet(transformers), warnings.catch_warnings(action="ignore"):
        found = (_by_sentence_transformers if sentences else _by_transformers)(folder, encoder.pooling, most)
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"self-check failed: h of texts differs by {difference:g} there; nothing was written")


def _copy_tokenizer(source: Path, folder: Path, most_tokens: int) -> None:
    """What is written of it runs no code, whatever the source says."""
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    given = source / TOKENIZER_CONFIG
    try:
        facts = read_json(given) if given.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    except ValueError as error:
        raise ExportError(f"{given}: cannot be read: {error}") from None
    if not isinstance(facts, dict) or "auto_map" in facts:
        raise ExportError(f"{given}: the tokenizer is code of its own (auto_map), which is not passed on")
    if (source / "tokenizer.json").is_file() and "pad_token" not in facts:
        known = load_tokenizer(source).get_vocab()
        facts |= {"pad_token": next((name for name in ("[PAD]", "<pad>", "[UNK]", "<unk>") if name in known), None)}
    facts = {key: value for key, value in facts.items() if value is not None} | {"model_max_length": most_tokens}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_modules(folder: Path, feature_dim: int, pooling: str, most_tokens: int) -> None:
    """By the names that every version of sentence-transformers reads."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    how = {
        "word_embedding_dimension": feature_dim,
        "pooling_mode_cls_token": pooling == "first",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": most_tokens, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"similarity_fn_name": "cosine"}),
        ("1_Pooling/config.json", how),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Read back


@torch.no_grad()
def _h(encoder: HuggingFaceEncoder, most_tokens: int, text: str) -> Tensor:
    """[1, D], as trainings and evaluations here see the text."""
    try:
        tokenizer = load_tokenizer(encoder.folder)
        known = vocabulary_of(tokenizer)
    except DataError as error:
        raise ExportError(str(error)) from None
    own = tokenizer.encode(text, add_special_tokens=False).ids[: most_tokens - known.num_special]
    h: Tensor = encoder(torch.tensor([[*known.prefix, *own, *known.suffix]]) + 1)
    return h


@torch.no_grad()
def _by_transformers(folder: Path, pooling: str, most_tokens: int) -> Tensor:
    import transformers

    from simclr_dist.network.transformer import pool

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    given = tokenizer(list(_TEXTS), padding=True, truncation=True, max_length=most_tokens, return_tensors="pt")
    return pool(network(**given).last_hidden_state, given["attention_mask"] != 0, pooling)


def _by_sentence_transformers(folder: Path, pooling: str, most_tokens: int) -> Tensor:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ExportError(
            "--format sentence-transformers needs that library, which reads the folder back: pip install "
            "sentence-transformers"
        ) from None
    found: Tensor = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(
        list(_TEXTS), convert_to_tensor=True, show_progress_bar=False
    )
    return found


@torch.no_grad()
def _check_weights(encoder: HuggingFaceEncoder, transformers: Any, folder: Path) -> None:
    """Of proteins, for which transformers' tokenizers are of many kinds: the network alone."""
    ids = torch.tensor([[1, 2, 3, 4]])
    with quiet(transformers), warnings.catch_warnings(action="ignore"):
        theirs = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    ours, read_back = (n(input_ids=ids, attention_mask=ids > 0).last_hidden_state for n in (encoder.network, theirs))
    if not torch.allclose(ours, read_back, atol=TOLERANCE, rtol=TOLERANCE):
        raise RuntimeError("self-check failed: the network read back computes something else; nothing was written")
