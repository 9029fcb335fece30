"""Small folders as transformers writes them, with random weights: encoders of texts and proteins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.data.tokens.prepare import prepare_texts

VOCABULARY = 40
SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SMALL,
    "roberta": _SMALL | {"pad_token_id": 1},
    "mpnet": _SMALL | {"pad_token_id": 1},
    "distilbert": {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32, "vocab_size": VOCABULARY},
    "modernbert": _SMALL | {"pad_token_id": 3, "attention_dropout": 0.1, "embedding_dropout": 0.1},
    "esm": _SMALL
    | {
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "attention_probs_dropout_prob": 0.1,
    },
}


def write_folder(folder: Path, family: str = "bert", **settings: Any) -> Path:
    """A network with its head for masked tokens, as most are published."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | settings))
    network.save_pretrained(folder)
    return folder


def texts(n: int, longest: int, seed: int = 0) -> Tensor:
    """Tokens int64 [n, longest] of several lengths, 0 where a text has ended."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 30, (n, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (n, 1), generator=generator)
    lengths[0] = longest
    return tokens * (torch.arange(longest) < lengths)


def write_tokenizer(folder: Path, words: Sequence[str] = SPECIAL + tuple(f"w{i}" for i in range(35))) -> None:
    """Of whole words, with BERT's special tokens; its configuration too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


def prepare_folder(model: Path, out: Path, n: int = 64) -> Path:
    """A token folder of n texts of several lengths, by the tokenizer of `model`."""
    generator = np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in generator.integers(0, 35, generator.integers(1, 20))) for _ in range(n)]
    source = out.with_suffix(".txt")
    source.write_text("".join(f"{line}\n" for line in lines))
    prepare_texts(source, out, tokenizer_at=model)
    return out
