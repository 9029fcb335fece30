"""`simclr_dist.train` whose monitors fail: FAULTS="place exception rank; …", rank "*" is every rank.

The places are functions that the monitors call; each fails at every call on that rank, with that kind of exception.
"""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Callable
from typing import Any

import torch
from tensorboard.compat.tensorflow_stub import errors

from simclr_dist import train
from simclr_dist.evaluation import features, gallery, knn
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.health import check, figures
from simclr_dist.kinds.images import Images
from simclr_dist.monitor import tensorboard
from simclr_dist.monitor.log_file import LogFile
from simclr_dist.monitor.tensorboard import TensorBoard
from simclr_dist.training import observers
from simclr_dist.training.observers import AugmentedPairs

PLACES: dict[str, tuple[Any, str]] = {
    "reading images": (Images, "evaluation_batches"),
    "extracting": (features, "_extract"),
    "nearest": (knn, "nearest"),
    "neighbours": (gallery, "neighbour_rows"),
    "projector": (tensorboard, "write_projector"),
    "histograms": (TensorBoard, "_add_histogram"),
    "curves": (TensorBoard, "show"),
    "log": (LogFile, "show"),
    "pairs": (AugmentedPairs, "after_step"),
    "recording": (figures, "running_statistics"),
    "gradient norm": (figures, "_norm"),
    "sampling": (check, "own_sample"),
    "rank of h": (figures, "rankme"),
    "probe": (OnlineProbe, "_own_sums"),
    "probe's accuracy": (OnlineProbe, "top1"),
    "record": (observers, "append_record"),
}
EXCEPTIONS: dict[str, Callable[[], Exception]] = {
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "value": lambda: ValueError("made to fail"),
    "memory": MemoryError,
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "full": queue.Full,
    "tensorboard": lambda: errors.DataLossError(None, None, "made to fail"),
    "assert": AssertionError,
    "exit": lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
}


def failing(kind: str) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise EXCEPTIONS[kind]()

    return fail


for fault in filter(None, os.environ.get("FAULTS", "").split(";")):
    place, kind, rank = fault.strip().rsplit(" ", 2)
    if rank in ("*", os.environ.get("RANK", "0")):
        owner, name = PLACES[place]
        assert hasattr(owner, name)  # else nothing would fail
        setattr(owner, name, failing(kind))
if __name__ == "__main__":
    train.main()
