"""Checkpoints: written whole or not at all, verified before they are believed, free of pickles.

    runs/<name>/checkpoints/step_00012500/
        model.safetensors        parameters and buffers, by name
        optimizer.safetensors    optimiser state as "<parameter name>/<state key>"
        state.json               step, samples seen, configuration, data fingerprint, versions
        online_probe.safetensors if there is a probe: its weights and moments
        MANIFEST.json            size and sha256 of each file above
        milestone, best.json     why no pruning removes it, if so (run/history.py)

A save copies the state, writes the copy into a temporary directory named after its attempt, flushes everything to disk
and renames: the rename is the commit. The order of data and every random draw are functions of (seed, step), so there
is no other state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.atomic import flush, replace_text
from simclr_dist.bounded_json import read_json
from simclr_dist.config import Config
from simclr_dist.errors import CheckpointError
from simclr_dist.optim.build import parameter_order
from simclr_dist.run.state import TrainState

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
PROBE = "online_probe.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, on the CPU."""

    path: Path
    config: Config
    step: int
    samples_seen: int
    fingerprint: str
    model_state: dict[str, Tensor] = field(repr=False)
    optimizer_state: dict[str, Tensor] = field(repr=False)
    grad_scaler: dict[str, float] = field(default_factory=dict)
    started_from: dict[str, Any] | None = None
    """As TrainState has it."""
    of_run: bool = True
    """False: weights from elsewhere; of the configuration only the model and the image size mean anything."""
    probe_state: dict[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Snapshot:
    """A copy of a training's state on the host: while it is written, the training goes on."""

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)
    """By file, then by name; contiguous."""
    content: dict[str, Any]
    """Of state.json."""

    def first_non_finite(self) -> str | None:
        """The name of a tensor that holds NaN or infinity."""
        for tensors in self.tensors.values():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    return name
        return None


def take_snapshot(
    *,
    config: Config,
    state: TrainState,
    fingerprint: str,
    model: nn.Module,
    optimizer: Optimizer,
    grad_scaler: dict[str, float],
    versions: dict[str, str],
    probe_state: dict[str, Tensor] | None = None,
    reuse: Snapshot | None = None,
) -> Snapshot:
    """Copies the state as it is now. reuse: an earlier snapshot, no longer needed, whose memory is written to."""
    tensors = {
        "model.safetensors": model.state_dict(),
        "optimizer.safetensors": named_optimizer_state(model, optimizer),
    }
    if probe_state is not None:
        tensors[PROBE] = probe_state
    content = {
        "format": FORMAT,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "fingerprint": fingerprint,
        "parameter_order": parameter_order(model, optimizer),
        "grad_scaler": grad_scaler,
        "versions": versions,
        "started_from": state.started_from,
        "config": config.model_dump(mode="json"),
    }
    memory = reuse.tensors if reuse is not None else {}
    copies = {file: _copies(of_file, memory.get(file, {})) for file, of_file in tensors.items()}
    for device in {tensor.device for of_file in tensors.values() for tensor in of_file.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()  # once, and not after each copy
    return Snapshot(state.step, copies, content)


def _copies(tensors: dict[str, Tensor], memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under way, where they come from a GPU."""
    copies = {}
    for name, tensor in tensors.items():
        copy = memory.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
    return copies


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    *,
    attempt: str,
    marks: Mapping[str, str] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `folder`/step_…; the directory appears complete or not at all. One process only.

    marks: names and contents of further files, which say why the checkpoint is kept (run/history.py).
    Raises OSError, also where the step has a checkpoint already; and what `before_commit` raises just before the
    directory gets its name.
    """
    final = folder / f"step_{snapshot.step:08d}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    temporary = folder / f".tmp-{final.name}-{attempt}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o750)
    try:
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, temporary / name)
        (temporary / "state.json").write_text(json.dumps(snapshot.content, indent=1))
        _seal(temporary, attempt, snapshot.step)
        for name, text in (marks or {}).items():
            replace_text(temporary / name, text)
        before_commit()
        os.rename(temporary, final)  # fails where `final` exists: nothing is ever written over
        flush(folder)
        return final
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(temporary: Path, attempt: str, step: int) -> None:
    """Writes the manifest of all other files; everything is on disk when this returns."""
    names = sorted(path.name for path in temporary.iterdir())
    files = {name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names}
    manifest = {"format": FORMAT, "step": step, "attempt": attempt, "files": files}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for name in (*names, "MANIFEST.json"):
        os.chmod(temporary / name, 0o640)
        flush(temporary / name)
    flush(temporary)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`, every byte checked against its manifest.

    Raises CheckpointError, whatever is wrong with it: damage has as many kinds as there are bytes.
    """
    try:
        return _read_checkpoint(path)
    except (CheckpointError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or path}: has gone; was it removed by a training meanwhile?") from None
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None


def _read_checkpoint(path: Path) -> Checkpoint:
    manifest = _read_json(path / "MANIFEST.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or set(files) - {PROBE} != set(FILES):
        raise CheckpointError(f"{path}/MANIFEST.json: not a manifest of format {FORMAT}")
    for name in files:
        file, expected = path / name, files[name]
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != expected.get("size"):
            raise CheckpointError(f"{file}: {size} bytes, but {expected.get('size')} were written")
        if _sha256(file) != expected.get("sha256"):
            raise CheckpointError(f"{file}: content has changed since it was written (sha256 differs)")
    return replace(
        read_facts(path),
        model_state=load_file(path / "model.safetensors"),
        optimizer_state=load_file(path / "optimizer.safetensors"),
        probe_state=load_file(path / PROBE) if PROBE in files else {},
    )


def read_facts(path: Path) -> Checkpoint:
    """What `path` is a checkpoint of, without its tensors and unverified: quick. Raises CheckpointError."""
    state = _read_json(path / "state.json")
    try:
        return Checkpoint(
            path=path,
            config=Config.model_validate_json(json.dumps(state["config"])),
            step=int(state["step"]),
            samples_seen=int(state["samples_seen"]),
            fingerprint=str(state["fingerprint"]),
            model_state={},
            optimizer_state={},
            grad_scaler={str(k): float(v) for k, v in state["grad_scaler"].items()},
            started_from=dict(origin) if isinstance(origin := state.get("started_from"), dict) else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{path}: written by another version of simclr_dist: {error}") from None


def load_state(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """Copies the checkpoint into `model` and `optimizer`. Raises CheckpointError before anything is changed."""
    check_names(checkpoint.path, "model", checkpoint.model_state, model.state_dict())
    numbers = {name: number for number, name in enumerate(parameter_order(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer_state.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.path}: optimiser state for {name!r}, which the model does not have")
        if not parameters[name].requires_grad:
            continue  # frozen since then
        if value.ndim and value.shape != parameters[name].shape:
            raise CheckpointError(f"{checkpoint.path}: optimiser state {key} has shape {tuple(value.shape)}")
        if value.ndim:  # laid out as the weight is: optimisers are fast only then
            value = torch.empty_like(parameters[name], dtype=value.dtype).copy_(value)
        state.setdefault(numbers[name], {})[entry] = value
    model.load_state_dict(checkpoint.model_state)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainState(checkpoint.step, checkpoint.samples_seen, checkpoint.started_from)


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = parameter_order(model, optimizer)
    return {
        f"{names[index]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if value is not None
    }


def check_names(path: Path, what: str, saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path}: its {what} is another one: {len(missing)} names missing (first: {(missing or ['-'])[0]}), "
            f"{len(extra)} unknown (first: {(extra or ['-'])[0]}); check model.* in the configuration"
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, the configured model has {tuple(tensor.shape)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the directory is no complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
