"""Tokenizers of the library `tokenizers`: read from a local file, or trained on the texts themselves.

A file comes from anywhere: it is JSON read by that library, and no code is in it. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.data.tokens.folder import LARGEST_VOCABULARY, TOKENIZER, Vocabulary
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 128 << 20
MASKS = "[MASK]", "<mask>"
_PROBE = "a"


def load_tokenizer(path: Path) -> Tokenizer:
    """From a tokenizer.json, or a folder with one: a model's of Hugging Face, or a token folder. Raises DataError."""
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: has no {TOKENIZER}; name a folder with one, or the file itself, with --tokenizer")
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file}: has more than {MOST_BYTES:,} bytes; so large a tokenizer is not read")
    try:
        text = file.read_text(encoding="utf-8")
        tokenizer = _library().from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except BaseException as error:  # the library raises Exception itself, and where it panics a BaseException
        if isinstance(error, DataError | KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{file}: is no tokenizer: {str(error).splitlines()[0] if str(error) else error!r}") from None
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-pair encoding of small letters, of about `size` tokens, that knows every byte: nothing is unknown to it."""
    _library()
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[MASKS[1]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Raises DataError for a tokenizer whose special tokens stand elsewhere than around a text."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= LARGEST_VOCABULARY:
        raise DataError(f"the tokenizer knows {size:,} tokens; it must be 1 to {LARGEST_VOCABULARY:,}")
    probe = tokenizer.encode(_PROBE)
    own = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    begin = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
    prefix, suffix = tuple(probe.ids[:begin]), tuple(probe.ids[begin + len(own) :])
    if not own or probe.ids[begin : begin + len(own)] != own:
        raise DataError("the tokenizer does not put its special tokens before and after a text; it cannot be used here")
    mask = next((ids[name] for name in MASKS if name in ids), None)
    return Vocabulary("text", size, digest(tokenizer), prefix, suffix, mask)


def digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the tokenizer does not know; None: it knows everything."""
    name = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(name) if isinstance(name, str) else None


def _library() -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("texts need the library tokenizers: pip install 'simclr-dist[text]'") from None
    return Tokenizer
