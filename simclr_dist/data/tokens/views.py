"""Views of sequences: whole ones or spans of them, some tokens masked or mutated. Pure functions of keys.

Token ids that an encoder sees are those of the folder plus one: 0 is padding, whatever the tokenizer calls its own.

Letters: V views, B samples, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import TokensConfig
from simclr_dist.data.randomness import SPAN_LENGTH, SPAN_START, TOKEN_CHANGED, TOKEN_INSTEAD, uniform
from simclr_dist.data.tokens.folder import TokenFolder, Vocabulary

PADDED_TO = 8
"""T is a multiple of it: tensor cores like that, and fewer lengths are fewer shapes."""


@dataclass(frozen=True)
class Stretches:
    """Parts of the array `tokens`, int64 of one shape [..., B]."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, chosen: Any) -> Stretches:
        return Stretches(self.starts[chosen], self.lengths[chosen])


def content_limit(config: TokensConfig, vocabulary: Vocabulary) -> int:
    """How many tokens of a sample's own an encoder sees at most."""
    return config.max_tokens - vocabulary.num_special


def beginnings(folder: TokenFolder, ids: NDArray[np.int64], config: TokensConfig) -> Stretches:
    """[B]: the samples, cut to what an encoder may see."""
    return Stretches(folder.offsets[ids], np.minimum(folder.lengths[ids], content_limit(config, folder.vocabulary)))


def spans(
    folder: TokenFolder, ids: NDArray[np.int64], view_keys: NDArray[np.uint64], config: TokensConfig
) -> Stretches:
    """[V, B]. DeCLUTR (Giorgi et al. 2021, arXiv:2006.03659), section 3.1: lengths of even views are drawn from
    Beta(4, 2), of odd ones from Beta(2, 4), between span_min and span_max. view_keys: uint64 [V, B].
    """
    drawn = np.sort(uniform(view_keys[..., None], SPAN_LENGTH + np.arange(5)), axis=-1)
    is_odd = np.arange(len(view_keys))[:, None] % 2 == 1
    share = np.where(is_odd, drawn[..., 1], drawn[..., 3])  # order statistics of 5 uniform numbers have these laws
    wanted = config.span_min + (share * (config.span_max - config.span_min + 1)).astype(np.int64)
    limit, whole = content_limit(config, folder.vocabulary), folder.lengths[ids]
    lengths = np.minimum(np.minimum(wanted, limit), whole)
    last = whole - lengths  # the last place where each may begin
    u = uniform(view_keys, SPAN_START)
    starts = (u * (last + 1)).astype(np.int64)
    if config.spans_touch:
        low = np.clip(starts[:1] - lengths, 0, last)
        high = np.clip(starts[:1] + lengths[:1], 0, last)
        starts[1:] = (low + (u * (high - low + 1)).astype(np.int64))[1:]
    return Stretches(folder.offsets[ids] + starts, lengths)


def padded_length(lengths: NDArray[Any], vocabulary: Vocabulary) -> int:
    """T for sequences of these lengths."""
    return -(-(int(lengths.max()) + vocabulary.num_special) // PADDED_TO) * PADDED_TO


def written(
    folder: TokenFolder,
    parts: Stretches,
    T: int,
    view_keys: NDArray[np.uint64] | None = None,
    config: TokensConfig | None = None,
) -> NDArray[np.int64]:
    """int64 [..., B, T]: special tokens around each part, then padding.

    view_keys, config: draw by those keys which tokens are masked and mutated; None: no token is.
    """
    v = folder.vocabulary
    place = np.arange(T) - len(v.prefix)  # among the part's own tokens
    lengths = parts.lengths[..., None]
    own = (place >= 0) & (place < lengths)
    found = folder.tokens[np.where(own, parts.starts[..., None] + place, 0)].astype(np.int64)
    if config is not None and view_keys is not None and (config.mask_p or config.mutate_p):
        _change(found, folder, place, view_keys, config)
    found = np.where(own, found + 1, 0)
    found[..., : len(v.prefix)] = np.array(v.prefix, np.int64) + 1
    for i, token in enumerate(v.suffix):
        found[place == lengths + i] = token + 1
    return found


def _change(
    found: NDArray[np.int64],
    folder: TokenFolder,
    place: NDArray[np.int64],
    view_keys: NDArray[np.uint64],
    config: TokensConfig,
) -> None:
    """Masks and mutates in place. What stands instead is drawn from all tokens of the folder, frequent ones often."""
    at = np.maximum(place, 0)
    u = uniform(view_keys[..., None], TOKEN_CHANGED + at)
    if config.mutate_p:
        mutated = (u >= config.mask_p) & (u < config.mask_p + config.mutate_p)
        other = (uniform(view_keys[..., None], TOKEN_INSTEAD + at)[mutated] * len(folder.tokens)).astype(np.int64)
        found[mutated] = folder.tokens[other]
    if config.mask_p:
        assert folder.vocabulary.mask is not None  # the kind has looked
        found[u < config.mask_p] = folder.vocabulary.mask
