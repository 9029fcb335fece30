"""Texts and proteins: token ids in, whatever they stood for.

A view is int64 [V, B, T]: token ids plus one, special tokens included, then zeros for padding. So an encoder's mask is
`tokens != 0`, whatever its tokenizer calls padding, and `tokens - 1` are the tokenizer's own ids. T is that of the
global batch, so nothing depends on the number of processes. `Batch.group_ids` are the same for samples of equal
content: the loss never makes them negatives of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import OURS_OF_TOKENS, AugmentConfig, ModelConfig
from simclr_dist.config.schema import TokensConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.data.order import Order
from simclr_dist.data.randomness import keys
from simclr_dist.data.tokens import alphabet
from simclr_dist.data.tokens.folder import MANIFEST, TokenFolder, folder_size, open_tokens, same_tokens
from simclr_dist.data.tokens.tokenizer import load_tokenizer, vocabulary_of
from simclr_dist.data.tokens.views import beginnings, content_limit, padded_length, spans, written
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds.keyed_loader import KeyedLoader
from simclr_dist.kinds.kind import Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simclr_dist.kinds.kind import SampleBatch
    from simclr_dist.network.hugging_face import HuggingFaceEncoder
    from simclr_dist.network.inputs import Inputs
    from simclr_dist.parallel.distributed import World


class Tokens(Kind):
    """Samples are sequences of token ids in a token folder (data/tokens/folder.py)."""

    what: ClassVar[str]
    """What the folder's manifest calls its content."""
    draws_views: ClassVar[bool] = True
    """False: views are the sides of a pair, and differ by themselves."""

    def folder(self, source: str) -> TokenFolder:
        """It is kept in this process until it changes. Raises DataError, also where its tokenizer is another than that
        of data.train: an encoder knows the ids of one.
        """
        found = _opened(source)
        if found.vocabulary.what != self.what:
            raise DataError(f"{source}: holds {found.vocabulary.what}, and data.kind is {self.data.kind}")
        if source != self.data.train and found.vocabulary != (train := _opened(self.data.train)).vocabulary:
            raise DataError(
                f"{source}: was prepared with another tokenizer than {train.path}; prepare it again with "
                f"--tokenizer {train.path}"
            )
        return found

    @cached_property
    def train(self) -> TokenFolder:
        found, tokens = self.folder(self.data.train), self.data.tokens
        if content_limit(tokens, found.vocabulary) < 1:
            raise ConfigError(
                [f"data.tokens.max_tokens: {tokens.max_tokens} leaves no room beside the special tokens; raise it"]
            )
        if tokens.mask_p and found.vocabulary.mask is None:
            raise ConfigError(
                [f"data.tokens.mask_p: the tokenizer of {found.path} has no mask token; set it to 0, or use mutate_p"]
            )
        return found

    @cached_property
    def seen(self) -> NDArray[np.int64]:
        """[n]: how many tokens of its own an encoder sees of each sample of data.train, as evaluations show it."""
        return np.minimum(self.train.lengths, content_limit(self.data.tokens, self.train.vocabulary))

    @property
    def inputs(self) -> Inputs:
        """The longest that there are: for them there must be memory."""
        import torch

        from simclr_dist.network.inputs import Draw, Inputs

        def of_length(length: float) -> Draw:
            T = padded_length(np.array([length]), vocabulary)
            return lambda n: torch.randint(1, vocabulary.size + 1, (n, T))

        vocabulary, tokens = self.train.vocabulary, self.data.tokens
        longest, mean = self.seen.max(), self.seen.mean()
        if tokens.views == "spans":
            mean = min(mean, (tokens.span_min + tokens.span_max) / 2)
        cut = int((self.train.lengths > self.seen).sum()) if tokens.views == "whole" else 0
        size = f"at most {longest + vocabulary.num_special} tokens" + (f" ({cut:,} longer ones are cut)" if cut else "")
        return Inputs(f"{self.noun}s", size, of_length(longest), mean=of_length(mean))

    @property
    def input_signature(self) -> Mapping[str, Any]:
        vocabulary = self.train.vocabulary
        return {
            "max_tokens": self.data.tokens.max_tokens,
            "tokenizer": vocabulary.digest,
            "vocabulary": vocabulary.size,
        }

    def describe(self, source: str) -> DatasetInfo:
        folder = self.folder(source)
        return DatasetInfo(
            len(folder),
            folder.class_names,
            folder.fingerprint,
            folder.verified_fingerprint,
            folder.labels,
            folder.account,
        )

    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        info, folder, tokens = self.describe(self.data.train), self.train, self.data.tokens
        seen = self.seen
        padded = np.minimum(seen, tokens.span_max) if tokens.views == "spans" else seen  # as long as a view can be
        lengths = padded if tokens.length_window else None
        order = Order(len(folder), global_batch_size, seed, lengths=lengths, length_window=tokens.length_window)
        groups = content_ids(folder, tokens) if tokens.views == "whole" else folder.content_ids

        def draw(epoch: int, step: int) -> Batch:
            return self._draw(order, groups, epoch, step, world)

        return KeyedLoader(info, order, draw, device, self.data.batches_ahead)

    def _draw(self, order: Order, groups: NDArray[np.int64], epoch: int, step: int, world: World) -> Batch:
        import torch

        folder, V, tokens = self.train, self.data.num_views, self.data.tokens
        batch = order.sample_ids(epoch, step)  # of all ranks: it decides T
        own = slice(world.rank * len(batch) // world.size, (world.rank + 1) * len(batch) // world.size)
        ids = order.sample_ids(epoch, step, world.rank, world.size)
        view_keys = keys(order.seed, epoch, batch[None], np.arange(V)[:, None])
        if tokens.views == "spans":
            parts = spans(folder, batch, view_keys, tokens)
        else:
            whole = beginnings(folder, batch, tokens)
            parts = replace(whole, starts=np.tile(whole.starts, (V, 1)), lengths=np.tile(whole.lengths, (V, 1)))
        T = padded_length(parts.lengths, folder.vocabulary)
        views = written(folder, parts[:, own], T, view_keys[:, own], tokens)
        labels, group_ids = (torch.from_numpy(x[ids]) for x in (folder.labels, groups))
        return Batch(torch.from_numpy(views), torch.from_numpy(ids.copy()), labels, epoch, ids, group_ids)

    def check_encoder(self, encoder: nn.Module, model: ModelConfig, section: str = "model") -> None:
        from simclr_dist.network.hugging_face import HuggingFaceEncoder
        from simclr_dist.network.trial import normalised_over_positions

        if names := normalised_over_positions(encoder, self.inputs):
            raise ConfigError(
                [
                    f"{section}.encoder: {model.encoder} has BatchNorm over tokens ({', '.join(names[:3])}), whose "
                    "statistics would be those of the padding, too; use LayerNorm"
                ]
            )
        if isinstance(encoder, HuggingFaceEncoder):
            self._check_folder(encoder)
        check_transformer(model, encoder, self.train, self.noun, section)

    def _check_folder(self, encoder: HuggingFaceEncoder) -> None:
        """Whether it knows these tokens, and makes views of one sample differ."""
        tokens, folder, vocabulary = self.data.tokens, encoder.folder, self.train.vocabulary
        if (encoder.letters is not None) != (self.what == "proteins"):
            knows = "the letters of proteins" if encoder.letters is not None else "a tokenizer of texts"
            raise ConfigError([f"model.encoder: {folder} knows {knows}, and data.kind is {self.data.kind}"])
        if self.what == "text":
            theirs = vocabulary_of(load_tokenizer(folder))
            if theirs.digest != vocabulary.digest:
                raise ConfigError(
                    [
                        f"model.encoder: the tokenizer of {folder} ({theirs.digest[:12]}) is not the one that "
                        f"{self.train.path} was prepared with ({vocabulary.digest[:12]}), so it would take tokens for "
                        f"others; prepare the texts again with --tokenizer {folder}"
                    ]
                )
            if vocabulary.size > encoder.vocabulary:
                raise ConfigError(
                    [f"model.encoder: {folder} has {encoder.vocabulary:,} tokens, its tokenizer {vocabulary.size:,}"]
                )
        if (
            self.draws_views
            and tokens.views == "whole"
            and not (tokens.mask_p or tokens.mutate_p or encoder.has_dropout)
        ):
            raise ConfigError(
                [
                    f"the views of a {self.noun} would be the same: data.tokens.views is whole and the config.json of "
                    f"{folder} has no dropout; set data.tokens.mask_p above 0, or data.tokens.views to spans"
                ]
            )

    def show(self, source: str, ids: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
        folder = self.folder(source)
        seen = beginnings(folder, ids, self.data.tokens)
        stretches = zip(seen.starts.tolist(), seen.lengths.tolist(), strict=True)
        return self._in_letters([folder.tokens[start : start + length] for start, length in stretches]), ids

    def show_views(self, views: Tensor) -> list[list[str]]:
        """Special tokens too."""
        return [self._in_letters([row[row != 0] - 1 for row in view.numpy()]) for view in views]

    def _in_letters(self, samples: Sequence[NDArray[Any]]) -> list[str]:
        if self.what == "proteins":
            return [alphabet.decode(ids) for ids in samples]
        tokenizer = load_tokenizer(self.train.path)
        return [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in samples]

    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        yield from self.batches_of(self.folder(source), ids, batch_size)

    def batches_of(self, folder: TokenFolder, ids: NDArray[np.int64], batch_size: int) -> Iterator[SampleBatch]:
        """`evaluation_batches` of an open folder."""
        import torch

        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            seen = beginnings(folder, part, self.data.tokens)
            tokens = written(folder, seen, padded_length(seen.lengths, folder.vocabulary))
            yield torch.from_numpy(tokens), torch.from_numpy(folder.labels[part]), torch.from_numpy(part.copy())

    def baselines(self, train: str) -> Mapping[str, nn.Module]:
        from simclr_dist.kinds.token_baselines import baselines

        return baselines(self.folder(train))

    def size_on_disk(self, source: str) -> int:
        return folder_size(Path(source))


def content_ids(folder: TokenFolder, config: TokensConfig) -> NDArray[np.int64]:
    """[n]: the same for samples of which an encoder sees the same, the number of the first of them."""
    seen = np.minimum(folder.lengths, content_limit(config, folder.vocabulary))
    if (seen == folder.lengths).all():
        return np.asarray(folder.content_ids)
    return same_tokens(folder.tokens, folder.offsets[:-1], seen)


def check_transformer(model: ModelConfig, encoder: nn.Module, folder: TokenFolder, noun: str, section: str) -> None:
    """Raises ConfigError where the settings of an encoder, in `section`, do not fit the tokens of `folder`."""
    vocabulary = folder.vocabulary
    if model.encoder in OURS_OF_TOKENS and model.vocabulary != vocabulary.size:
        raise ConfigError(
            [
                f"{section}.vocabulary: is {model.vocabulary}, but {folder.path} has {vocabulary.size:,} tokens; "
                f"set it to {vocabulary.size}"
            ]
        )
    if model.pooling == "first" and not (vocabulary.prefix or getattr(encoder, "letters", None)):
        raise ConfigError(
            [
                f"{section}.pooling=first takes the first token for h, which must be a special one: the tokenizer of "
                f"{folder.path} puts none before a {noun}; set it to mean"
            ]
        )


class Texts(Tokens):
    noun: ClassVar[str] = "text"
    what: ClassVar[str] = "text"
    evaluations: ClassVar[tuple[str, ...]] = ("knn", "linear", "similarity")

    def read(self, folder: TokenFolder, ids: NDArray[np.int64]) -> list[str]:
        """The texts with these numbers, as far as the tokenizer keeps them. Raises DataError."""
        from simclr_dist.data.tokens.tokenizer import load_tokenizer

        return load_tokenizer(folder.path).decode_batch([folder.sample(int(i)).tolist() for i in ids])

    def tokenised(self, texts: Sequence[str]) -> TokenFolder:
        """As a folder in memory, by the tokenizer of data.train; a text without a token is empty. Raises DataError."""
        from simclr_dist.data.tokens.tokenizer import digest, load_tokenizer

        tokenizer, vocabulary = load_tokenizer(self.train.path), self.train.vocabulary
        if digest(tokenizer) != vocabulary.digest:
            raise DataError(f"{self.train.path}: its tokenizer is another than it was prepared with; prepare it again")
        encoded = tokenizer.encode_batch([text.strip() for text in texts], add_special_tokens=False)
        every = [found.ids for found in encoded]
        tokens = np.array([id for ids in every for id in ids] or [0], np.uint32)
        offsets = np.cumsum([0, *map(len, every)], dtype=np.int64)
        numbers, unlabelled = np.arange(len(every)), np.full(len(every), -1)
        return replace(
            self.train,
            tokens=tokens,
            offsets=offsets,
            content_ids=numbers,
            labels=unlabelled,
            class_names=(),
            digests={},
        )


class Proteins(Tokens):
    noun: ClassVar[str] = "protein"
    what: ClassVar[str] = "proteins"


_OPENED: dict[str, tuple[int, TokenFolder]] = {}


def _opened(source: str) -> TokenFolder:
    manifest = Path(source) / MANIFEST
    stamp = manifest.stat().st_mtime_ns if manifest.is_file() else -1
    if source not in _OPENED or _OPENED[source][0] != stamp:
        _OPENED[source] = stamp, open_tokens(source)
    return _OPENED[source][1]
