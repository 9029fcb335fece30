"""Proteins need no tokenizer: their letters are their tokens (data/proteins.py)."""

from __future__ import annotations

import hashlib
import string

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.proteins import AMINO_ACIDS, LETTERS, MASK, UNKNOWN
from simclr_dist.data.tokens.folder import Vocabulary

_GAPS = b"-."

PROTEINS = Vocabulary("proteins", len(LETTERS), hashlib.sha256(LETTERS.encode()).hexdigest(), mask=MASK)

_NOT_A_LETTER = 255
_IDS = np.full(256, _NOT_A_LETTER, np.uint8)
for _letter in string.ascii_uppercase:
    _id = AMINO_ACIDS.index(_letter) if _letter in AMINO_ACIDS else UNKNOWN
    _IDS[[ord(_letter), ord(_letter.lower())]] = _id


def encode(residues: bytes) -> NDArray[np.uint8]:
    """Ids [length] of a sequence in one-letter code, small letters too. Gaps (- and .) and a stop (*) at its end are no
    residues. Letters of no single amino acid (B, J, O, U, X, Z) are unknown. Raises ValueError for other signs.
    """
    residues = residues.rstrip(b"*").translate(None, _GAPS)
    ids = _IDS[np.frombuffer(residues, np.uint8)]
    if (wrong := ids == _NOT_A_LETTER).any():
        raise ValueError(f"{chr(residues[int(wrong.argmax())])!r} is no residue")
    return ids


def decode(ids: NDArray[np.integer]) -> str:
    return "".join(LETTERS[i] for i in ids)
