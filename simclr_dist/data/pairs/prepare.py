"""Writes folders of pairs from a table: two columns of texts, or a column of image names and one of their texts.

All that is found is taken, or counted and said.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.atomic import replaces_folder
from simclr_dist.config.schema import IMAGE_TEXT, TEXT_PAIRS
from simclr_dist.data.account import NAMES_SHOWN, Account, LeftOut, SourceOptions
from simclr_dist.data.beton.prepare import prepare as prepare_images
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.data.pairs.folder import (
    IMAGES,
    TEXTS,
    kind_of_folder,
    open_image_text,
    open_text_pairs,
    write_facts,
    write_offsets,
)
from simclr_dist.data.sources.images import FileImages
from simclr_dist.data.sources.lists import check_names
from simclr_dist.data.sources.open import open_source
from simclr_dist.data.tokens import tokenizer
from simclr_dist.data.tokens.folder import TOKENIZER, TokenWriter
from simclr_dist.data.tokens.prepare import MOST_UNKNOWN, TRAINED_ON, Unknown
from simclr_dist.data.tokens.tally import Tally
from simclr_dist.data.tokens.texts import Columns, Text, read_texts
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_T = TypeVar("_T")
_TOGETHER = 1024  # texts that are tokenised at once


@dataclass(frozen=True)
class PreparedPairs:
    """What was written. num_texts: in all. largest_group: of pairs that are no negatives of each other."""

    path: Path
    account: Account
    num_pairs: int
    num_texts: int
    num_tokens: int
    vocabulary_size: int
    num_groups: int
    largest_group: int
    seconds: float


def prepare_text_pairs(
    source: Path,
    out: Path,
    *,
    columns: Columns,
    tokenizer_at: Path | None = None,
    vocabulary_size: int = 8192,
    max_tokens: int = 1024,
    encoding: str = "utf-8",
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> PreparedPairs:
    """columns: two of texts. The other arguments are those of `prepare_texts`. Raises DataError."""
    begin, columns = time.monotonic(), _two(columns, "the two columns that hold the texts of a pair")
    how, chosen = _tokenizer(tokenizer_at, vocabulary_size, (text for text, _ in _texts(source, columns, encoding)))
    encoder, left_out = _Encoder(chosen, max_tokens), Tally()
    with _folder(out, overwrite) as folder:
        writer = TokenWriter(folder, tokenizer.vocabulary_of(chosen))
        for rows in _groups(itertools.islice(_rows(source, columns, encoding), limit)):
            ids = encoder.encode([text for row in rows for text in row])
            for i, (first, second) in enumerate(rows):
                if len(ids[2 * i]) and len(ids[2 * i + 1]):
                    writer.add(ids[2 * i], first.label)
                    writer.add(ids[2 * i + 1], second.label)
                else:
                    left_out.add("one of its texts is empty", _place(first))
        account = Account(str(source), f"pairs of {_quoted(columns)}; {how}", len(writer) // 2, noun="pair")
        account = replace(account, left_out=left_out.groups)
        account = _finish(folder, writer, encoder, account, strict)
        write_facts(folder, TEXT_PAIRS, columns.texts)
    pairs = open_text_pairs(out)
    return _prepared(out, account, writer, pairs.groups(pairs.texts.content_ids), begin)


def prepare_image_text(
    source: Path,
    out: Path,
    *,
    images: Path,
    columns: Columns,
    tokenizer_at: Path | None = None,
    vocabulary_size: int = 8192,
    max_tokens: int = 1024,
    encoding: str = "utf-8",
    strict: bool = False,
    overwrite: bool = False,
    options: SourceOptions | None = None,
    **settings: Any,
) -> PreparedPairs:
    """columns: the image's name and its text; a name may stand in several rows. Where `images` is a .beton file, whose
    images have no names, one column of texts: row i is that of image i.

    options, settings: of the images, as `data.beton.prepare.prepare` takes them. The other arguments are those of
    `prepare_texts`. Raises DataError: names that are not there, an image that cannot be decoded, uneven numbers.
    """
    begin, by_number = time.monotonic(), images.suffix == ".beton"
    if by_number and len(columns.texts) > 1:
        raise DataError(
            f"{images}: the images of a .beton file have no names: name the one column of texts, whose row i is that "
            "of image i, or give --images the folder that it was made of"
        )
    if not by_number:
        columns = _two(columns, "the column of the images' names and that of the texts")
    texts = (text for name, text in _named(source, columns, encoding))
    how, chosen = _tokenizer(tokenizer_at, vocabulary_size, texts)
    encoder, left_out, of_image = _Encoder(chosen, max_tokens), Tally(), dict[str, list[NDArray[np.int64]]]()
    for rows in _groups(_named(source, columns, encoding)):
        for (name, text), ids in zip(rows, encoder.encode([text for _, text in rows]), strict=True):
            if len(ids):
                of_image.setdefault(name, []).append(ids)
            else:
                left_out.add("the text is empty", text.name)
                if by_number:
                    raise DataError(f"{source}, {text.name}: is empty, and each image of {images} needs its text")
    if not of_image:
        raise DataError(f"{source}: holds no text of an image")
    with _folder(out, overwrite) as folder:
        try:
            if by_number:
                names = list(of_image)
                _copy_beton(images, folder / IMAGES, source, len(names))
                account = Account(str(source), "", len(names))
            else:
                names, account = _write_images(images, folder / IMAGES, set(of_image), source, options, settings)
        except OSError as error:
            raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
        (folder / TEXTS).mkdir()
        writer = TokenWriter(folder / TEXTS, tokenizer.vocabulary_of(chosen))
        for name in names:
            for ids in of_image[name]:
                writer.add(ids)
        how = f"images of {images} and texts of {_quoted(columns)}; {how}"
        account = replace(account, source=str(source), layout=how, left_out=(*account.left_out, *left_out.groups))
        account = _finish(folder / TEXTS, writer, encoder, account, strict)
        offsets = np.cumsum([0, *(len(of_image[name]) for name in names)], dtype=np.int64)
        both = columns.texts if len(columns.texts) > 1 else ("number", *columns.texts)
        write_facts(folder, IMAGE_TEXT, both, **write_offsets(folder, offsets))
    pairs = open_image_text(out)
    return _prepared(out, account, writer, pairs.groups(pairs.texts.content_ids), begin)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _two(columns: Columns, which: str) -> Columns:
    if len(columns.texts) != 2 or columns.texts[0] == columns.texts[1]:
        raise DataError(f"name {which}: --column FIRST --column SECOND (found {len(columns.texts)})")
    return columns


def _rows(source: Path, columns: Columns, encoding: str) -> Iterator[tuple[Text, Text]]:
    _, texts = read_texts(source, columns, encoding)
    for first in texts:  # a table gives the columns of a row one after the other
        yield first, next(texts)


def _texts(source: Path, columns: Columns, encoding: str) -> Iterator[tuple[str, str]]:
    for row in _rows(source, columns, encoding):
        for text in row:
            yield text.text, text.name


def _named(source: Path, columns: Columns, encoding: str) -> Iterator[tuple[str, Text]]:
    """The name of an image, or its number, and a text of it."""
    if len(columns.texts) == 2:
        for name, text in _rows(source, columns, encoding):
            yield PurePosixPath(name.text.strip()).as_posix(), text
        return
    for number, text in enumerate(read_texts(source, columns, encoding)[1]):
        yield str(number), text


def _groups(rows: Iterable[_T]) -> Iterator[list[_T]]:
    rows = iter(rows)
    while part := list(itertools.islice(rows, _TOGETHER)):
        yield part


def _place(text: Text) -> str:
    """The row: `line 3, premise` stands for its first column."""
    return text.name.partition(",")[0]


def _quoted(columns: Columns) -> str:
    return " and ".join(map(repr, columns.texts)) or "its lines"


# ---------------------------------------------------------------------------------------------------------------------
# The tokens


def _tokenizer(at: Path | None, size: int, texts: Iterator[Any]) -> tuple[str, Tokenizer]:
    """In a sentence what it is, and a tokenizer: that of a folder, or one that is trained on the texts."""
    if at is not None:
        return f"tokenizer of {at}", tokenizer.load_tokenizer(at)
    learnt_from = (text if isinstance(text, str) else text.text for text in itertools.islice(texts, TRAINED_ON))
    chosen = tokenizer.train_tokenizer((text for text in learnt_from if text.strip()), size)
    return f"a tokenizer of {size:,} tokens at most, trained on them", chosen


class _Encoder:
    """Texts to token ids, without special tokens; counts what is unknown to the tokenizer and what is cut."""

    def __init__(self, chosen: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self._most = chosen, max_tokens
        self.notes, self.unknown = Tally(), Unknown(tokenizer.unknown_token(chosen))

    def encode(self, texts: list[Text]) -> list[NDArray[np.int64]]:
        """One array for each; empty where nothing of the text is a token."""
        found = self.tokenizer.encode_batch([text.text.strip() for text in texts], add_special_tokens=False)
        every = [np.array(encoded.ids, np.int64) for encoded in found]
        for text, ids in zip(texts, every, strict=True):
            self.unknown.count(ids)
            if len(ids) > self._most:
                self.notes.add(f"cut to {self._most:,} tokens", text.name)
        return [ids[: self._most] for ids in every]


def _finish(folder: Path, writer: TokenWriter, encoder: _Encoder, account: Account, strict: bool) -> Account:
    """Writes the token folder; returns the account with what the encoder has to say. Raises DataError."""
    if encoder.unknown.share > MOST_UNKNOWN:
        raise DataError(
            f"{account.source}: {encoder.unknown.share:.0%} of its tokens are unknown to the tokenizer; it is of "
            "another language or another kind of text. Name one that fits, or leave --tokenizer out"
        )
    unknown = f", to which {encoder.unknown.share:.1%} of the tokens are unknown" if encoder.unknown.share else ""
    account = replace(account, layout=account.layout + unknown, notes=(*account.notes, *encoder.notes.groups))
    problem = "" if len(writer) else "holds nothing to train on"
    if strict and account.num_left_out:
        problem = f"{account.num_left_out:,} are left out, and --strict is given"
    if problem:
        raise DataError("\n".join([f"{account.source}: {problem}", *(f"  {line}" for line in account.remarks())]))
    (folder / TOKENIZER).write_text(encoder.tokenizer.to_str(), encoding="utf-8")
    writer.finish(account)
    return account


# ---------------------------------------------------------------------------------------------------------------------
# The images


def _write_images(
    images: Path, out: Path, wanted: set[str], table: Path, options: SourceOptions | None, settings: dict[str, Any]
) -> tuple[list[str], Account]:
    """The names of the images that `out` then holds, in its order, and what became of the others at the source."""
    options = options or SourceOptions()
    everything = open_source(images, options)
    if not isinstance(everything, FileImages):
        raise DataError(f"{images}: its images have no names; make a .beton file of it, and join by row (see docs)")
    known = {name.removeprefix(everything.root) for name, *_ in everything.entries}
    check_names(sorted(wanted), known, str(table), str(images))
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "names.txt"
        listed.write_text("".join(f"{name}\n" for name in sorted(wanted)), "utf-8", "surrogateescape")
        chosen = replace(options, files=str(listed), layout="classes" if everything.class_names else "flat")
        source = open_source(images, chosen)
        names = [source.name(i).removeprefix(everything.root) for i in range(len(source.labels))]
        info = prepare_images(images, out, options=chosen, **settings)
    skipped = {name.removeprefix(everything.root) for name in info.skipped_names}
    names = [name for name in names if name not in skipped]
    assert info.num_samples == len(names)
    left_out = list(everything.account.left_out)
    for reason, others in (("an image without a text", known - wanted), ("an image that cannot be decoded", skipped)):
        if others:
            left_out.append(LeftOut(reason, len(others), tuple(sorted(others)[:NAMES_SHOWN])))
    return names, Account(str(table), "", len(names), tuple(left_out))


def _copy_beton(images: Path, out: Path, table: Path, num_texts: int) -> None:
    """Raises DataError where there is not a text for each image."""
    with open_beton(images) as beton:
        if beton.num_samples != num_texts:
            raise DataError(
                f"{table} has {num_texts:,} texts, and {images} has {beton.num_samples:,} images: row i must be the "
                "text of image i"
            )
    shutil.copyfile(images, out)
    if sidecar_path(images).exists():
        shutil.copyfile(sidecar_path(images), sidecar_path(out))


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@contextmanager
def _folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when the block ends. Raises DataError."""
    if out.exists() and not overwrite:
        raise DataError(f"{out}: exists already; --overwrite replaces it")
    if out.exists() and kind_of_folder(out) is None:
        raise DataError(f"{out}: is no folder of pairs, so it is not replaced; choose another name")
    with replaces_folder(out) as folder:
        yield folder


def _prepared(
    out: Path, account: Account, writer: TokenWriter, groups: NDArray[np.int64], begin: float
) -> PreparedPairs:
    counts = np.bincount(groups)
    return PreparedPairs(
        path=out,
        account=account,
        num_pairs=len(groups),
        num_texts=len(writer),
        num_tokens=writer.num_tokens,
        vocabulary_size=writer.vocabulary.size,
        num_groups=int((counts > 0).sum()),
        largest_group=int(counts.max()),
        seconds=time.monotonic() - begin,
    )
