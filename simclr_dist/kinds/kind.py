"""What is trained on: the one seam between a kind of data and everything else.

The trainer, the loss, checkpoints and evaluations know samples with numbers, views of them, and inputs of an encoder.
What these are is the kind's business. Letters: n samples, V views, B samples of a process, G of a global batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig, DataConfig, ModelConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.loading.open_images import DatasetInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simclr_dist.network.inputs import Inputs
    from simclr_dist.parallel.distributed import World

    Shown = Tensor | list[str]
    SampleBatch = tuple[Tensor, Tensor, Tensor]  # what was read [b, ...], labels int64 [b], sample ids int64 [b]
    ViewsOf = Callable[[Batch], Tensor]


class Kind(ABC):
    """The data of one section `data`. Making one opens nothing; every method may raise DataError."""

    noun: ClassVar[str]
    """What logs and tables call a sample; its plural ends with s."""

    evaluations: ClassVar[tuple[str, ...]] = ("knn", "linear")
    """Methods of `simclr-dist evaluate` that make sense."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def start_rows(self, augment: AugmentConfig) -> Mapping[str, str]:
        """What else the table at the start of a training should say, by the name of the row."""
        return {}

    def settled(self) -> DataConfig:
        """The section with what data.train itself says of settings that were left open. Raises ConfigError."""
        return self.data

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What the encoder eats."""

    @property
    def input_signature(self) -> Mapping[str, Any]:
        """All settings of the kind that h depends on, by name: cached features and records of scores carry them."""
        return {"options": self.data.options} if self.data.options else {}

    @abstractmethod
    def describe(self, source: str) -> DatasetInfo:
        """How many samples `source` holds, their labels, and the fingerprint of all that they are."""

    @abstractmethod
    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        """Batches of data.train for a pretraining; closed by whoever asked for it."""

    @abstractmethod
    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        """Samples of `source` as evaluations see them, in the order of `ids`; the last batch may be smaller.

        unreadable: takes the reason of each sample that cannot be read, by its number; None: that is a DataError.
        """

    def views(
        self, augment: AugmentConfig, seed: int, device: torch.device, warn: Callable[[str], None]
    ) -> tuple[ViewsOf, dict[str, str]]:
        """What makes views float or int [V, B, ...], as the encoder eats them, of the loader's batches, on the device;
        and what computes it, by part, where that was a choice. All ranks together. By default the batches have them.
        """
        return lambda batch: batch.views, {}

    def to_input(self, read: Tensor) -> Tensor:
        """Of the first of each of `evaluation_batches`, on the device: what the encoder eats."""
        return read

    def example_batch(self, n: int) -> Batch:
        """What the loader might yield for n samples, with random content, on the CPU."""
        import torch

        views = self.inputs.example(self.data.num_views * n).unflatten(0, (self.data.num_views, n))
        return Batch(views, torch.arange(n), torch.full((n,), -1), 0)

    def check_encoder(self, encoder: nn.Module, model: ModelConfig) -> None:  # noqa: B027 - most encoders are as good
        """Raises ConfigError where the encoder, which takes `inputs`, is none for these data. It may have no values."""

    def baselines(self, train: str) -> Mapping[str, nn.Module]:
        """Encoders that nobody trains, by name, fitted to the samples of `train` where they need to be."""
        return {}

    def show(self, source: str, ids: NDArray[np.int64]) -> tuple[Shown, NDArray[np.int64]] | None:
        """Those samples that can be read, for people, and their numbers: small pictures uint8 [n, s, s, 3], or n texts.
        None: there is nothing to look at.
        """
        return None

    def show_views(self, views: Tensor) -> Tensor | list[list[str]] | None:
        """Views [V, n, ...], as the encoder eats them, for people: pictures float [V, n, 3, H, W], on any scale, or
        V lists of n texts.
        """
        return None

    def size_on_disk(self, source: str) -> int:
        """Bytes that an epoch reads; 0: nothing is read while training."""
        return 0

    def obstacle(self) -> str | None:
        """What keeps data.train from being loaded, besides its content."""
        return None

    def names(self, source: str, n: int) -> tuple[str, ...]:
        """Of its n samples, for people."""
        return tuple(f"{source}[{i}]" for i in range(n))
