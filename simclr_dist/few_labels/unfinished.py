"""An unfinished training on disk. One that was stopped or killed goes on from there, to the same bytes.

Order, crops, dropout and the learning rate are functions of the step; the rest is in one safetensors file: the network,
momentum, fp16's loss scale, and in the metadata the step and what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simclr_dist.atomic import replaces
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_main

Say = Callable[[str], None]


class Unfinished:
    """The file `path` of the training that `asked` describes, plain values. All ranks call each method together."""

    def __init__(
        self, path: Path, asked: Mapping[str, Any], device: torch.device, say: Say, *, every_s: float = 600.0
    ) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked))
        self._device, self._say, self._every_s = device, say, every_s
        self._written_s = time.monotonic()
        self._has_failed = False

    def is_due(self) -> bool:
        return time.monotonic() - self._written_s >= self._every_s

    def read(self) -> tuple[int, dict[str, Tensor]] | None:
        """The step and the tensors of `write`, read by the main process, on the device; None if there is no file.

        Raises CheckpointError for a damaged file, ConfigError for that of another training.
        """
        tensors: dict[str, Tensor] = {}

        def on_main() -> dict[str, Any] | None:
            if not self.path.exists():
                return None
            step, found = self._read()
            tensors.update(found)
            shapes = {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in found.items()}
            return {"step": step, "tensors": shapes}

        header = run_on_main(on_main, self._device)
        if header is None:
            return None
        for name, (dtype, shape) in header["tensors"].items():
            own = tensors.get(name)
            there = torch.empty(shape, dtype=getattr(torch, dtype)) if own is None else own
            tensors[name] = distributed.broadcast_from_main_(there.to(self._device))
        return header["step"], tensors

    def _read(self) -> tuple[int, dict[str, Tensor]]:
        advice = f"remove {self.path} to begin anew"
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            step, asked = int(metadata["step"]), json.loads(metadata["asked"])
            whole = metadata["digest"] == _digest(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: is no unfinished training: {error}; {advice}") from None
        if not whole:
            raise CheckpointError(f"{self.path}: its content has changed since it was written; {advice}")
        known = {key: value for key, value in self.asked.items() if key in asked}  # release 0.1 wrote down less
        if changes := differences(asked, known):
            raise ConfigError(
                [f"{self.path} is half of another training ({'; '.join(changes)}): undo the change, or {advice}"]
            )
        return step, tensors

    def write(self, step: int, tensors: Mapping[str, Tensor]) -> bool:
        """Written by the main process, as a whole. False, and a warning, where it cannot be: no reason to stop."""
        self._written_s = time.monotonic()
        if distributed.rank() != 0:
            return True
        copies = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        metadata = {"step": str(step), "asked": json.dumps(self.asked), "digest": _digest(copies)}
        try:
            with replaces(self.path) as temporary:
                save_file(copies, temporary, metadata)
        except (OSError, SafetensorError) as error:  # the latter is safetensors' way to say that the disk is full
            if not self._has_failed:
                self._say(f"warning: the training so far cannot be kept in {self.path}: {error}")
            self._has_failed = True
            return False
        return True

    def remove(self) -> None:
        """The training is finished. A file that cannot be removed does no harm."""
        if distributed.rank() == 0:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                self._say(f"warning: {self.path}, no longer needed, cannot be removed: {error}")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        state.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """epochs: 1 then, 2 now"""
    return [
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
