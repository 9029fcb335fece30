"""Writes a token folder: texts by a tokenizer, proteins by their letters. All that is found is taken, or counted."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_dist.data.account import Account
from simclr_dist.data.tokens import alphabet, fasta, tokenizer
from simclr_dist.data.tokens.files import plain_suffix
from simclr_dist.data.tokens.folder import MOST_TOKENS_OF_SAMPLE, TOKENIZER, TokenWriter, Vocabulary, writes_tokens
from simclr_dist.data.tokens.tally import Tally
from simclr_dist.data.tokens.texts import Columns, Text, read_texts
from simclr_dist.errors import DataError

TRAINED_ON = 200_000  # texts; more change a small vocabulary little
MOST_UNKNOWN = 0.5
_TOGETHER = 1024  # texts that are tokenised at once


@dataclass(frozen=True)
class PreparedTokens:
    """What was written."""

    path: Path
    account: Account
    vocabulary: Vocabulary
    num_tokens: int
    longest: int
    class_names: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Sequence:
    ids: np.ndarray
    name: str
    label: str


def prepare_texts(
    source: Path,
    out: Path,
    *,
    tokenizer_at: Path | None = None,
    vocabulary_size: int = 8192,
    max_tokens: int = 1024,
    columns: Columns | None = None,
    encoding: str = "utf-8",
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> PreparedTokens:
    """tokenizer_at: a tokenizer.json or a folder with one; None: one of `vocabulary_size` tokens is trained on the
    texts. max_tokens: of a text, without special tokens; longer ones are cut. Raises DataError.
    """
    begin = time.monotonic()
    columns = columns or Columns()
    how, texts = read_texts(source, columns, encoding)
    if tokenizer_at is None:
        learnt_from = (text.text for text in itertools.islice(texts, TRAINED_ON) if text.text.strip())
        chosen = tokenizer.train_tokenizer(learnt_from, vocabulary_size)
        _, texts = read_texts(source, columns, encoding)
        how += f"; a tokenizer of {vocabulary_size:,} tokens at most, trained on them"
    else:
        chosen = tokenizer.load_tokenizer(tokenizer_at)
        how += f"; tokenizer of {tokenizer_at}"
    vocabulary = tokenizer.vocabulary_of(chosen)
    left_out, notes, unknown = Tally(), Tally(), Unknown(tokenizer.unknown_token(chosen))

    def sequences() -> Iterator[_Sequence]:
        for part in _groups(texts, _TOGETHER):
            filled = [text for text in part if text.text.strip()]
            for text in part:
                if not text.text.strip():
                    left_out.add("empty", text.name)
            for text, found in zip(
                filled, chosen.encode_batch([t.text for t in filled], add_special_tokens=False), strict=True
            ):
                ids = np.array(found.ids, np.int64)
                if not len(ids):
                    left_out.add("nothing of it is a token", text.name)
                    continue
                unknown.count(ids)
                yield _Sequence(ids, text.name, text.label)

    with writes_tokens(out, vocabulary, overwrite=overwrite) as writer:
        longest = _write(writer, sequences(), max_tokens, notes, limit)
        if unknown.share > MOST_UNKNOWN:
            raise DataError(
                f"{source}: {unknown.share:.0%} of its tokens are unknown to the tokenizer of {tokenizer_at}; it is of "
                "another language or another kind of text. Name one that fits, or leave --tokenizer out"
            )
        how += f", to which {unknown.share:.1%} of the tokens are unknown" if unknown.share else ""
        account = Account(str(source), how, len(writer), left_out.groups, notes.groups, "text")
        _check(writer, account, strict)
        (writer.folder / TOKENIZER).write_text(chosen.to_str(), encoding="utf-8")
        writer.finish(account)
    return _prepared(out, writer, account, vocabulary, longest, begin)


def prepare_proteins(
    source: Path,
    out: Path,
    *,
    label_pattern: str | None = None,
    max_tokens: int = 1024,
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> PreparedTokens:
    """From FASTA. label_pattern: finds the class in a header, its first group if it has one. Raises DataError."""
    begin = time.monotonic()
    if plain_suffix(source) not in fasta.SUFFIXES:
        raise DataError(f"{source}: proteins are read from FASTA ({', '.join(fasta.SUFFIXES)}, also .gz)")
    try:
        pattern = re.compile(label_pattern) if label_pattern else None
    except re.error as error:
        raise DataError(f"--label-pattern: {label_pattern!r} is no regular expression: {error}") from None
    left_out, notes, unknown = Tally(), Tally(), Unknown(alphabet.UNKNOWN)
    nucleotides: list[str] = []
    total = 0

    def sequences() -> Iterator[_Sequence]:
        nonlocal total
        for record in fasta.read_fasta(source):
            total += 1
            try:
                ids = alphabet.encode(record.residues)
            except ValueError as error:
                left_out.add(str(error), record.name)
                continue
            if not len(ids):
                left_out.add("has no residues", record.name)
                continue
            if fasta.looks_like_nucleotides(record.residues):
                nucleotides.append(record.name)
            unknown.count(ids)
            if (ids == alphabet.UNKNOWN).any():
                notes.add("unknown residues (B, J, O, U, X or Z) in it", record.name)
            yield _Sequence(ids, record.name, fasta.label_of(record.header, pattern))

    with writes_tokens(out, alphabet.PROTEINS, overwrite=overwrite) as writer:
        longest = _write(writer, sequences(), max_tokens, notes, limit)
        if len(nucleotides) > max(1, total // 2):
            raise DataError(
                f"{source}: looks like nucleotides ({nucleotides[0]} and {len(nucleotides) - 1:,} more have no letters "
                "but A, C, G, T, U and N), and proteins are wanted: translate it first"
            )
        how = f"FASTA{f', classes by {label_pattern}' if label_pattern else ''}"
        how += f"; {unknown.share:.2%} of the residues are unknown" if unknown.share else ""
        account = Account(str(source), how, len(writer), left_out.groups, notes.groups, "protein")
        _check(writer, account, strict)
        writer.finish(account)
    return _prepared(out, writer, account, alphabet.PROTEINS, longest, begin)


class Unknown:
    """The share of tokens with the id that stands for unknown ones."""

    def __init__(self, id: int | None) -> None:
        self._id, self._found, self._all = id, 0, 0

    def count(self, ids: np.ndarray) -> None:
        self._all += len(ids)
        self._found += 0 if self._id is None else int((ids == self._id).sum())

    @property
    def share(self) -> float:
        return self._found / max(self._all, 1)


def _write(
    writer: TokenWriter, sequences: Iterable[_Sequence], max_tokens: int, notes: Tally, limit: int | None
) -> int:
    """Returns the length of the longest before it was cut."""
    most, longest = min(max_tokens, MOST_TOKENS_OF_SAMPLE), 0
    for sequence in itertools.islice(sequences, limit):
        longest = max(longest, len(sequence.ids))
        if len(sequence.ids) > most:
            notes.add(f"cut to {most:,} tokens", sequence.name)
        writer.add(sequence.ids[:most], sequence.label)
    return longest


def _check(writer: TokenWriter, account: Account, strict: bool) -> None:
    problem = "" if len(writer) else "holds nothing to train on"
    if strict and account.num_left_out:
        problem = f"{account.num_left_out:,} are left out, and --strict is given"
    if problem:
        raise DataError("\n".join([f"{account.source}: {problem}", *(f"  {line}" for line in account.remarks())]))


def _groups(texts: Iterator[Text], size: int) -> Iterator[list[Text]]:
    while part := list(itertools.islice(texts, size)):
        yield part


def _prepared(
    out: Path, writer: TokenWriter, account: Account, vocabulary: Vocabulary, longest: int, begin: float
) -> PreparedTokens:
    if writer.num_repeated:
        tally = f"{writer.num_repeated:,} have the tokens of another: they are no negatives of it"
        account = Account(
            account.source, f"{account.layout}; {tally}", account.taken, account.left_out, account.notes, account.noun
        )
    names = tuple(writer.class_names)
    return PreparedTokens(out, account, vocabulary, writer.num_tokens, longest, names, time.monotonic() - begin)
