"""Texts and proteins without an encoder: counts of words, of letters in a row, of residues in a row.

Each is the TF-IDF of scikit-learn, of the MOST_FEATURES most frequent terms, on what the tokens stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.data.tokens import alphabet
from simclr_dist.data.tokens.folder import TokenFolder
from simclr_dist.errors import DataError

MOST_FEATURES = 8192
FITTED_TO = 50_000  # samples, evenly spread

Decode = Callable[[NDArray[np.int64]], str]

OF_TEXTS: dict[str, dict[str, Any]] = {
    "TF-IDF": {},
    "character n-grams": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}
OF_PROTEINS: dict[str, dict[str, Any]] = {
    "amino acids": {"analyzer": "char", "lowercase": False},
    "3-mers": {"analyzer": "char", "ngram_range": (3, 3), "lowercase": False},
}


class Counts(nn.Module):
    """Tokens [n, T] to TF-IDF [n, features]. vectorizer: a fitted one of scikit-learn."""

    def __init__(self, vectorizer: Any, decode: Decode) -> None:
        super().__init__()
        self._vectorizer, self._decode = vectorizer, decode

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.cpu().numpy()
        found = self._vectorizer.transform(self._decode(row[row != 0] - 1) for row in rows)
        return torch.from_numpy(found.toarray().astype(np.float32)).to(tokens.device)


def baselines(folder: TokenFolder) -> Mapping[str, nn.Module]:
    """Fitted to the samples of `folder`. Raises DataError without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise DataError("baselines of tokens need scikit-learn: pip install 'simclr-dist[text]'") from None
    of_texts = folder.vocabulary.what == "text"
    decode = _decoder(folder) if of_texts else alphabet.decode
    chosen = np.unique(np.linspace(0, len(folder) - 1, min(FITTED_TO, len(folder))).astype(np.int64))
    documents = [decode(folder.sample(i)) for i in chosen]
    return {
        name: Counts(TfidfVectorizer(max_features=MOST_FEATURES, sublinear_tf=True, **settings).fit(documents), decode)
        for name, settings in (OF_TEXTS if of_texts else OF_PROTEINS).items()
    }


def _decoder(folder: TokenFolder) -> Decode:
    from simclr_dist.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder.path)
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
