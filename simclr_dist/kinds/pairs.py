"""Pairs: texts with texts, seen by one encoder; images with texts, seen by two. Views 0 and 1 are the two sides.

Pairs that share a content are of one group (`Batch.group_ids`): the loss never makes them negatives of each other, and
an evaluation takes each of them for right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig, DataConfig, ModelConfig
from simclr_dist.config.schema import IMAGE_TEXT
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.data.order import Order
from simclr_dist.data.pairs.folder import TEXTS, ImageText, TextPairs, kind_of_folder, open_image_text, open_text_pairs
from simclr_dist.data.randomness import TEXT, keys, uniform
from simclr_dist.data.tokens.views import beginnings, content_limit, padded_length, written
from simclr_dist.errors import DataError
from simclr_dist.kinds.images import Images
from simclr_dist.kinds.keyed_loader import KeyedLoader
from simclr_dist.kinds.tokens import Texts, content_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simclr_dist.kinds.kind import SampleBatch, ViewsOf
    from simclr_dist.network.inputs import Draw, Inputs
    from simclr_dist.network.simclr import SimCLR
    from simclr_dist.parallel.distributed import World


@dataclass(frozen=True)
class Side:
    """One side of the pairs of a source, as evaluations compare it with the other."""

    noun: str
    groups: NDArray[np.int64]
    """[n]: rows of equal groups on the two sides belong together."""
    batches: Callable[[NDArray[np.int64], int], Iterator[SampleBatch]]
    """Of the rows with these numbers, so many at a time."""
    to_input: Callable[[Tensor], Tensor]
    encoder: Callable[[SimCLR], nn.Module]
    """Gives what is compared."""
    texts: Callable[[], list[str]] | None = None
    """As the tokenizer reads them, for baselines; None: these are no texts."""


class PairsOfTexts(Texts):
    """A pair is two texts: a premise and what follows from it, a word and its definition, a question and its answer."""

    noun: ClassVar[str] = "pair"
    draws_views: ClassVar[bool] = False
    evaluations: ClassVar[tuple[str, ...]] = ("similarity", "retrieval")

    def pairs(self, source: str) -> TextPairs:
        """Raises DataError."""
        self.folder(source)  # of the tokenizer of data.train
        return open_text_pairs(source)

    def describe(self, source: str) -> DatasetInfo:
        pairs, info = self.pairs(source), super().describe(source)
        labels = info.labels[0::2]
        return DatasetInfo(len(pairs), info.class_names, info.fingerprint, info.digest, labels, info.account)

    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        pairs, tokens = self.pairs(self.data.train), self.data.tokens
        seen = np.minimum(pairs.texts.lengths, content_limit(tokens, pairs.texts.vocabulary))
        lengths = seen.reshape(-1, 2).max(axis=1) if tokens.length_window else None
        order = Order(len(pairs), global_batch_size, seed, lengths=lengths, length_window=tokens.length_window)
        groups = pairs.groups(content_ids(pairs.texts, tokens))

        def draw(epoch: int, step: int) -> Batch:
            import torch

            whole = order.sample_ids(epoch, step)  # of all ranks: it decides T
            ids = order.sample_ids(epoch, step, world.rank, world.size)
            T = padded_length(beginnings(pairs.texts, _sides(whole), tokens).lengths, pairs.texts.vocabulary)
            views = written(pairs.texts, beginnings(pairs.texts, _sides(ids), tokens), T)
            labels, group_ids = (torch.from_numpy(x[ids]) for x in (pairs.texts.labels[0::2], groups))
            return Batch(torch.from_numpy(views), torch.from_numpy(ids.copy()), labels, epoch, ids, group_ids)

        return KeyedLoader(self.describe(self.data.train), order, draw, device, self.data.batches_ahead)

    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        """The first texts of the pairs."""
        return self.sides(source)[0].batches(ids, batch_size)

    def show(self, source: str, ids: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
        """The first texts."""
        return super().show(source, 2 * ids)[0], ids

    def sides(self, source: str) -> tuple[Side, Side]:
        """h of one encoder is compared, as it is without its projection head."""
        pairs = self.pairs(source)
        groups = pairs.groups(content_ids(pairs.texts, self.data.tokens))

        def side(view: int) -> Side:
            def batches(ids: NDArray[np.int64], batch_size: int) -> Iterator[SampleBatch]:
                for tokens, labels, numbers in self.batches_of(pairs.texts, 2 * ids + view, batch_size):
                    yield tokens, labels, numbers // 2

            def texts() -> list[str]:
                return self.read(pairs.texts, 2 * np.arange(len(pairs)) + view)

            return Side(pairs.columns[view], groups, batches, self.to_input, lambda network: network.encoder, texts)

        return side(0), side(1)


def _sides(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, B]: the texts of the pairs."""
    return 2 * ids + np.arange(2)[:, None]


