"""Texts without an encoder: words and letters, weighted by how rare they are. What a trained encoder has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simclr_dist.evaluation.retrieval import Similarities

MISSING = "TF-IDF as a baseline needs scikit-learn: pip install 'simclr-dist[eval]'"
_ANALYSERS: dict[str, dict[str, Any]] = {
    "TF-IDF of words": {"analyzer": "word", "token_pattern": r"(?u)\b\w+\b"},
    "TF-IDF of 3 to 5 letters": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}


def text_baselines(a: Sequence[str], b: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Sparse unit rows of both sides' texts, by name, fitted to these texts. ImportError: no scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = {}
    for name, settings in _ANALYSERS.items():
        rows = TfidfVectorizer(**settings).fit_transform([*a, *b]).tocsr()
        found[name] = rows[: len(a)], rows[len(a) :]
    return found


def sparse_cosines(queries: Any, gallery: Any) -> Similarities:
    """Of sparse unit rows."""
    return lambda rows, columns: torch.from_numpy((queries[rows] @ gallery[columns].T).toarray())


def sparse_pair_cosines(a: Any, b: Any) -> Tensor:
    """[n]: of each row of a with the same row of b, which are sparse unit rows."""
    return torch.from_numpy(a.multiply(b).sum(axis=1).A1)
