"""The token folder: many sequences of token ids in a few files that are mapped into memory.

    tokens.npy       uint16 or uint32 [N]: the ids of all samples, one after another, without special tokens
    offsets.npy      int64 [n + 1]: sample i is tokens[offsets[i] : offsets[i + 1]]
    content_ids.npy  int64 [n]: the same for samples of equal tokens: the number of the first of them
    labels.npy       int64 [n], -1 where there is none
    tokenizer.json   what made the ids; proteins have an alphabet instead (alphabet.py)
    MANIFEST.json    how to read them, what was left out, and the SHA-256 of each file

It appears whole or not at all. Nothing in it is trusted: shapes, numbers and digests are checked before they are used.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.atomic import replace_text, replaces_folder
from simclr_dist.bounded_json import read_json
from simclr_dist.data.account import Account
from simclr_dist.data.digest_cache import digest_once
from simclr_dist.errors import DataError

MANIFEST, TOKENIZER = "MANIFEST.json", "tokenizer.json"
ARRAYS = "tokens", "offsets", "content_ids", "labels"
MOST_TOKENS_OF_SAMPLE = 1 << 20
LARGEST_VOCABULARY = 1 << 24
_FORMAT = 1
_CHUNK = 1 << 22  # tokens looked at together


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean, as far as training needs to know."""

    what: str
    """`text` or `proteins`."""
    size: int
    """Ids are 0 .. size - 1."""
    digest: str
    """Of the tokenizer or alphabet."""
    prefix: tuple[int, ...] = ()
    """Special tokens that stand before each sequence that an encoder sees, such as [CLS]."""
    suffix: tuple[int, ...] = ()
    mask: int | None = None
    """The token that hides another; None: it has none."""

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True)
class TokenFolder:
    """An open folder. Letters: n samples, N tokens."""

    path: Path
    vocabulary: Vocabulary
    tokens: NDArray[np.unsignedinteger[Any]] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    content_ids: NDArray[np.int64] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    account: Account
    digests: Mapping[str, str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[n], without special tokens."""
        return np.diff(self.offsets)

    def sample(self, i: int) -> NDArray[np.int64]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """CONTENT-TOKENIZER: of all samples, labels and class names; and of what made the ids. Cheap: it is written."""
        parts = [self.digests[name] for name in ARRAYS]
        content = hashlib.sha256(json.dumps([parts, list(self.class_names)]).encode()).hexdigest()
        return f"{content[:32]}-{self.vocabulary.digest[:16]}"

    def verified_fingerprint(self) -> str:
        """The fingerprint, after each file was read and found to be what MANIFEST.json says. Raises DataError."""
        for name in ARRAYS:
            file = self.path / f"{name}.npy"
            found = digest_once(_identity(file), lambda file=file: _sha256(file))  # type: ignore[misc]
            if found != self.digests[name]:
                raise _broken(self.path, f"{file.name} is not what was written: its SHA-256 is {found[:12]}…")
        return self.fingerprint

    @property
    def num_bytes(self) -> int:
        return self.tokens.nbytes


def is_token_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / "tokens.npy").is_file()


def open_tokens(path: str | Path) -> TokenFolder:
    """Raises DataError where it is none, or where what it says of itself does not fit."""
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no token folder (it has no {MANIFEST}); write one with `simclr-dist prepare --kind text|proteins`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path / MANIFEST}: cannot be read: {error}") from None
    try:
        if manifest["format"] != _FORMAT:
            raise _broken(path, f"its format is {manifest['format']!r}, and this version reads {_FORMAT}")
        vocabulary, class_names = _vocabulary(manifest["vocabulary"]), tuple(map(str, manifest["class_names"]))
        account, digests = Account.from_json(manifest["account"]), dict(manifest["sha256"])
        digests = {name: str(digests[name]) for name in ARRAYS}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise _broken(path, f"{MANIFEST} is incomplete: {error}") from None
    arrays = {name: _load(path / f"{name}.npy") for name in ARRAYS}
    found = TokenFolder(
        path,
        vocabulary,
        class_names=class_names,
        account=account,
        digests=digests,
        **arrays,  # type: ignore[arg-type]
    )
    _check(found)
    return found


def _vocabulary(given: dict[str, Any]) -> Vocabulary:
    """Raises KeyError, TypeError or ValueError."""
    mask = given["mask"]
    found = Vocabulary(
        str(given["what"]),
        int(given["size"]),
        str(given["digest"]),
        tuple(map(int, given["prefix"])),
        tuple(map(int, given["suffix"])),
        None if mask is None else int(mask),
    )
    special = [*found.prefix, *found.suffix, *([] if found.mask is None else [found.mask])]
    if not 0 < found.size <= LARGEST_VOCABULARY or not all(0 <= id < found.size for id in special):
        raise ValueError(f"ids {special} of a vocabulary of {found.size}")
    return found


def _load(file: Path) -> NDArray[Any]:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}; prepare the folder again") from None


def _check(found: TokenFolder) -> None:
    """Raises DataError: whatever indexes with these numbers afterwards stays within the arrays."""
    n = len(found.labels) if found.labels.ndim == 1 else 0
    for name, wanted in (("offsets", (n + 1,)), ("content_ids", (n,)), ("labels", (n,))):
        array = getattr(found, name)
        if array.shape != wanted or array.dtype != np.int64 or not n:
            raise _broken(found.path, f"{name}.npy is {array.dtype} {array.shape}, not int64 {wanted}")
    if found.tokens.ndim != 1 or found.tokens.dtype not in (np.uint16, np.uint32):
        raise _broken(found.path, f"tokens.npy is {found.tokens.dtype} {found.tokens.shape}")
    lengths = found.lengths
    if found.offsets[0] != 0 or found.offsets[-1] != len(found.tokens) or lengths.min() < 1:
        raise _broken(found.path, "offsets.npy does not divide tokens.npy into samples")
    if lengths.max() > MOST_TOKENS_OF_SAMPLE:
        raise _broken(found.path, f"a sample has {lengths.max():,} tokens; the most are {MOST_TOKENS_OF_SAMPLE:,}")
    if found.labels.min() < -1 or found.labels.max() >= len(found.class_names):
        raise _broken(found.path, f"labels.npy names class {found.labels.max()} of {len(found.class_names)}")
    largest = max(int(found.tokens[i : i + _CHUNK].max()) for i in range(0, len(found.tokens), _CHUNK))
    if largest >= found.vocabulary.size:
        raise _broken(found.path, f"tokens.npy has id {largest}, and its vocabulary {found.vocabulary.size} ids")


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path}: a broken token folder: {what}; prepare it again")


def _identity(file: Path) -> tuple[str, int, int, int]:
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class TokenWriter:
    """Takes samples one after another; `writes_tokens` makes the folder of them."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self._dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
        self._raw = (folder / "tokens.raw").open("wb")
        self._offsets, self._content_ids = [0], list[int]()
        self._labels, self._classes = list[int](), dict[str, int]()
        self._first: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    @property
    def num_repeated(self) -> int:
        """How many samples have the tokens of one before them."""
        return len(self._labels) - len(self._first)

    def add(self, ids: Sequence[int] | NDArray[Any], label: str = "") -> None:
        """ids: at least one, each below the vocabulary's size. label: the name of its class; empty: it has none."""
        data = np.asarray(ids, self._dtype).tobytes()
        content = hashlib.blake2b(data, digest_size=16).digest()
        self._content_ids.append(self._first.setdefault(content, len(self._labels)))
        self._raw.write(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._labels.append(self._classes.setdefault(label, len(self._classes)) if label else -1)

    @property
    def class_names(self) -> list[str]:
        return sorted(self._classes)

    def finish(self, account: Account, **more: Any) -> None:
        """Writes all files. more: further facts for MANIFEST.json."""
        self._raw.close()
        raw = self.folder / "tokens.raw"
        with raw.open("rb") as source:
            tokens = np.lib.format.open_memmap(
                self.folder / "tokens.npy", mode="w+", dtype=self._dtype, shape=(self.num_tokens,)
            )
            for i in range(0, len(tokens), _CHUNK):
                part = tokens[i : i + _CHUNK]
                part[:] = np.frombuffer(source.read(part.nbytes), self._dtype)
            tokens.flush()
        raw.unlink()
        number = {self._classes[name]: i for i, name in enumerate(self.class_names)} | {-1: -1}
        labels = [number[label] for label in self._labels]
        for name, values in zip(ARRAYS[1:], (self._offsets, self._content_ids, labels), strict=True):
            np.save(self.folder / f"{name}.npy", np.array(values, np.int64))
        v = self.vocabulary
        manifest = {
            "format": _FORMAT,
            "vocabulary": {
                "what": v.what,
                "size": v.size,
                "digest": v.digest,
                "prefix": v.prefix,
                "suffix": v.suffix,
                "mask": v.mask,
            },
            "num_samples": len(self),
            "num_tokens": self.num_tokens,
            "class_names": self.class_names,
            "account": account.to_json(),
            "sha256": {name: _sha256(self.folder / f"{name}.npy") for name in ARRAYS},
            **more,
        }
        replace_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


@contextmanager
def writes_tokens(out: Path, vocabulary: Vocabulary, *, overwrite: bool = False) -> Iterator[TokenWriter]:
    """What it yields takes samples, and `finish`. The folder appears when the block ends.

    Raises DataError where something stands at `out` that may not be replaced.
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out}: exists already; --overwrite replaces it")
    if out.exists() and not is_token_folder(out):
        raise DataError(f"{out}: is no token folder, so it is not replaced; choose another name")
    with replaces_folder(out) as folder:
        writer = TokenWriter(folder, vocabulary)
        try:
            yield writer
        finally:
            writer._raw.close()


def same_tokens(tokens: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n]: for each stretch of `tokens`, the number of the first of equal content."""
    first: dict[bytes, int] = {}
    found = np.empty(len(starts), np.int64)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        content = hashlib.blake2b(np.ascontiguousarray(tokens[start : start + length]).tobytes(), digest_size=16)
        found[i] = first.setdefault(content.digest(), i)
    return found


def folder_size(path: Path) -> int:
    """Bytes; 0 where there is none."""
    return 0 if not path.is_dir() else sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