class _TextsOfPairs(Texts):
    draws_views: ClassVar[bool] = False


class ImagesWithTexts(Images):
    """View 0 is a crop of an image, view 1 one of its texts; each epoch draws which.

    To evaluations of images these are images like others: `encoder` is theirs.
    """

    evaluations: ClassVar[tuple[str, ...]] = ("knn", "linear", "similarity", "retrieval", "zero-shot")

    @cached_property
    def train(self) -> ImageText:
        return self.pairs(self.data.train)

    def pairs(self, source: str) -> ImageText:
        """Raises DataError, also where its tokenizer is another than that of data.train."""
        found = open_image_text(source)
        if source != self.data.train and found.texts.vocabulary != self.train.texts.vocabulary:
            raise DataError(
                f"{source}: was prepared with another tokenizer than {self.data.train}; prepare it again with "
                f"--tokenizer {self.data.train}/{TEXTS}"
            )
        return found

    @cached_property
    def of_texts(self) -> Texts:
        """The texts alone, in tokens."""
        return _TextsOfPairs(self.data.model_copy(update={"kind": "text", "train": str(Path(self.data.train) / TEXTS)}))

    @cached_property
    def _of_images(self) -> Images:
        """The images alone, in one view."""
        return Images(self.data.model_copy(update={"train": self.train.images, "num_views": 1}))

    def settled(self) -> DataConfig:
        """By the file of images."""
        kept = {"train": self.data.train, "num_views": self.data.num_views}
        return self._of_images.settled().model_copy(update=kept)

    @property
    def inputs(self) -> Inputs:
        """Of the network: rows of `pack_pairs`, the images and then their texts."""

        from simclr_dist.network.inputs import Inputs
        from simclr_dist.network.simclr import pack_pairs

        images, texts = super().inputs, self.of_texts.inputs

        def pairs_with(texts: Draw) -> Draw:
            def draw(n: int) -> Tensor:
                half = (n + 1) // 2
                return pack_pairs(images.draw(half), texts(half)).flatten(0, 1)[:n]

            return draw

        size = f"{images.size}, {texts.size}"
        mean = pairs_with(texts.mean or texts.draw)
        return Inputs("images with texts", size, pairs_with(texts.draw), mean=mean)

    @property
    def input_signature(self) -> Mapping[str, Any]:
        return {**super().input_signature, **self.of_texts.input_signature}

    def describe(self, source: str) -> DatasetInfo:
        if kind_of_folder(source) != IMAGE_TEXT and source != self.data.train:
            return super().describe(source)
        pairs = self.pairs(source)
        images, tokenizer = super().describe(pairs.images), pairs.texts.vocabulary.digest[:16]
        return replace(
            images,
            fingerprint=f"{_hash(images.fingerprint, pairs.fingerprint)}-{tokenizer}",
            digest=lambda: f"{_hash(images.content_fingerprint, pairs.verified_fingerprint())}-{tokenizer}",
            account=pairs.texts.account,
        )

    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        inner = self._of_images.loader(
            augment, seed=seed, global_batch_size=global_batch_size, world=world, device=device
        )
        return _WithTexts(self, inner, world)

    def views(
        self, augment: AugmentConfig, seed: int, device: torch.device, warn: Callable[[str], None]
    ) -> tuple[ViewsOf, dict[str, str]]:
        from simclr_dist.network.simclr import pack_pairs

        of_images, implementations = super().views(augment, seed, device, warn)

        def packed(batch: Batch) -> Tensor:
            assert batch.texts is not None
            return pack_pairs(of_images(batch)[0], batch.texts)

        return packed, implementations

    def show_views(self, views: Tensor) -> Tensor:
        """The crops of the images alone: [1, n, 3, H, W]."""
        from simclr_dist.network.simclr import unpack_pairs

        side = self.data.image_size
        return super().show_views(unpack_pairs(views.flatten(0, 1), (side, side, self.pixels.channels))[0][None])

    def check_encoder(self, encoder: nn.Module, model: ModelConfig, section: str = "model") -> None:
        from simclr_dist.network.shape import shape_of_model

        assert model.text is not None
        self.of_texts.check_encoder(shape_of_model(model.text).encoder, model.text, "model.text")

    def example_batch(self, n: int) -> Batch:
        return replace(self._of_images.example_batch(n), texts=self.of_texts.inputs.example(n))

    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        return super().evaluation_batches(_images_of(source), ids, batch_size, unreadable)

    def size_on_disk(self, source: str) -> int:
        return super().size_on_disk(_images_of(source))

    def names(self, source: str, n: int) -> tuple[str, ...]:
        return super().names(_images_of(source), n)

    def obstacle(self) -> str | None:
        return self._of_images.obstacle()

    def sides(self, source: str) -> tuple[Side, Side]:
        """z is compared: the two heads lead into one space, and h of different encoders has nothing in common."""
        pairs = self.pairs(source)
        groups = pairs.groups(content_ids(pairs.texts, self.data.tokens))

        def images(ids: NDArray[np.int64], batch_size: int) -> Iterator[SampleBatch]:
            return self.evaluation_batches(source, ids, batch_size)

        def texts(ids: NDArray[np.int64], batch_size: int) -> Iterator[SampleBatch]:
            return self.of_texts.evaluation_batches(str(pairs.path / TEXTS), ids, batch_size)

        of_texts, read = groups[pairs.image_of_text], self.of_texts.to_input
        return (
            Side("image", groups, images, self.to_input, to_z),
            Side("text", of_texts, texts, read, lambda network: to_z(tower_of_texts(network))),
        )


