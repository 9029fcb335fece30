"""Checkpoints: written whole or not at all, verified before they are believed, free of pickles.

    runs/<name>/checkpoints/step_00012500/
        model.safetensors        parameters and buffers, by name
        optimizer.safetensors    optimiser state as "<parameter name>/<state key>"
        state.json               step, samples seen, configuration, data fingerprint, versions
        online_probe.safetensors if there is a probe: its weights and moments
        MANIFEST.json            size and sha256 of each file above; written last

A save writes into a temporary directory named after its attempt, flushes everything to disk and renames: the rename is
the commit. The order of data and every random draw are functions of (seed, step), so there is no other state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.atomic import replaces
from simclr_dist.config import Config
from simclr_dist.errors import CheckpointError
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.lars import parameter_order
from simclr_dist.parallel import distributed
from simclr_dist.run.state import TrainState

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
PROBE = "online_probe.safetensors"
_NAME = re.compile(r"step_(\d{8,})")


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
    probe_state: dict[str, Tensor] = field(default_factory=dict, repr=False)


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint


def write_checkpoint(
    folder: Path,
    *,
    attempt: str,
    config: Config,
    state: TrainState,
    fingerprint: str,
    model: nn.Module,
    optimizer: Optimizer,
    grad_scaler: dict[str, float],
    versions: dict[str, str],
    probe_state: dict[str, Tensor] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `folder`/step_…; the directory appears complete or not at all. One process only. Raises OSError, and what
    `before_commit` raises just before the directory gets its name.
    """
    final = folder / f"step_{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    temporary = folder / f".tmp-{final.name}-{attempt}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o750)
    try:
        _fill(temporary, attempt, config, state, fingerprint, model, optimizer, grad_scaler, versions, probe_state)
        if final.exists():  # an earlier attempt saved this very step; its content is the same
            return final
        before_commit()
        os.rename(temporary, final)
        _flush(folder)
        return final
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(
    temporary: Path,
    attempt: str,
    config: Config,
    state: TrainState,
    fingerprint: str,
    model: nn.Module,
    optimizer: Optimizer,
    grad_scaler: dict[str, float],
    versions: dict[str, str],
    probe_state: dict[str, Tensor] | None,
) -> None:
    """All files of a checkpoint, on disk when this returns."""
    save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
    save_file(_contiguous(named_optimizer_state(model, optimizer)), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "step": state.step,
                "samples_seen": state.samples_seen,
                "fingerprint": fingerprint,
                "parameter_order": parameter_order(model),
                "grad_scaler": grad_scaler,
                "versions": versions,
                "config": config.model_dump(mode="json"),
            },
            indent=1,
        )
    )
    if probe_state is not None:
        save_file(_contiguous(probe_state), temporary / PROBE)
    names = FILES if probe_state is None else (*FILES, PROBE)
    files = {name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names}
    manifest = {"format": FORMAT, "step": state.step, "attempt": attempt, "files": files}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for name in (*names, "MANIFEST.json"):
        os.chmod(temporary / name, 0o640)
        _flush(temporary / name)
    _flush(temporary)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`, every byte checked against its manifest. Raises CheckpointError."""
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
    state = _read_json(path / "state.json")
    try:
        return Checkpoint(
            path=path,
            config=Config.model_validate_json(json.dumps(state["config"])),
            step=int(state["step"]),
            samples_seen=int(state["samples_seen"]),
            fingerprint=str(state["fingerprint"]),
            model_state=load_file(path / "model.safetensors"),
            optimizer_state=load_file(path / "optimizer.safetensors"),
            grad_scaler={str(k): float(v) for k, v in state["grad_scaler"].items()},
            probe_state=load_file(path / PROBE) if PROBE in files else {},
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: written by another version of simclr_dist: {error}") from None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """Copies the checkpoint into `model` and `optimizer`. Raises CheckpointError before anything is changed."""
    _check_names(checkpoint.path, "model", checkpoint.model_state, model.state_dict())
    names = parameter_order(model)
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer_state.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.path}: optimiser state for {name!r}, which the model does not have")
        if value.ndim and value.shape != parameters[name].shape:
            raise CheckpointError(f"{checkpoint.path}: optimiser state {key} has shape {tuple(value.shape)}")
        state.setdefault(names.index(name), {})[entry] = value
    model.load_state_dict(checkpoint.model_state)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainState(checkpoint.step, checkpoint.samples_seen)


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = parameter_order(model)
    return {
        f"{names[index]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if value is not None
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_names(path: Path, what: str, saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
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
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the directory is no complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Those of a run


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_valid(run_dir: Path, warn: Callable[[str], None], *, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Damaged ones are named to `warn` (and renamed with set_aside). Raises CheckpointError if there are some but none
    is good: starting from 0 in silence would throw the run away.
    """
    candidates = list_checkpoints(run_dir)
    for path in reversed(candidates):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint: {error}")
            if set_aside:
                os.rename(path, _free_name(path.with_name(path.name + ".corrupt")))
    spoilt = list((run_dir / "checkpoints").glob("step_*"))
    if spoilt:
        raise CheckpointError(
            f"{run_dir}/checkpoints: {len(spoilt)} checkpoint(s), none of them valid; "
            "to start again from step 0 choose another name=… or remove that directory"
        )
    return None


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{i}") for i in range(1, 1000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


@dataclass(frozen=True)
class Kept:
    """RUN/checkpoints/kept.json: the checkpoints that no pruning removes."""

    milestones: tuple[int, ...] = ()
    """Their steps."""
    best_step: int | None = None
    best_knn_top1: float = -1.0

    @classmethod
    def read(cls, run_dir: Path) -> Kept:
        """Nothing is kept where there is no readable file: a lost file must not stop a run."""
        try:
            values = json.loads((run_dir / "checkpoints" / "kept.json").read_text(encoding="utf-8"))
            best = values["best_step"]
            return cls(
                tuple(int(step) for step in values["milestones"]),
                int(best) if best is not None else None,
                float(values["best_knn_top1"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, run_dir: Path) -> None:
        """Raises OSError."""
        with replaces(run_dir / "checkpoints" / "kept.json") as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def holds(self, path: Path) -> bool:
        return int(path.name[5:]) in (*self.milestones, self.best_step)


def prune(run_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and those that are kept, and what died half-written."""
    folder = run_dir / "checkpoints"
    kept = Kept.read(run_dir)
    for path in list_checkpoints(run_dir)[:-keep]:
        if kept.holds(path):
            continue
        trash = path.with_name(f".trash-{path.name}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(path: str | Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """`path` is a run's directory (its newest valid checkpoint is taken) or one checkpoint. Raises CheckpointError."""
    path = Path(path)
    if (path / "MANIFEST.json").exists() or _NAME.fullmatch(path.name):
        return read_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run's directory or one of its checkpoints/step_…")
    found = newest_valid(path, warn)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint in it; expected {path}/checkpoints/step_…")
    return found


def load_pretrained(path: str | Path, warn: Callable[[str], None] = lambda _: None) -> tuple[SimCLR, Checkpoint]:
    """The trained network of a run or checkpoint, on the CPU, in eval mode. Raises CheckpointError."""
    checkpoint = find_checkpoint(path, warn)
    model = build_model(checkpoint.config.model)
    _check_names(checkpoint.path, "model", checkpoint.model_state, model.state_dict())
    model.load_state_dict(checkpoint.model_state)
    return model.eval(), checkpoint


def agree_on_newest(run_dir: Path, device: torch.device, warn: Callable[[str], None]) -> Checkpoint | None:
    """`newest_valid` chosen by rank 0 and read by every rank, or CheckpointError on every rank."""
    chosen, failure, found = -1, None, None
    if distributed.rank() == 0:
        try:
            found = newest_valid(run_dir, warn, set_aside=True)
            chosen = found.step if found else -1
        except CheckpointError as error:
            chosen, failure = -2, error
    step = int(distributed.broadcast_from_main_(torch.tensor([chosen], device=device)))
    if step == -2:
        raise failure or CheckpointError(f"{run_dir}: no valid checkpoint (details on rank 0)")
    if step == -1:
        return None
    return found or read_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