def tower_of_texts(network: SimCLR) -> SimCLR:
    """The encoder and head of texts; of a network with one encoder these."""
    return getattr(network, "text", network)


def to_z(tower: SimCLR) -> nn.Module:
    from torch import nn

    return nn.Sequential(tower.encoder, tower.projection_head)


def _images_of(source: str) -> str:
    """The images of a folder of pairs; anything else are images themselves."""
    return open_image_text(source).images if kind_of_folder(source) == IMAGE_TEXT else source


def _hash(*fingerprints: str) -> str:
    import hashlib

    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:32]


class _WithTexts:
    """A loader of images whose batches also have a text of each image. See `Loader`."""

    def __init__(self, kind: ImagesWithTexts, images: Loader, world: World) -> None:
        self._images, self._world, self._pairs, self._tokens = images, world, kind.train, kind.data.tokens
        info = kind.describe(kind.data.train)
        self.num_samples, self.class_names, self.account = info.num_samples, info.class_names, info.account
        self.fingerprint, self.content_fingerprint = info.fingerprint, info.content_fingerprint
        self.order, self.wait_s = images.order, 0.0
        self._groups = self._pairs.groups(content_ids(self._pairs.texts, self._tokens))

    def batches(self, step: int) -> Iterator[Batch]:
        import torch

        for current, batch in enumerate(self._images.batches(step), start=step):
            epoch, step_of_epoch = divmod(current, self.order.steps_per_epoch)
            texts = torch.from_numpy(self._texts(epoch, step_of_epoch, batch.host_ids))
            groups = torch.from_numpy(self._groups[batch.host_ids])
            device, self.wait_s = batch.views.device, self._images.wait_s
            yield replace(batch, group_ids=groups.to(device), texts=texts.to(device))

    def _texts(self, epoch: int, step: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, T]: one of each image's texts, padded as the longest of the global batch."""
        folder = self._pairs.texts
        whole = beginnings(folder, self._drawn(epoch, self.order.sample_ids(epoch, step)), self._tokens)
        own = beginnings(folder, self._drawn(epoch, ids), self._tokens)
        return written(folder, own, padded_length(whole.lengths, folder.vocabulary))

    def _drawn(self, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B]: the number of a text of each image."""
        first, stop = self._pairs.offsets[ids], self._pairs.offsets[ids + 1]
        u = uniform(keys(self.order.seed, epoch, ids, 1), TEXT)
        return first + (u * (stop - first)).astype(np.int64)

    def close(self) -> None:
        self._images.close()

    def __enter__(self) -> _WithTexts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
