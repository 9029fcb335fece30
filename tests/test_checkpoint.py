"""Checkpoints: exact to read back, damage found in every byte, nothing half-written, never a silent start from 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from simclr_dist.checkpoint import files as checkpoint
from simclr_dist.checkpoint import lineage, pretrained
from simclr_dist.config import Config
from simclr_dist.errors import CheckpointError, OwnershipError
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.schedule import set_learning_rate
from simclr_dist.run import history
from simclr_dist.run.layout import step_of
from simclr_dist.run.state import TrainState

CONFIG = Config.model_validate(
    {
        "name": "test",
        "data": {"train": "synthetic", "image_size": 32},
        "model": {"encoder": "resnet_small", "width": 2, "head_out_dim": 4},
        "train": {"global_batch_size": 4, "epochs": 20},
    }
)


def trained(optimizer_name: str = "lars") -> tuple[SimCLR, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(CONFIG.model)
    config = CONFIG.optim.model_copy(update={"optimizer": optimizer_name})
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16))[1].square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(
    run_dir: Path,
    step: int,
    model: SimCLR,
    optimizer: torch.optim.Optimizer,
    before_commit: Callable[[], None] = lambda: None,
    marks: dict[str, str] | None = None,
) -> Path:
    snapshot = checkpoint.take_snapshot(
        config=CONFIG,
        state=TrainState(step, 4 * step),
        fingerprint="f",
        model=model,
        optimizer=optimizer,
        grad_scaler={"scale": 2.0},
        versions={"torch": torch.__version__},
    )
    return checkpoint.write_checkpoint(
        run_dir / "checkpoints", snapshot, attempt="a1", marks=marks, before_commit=before_commit
    )


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw", "muon"])
def test_restored_training_goes_on_bit_identically(tmp_path: Path, name: str) -> None:
    model, optimizer = trained(name)
    found = checkpoint.read_checkpoint(save(tmp_path, 2, model, optimizer))
    other = build_model(CONFIG.model)
    other_optimizer = build_optimizer(other, CONFIG.optim.model_copy(update={"optimizer": name}))
    set_learning_rate(other_optimizer, 0.1)
    state = checkpoint.load_state(found, other, other_optimizer)
    assert (state.step, state.samples_seen, found.config, found.grad_scaler) == (2, 8, CONFIG, {"scale": 2.0})
    x = torch.randn(4, 3, 16, 16)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(x)[1].square().mean().backward()
        o.step()
    for (key, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", [*checkpoint.FILES, "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "symlink"])
def test_damage_to_any_file_is_found_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    file = save(tmp_path, 2, model, optimizer) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
        if damage == "symlink":
            (tmp_path / "elsewhere").write_bytes(content)
            file.symlink_to(tmp_path / "elsewhere")
    if name == "MANIFEST.json" and damage == "symlink":
        pytest.skip("the manifest vouches for the others, whichever way it is reached")
    warnings: list[str] = []
    found = lineage.newest_valid(tmp_path, warnings.append, set_aside=True)
    assert found is not None
    assert found.step == 1
    assert str(file.parent) in warnings[0]
    assert (tmp_path / "checkpoints" / "step_00000002.corrupt").is_dir()
    assert [p.name for p in lineage.list_checkpoints(tmp_path)] == ["step_00000001"]


def test_a_run_without_any_valid_checkpoint_does_not_start_from_0(tmp_path: Path) -> None:
    (save(tmp_path, 1, *trained()) / "state.json").write_text("{}")
    for _ in range(2):  # also once it has been set aside
        with pytest.raises(CheckpointError, match="none of them valid"):
            lineage.newest_valid(tmp_path, lambda _: None, set_aside=True)


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert lineage.newest_valid(tmp_path, pytest.fail) is None


def test_a_write_that_dies_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def dies(source: object, target: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, model, optimizer)
    monkeypatch.undo()
    assert [p.name for p in lineage.list_checkpoints(tmp_path)] == ["step_00000001"]
    history.prune(tmp_path, keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_pruning_leaves_milestones_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step, accuracy in enumerate([0.1, None, 0.5, 0.5, 0.2, None, None], start=1):
        marks = history.marks(milestone=step == 2, best_knn_top1=accuracy)
        save(tmp_path, step, model, optimizer, marks=marks)
    assert history.prune(tmp_path, keep=2) == []
    assert [path.name for path in lineage.list_checkpoints(tmp_path)] == [f"step_{n:08d}" for n in (2, 3, 6, 7)]
    best = history.best_so_far(tmp_path)
    assert best is not None
    assert (best[0].name, best[1]) == ("step_00000003", 0.5)
    assert checkpoint.read_checkpoint(best[0]).step == 3  # a mark is no damage


@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        ('{"milestones": [2], "best_step": 3, "best_knn_top1": 0.5}', [2, 3, 5, 6]),
        ("{", [1, 2, 3, 4, 5, 6]),
        ('{"milestones": "all"}', [1, 2, 3, 4, 5, 6]),
        ("[" * 100_000, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_release_0_1_kept_stays_and_damage_deletes_nothing(tmp_path: Path, kept: str, steps: list[int]) -> None:
    model, optimizer = trained()
    for step in range(1, 7):
        save(tmp_path, step, model, optimizer)
    (tmp_path / "checkpoints" / "kept.json").write_text(kept)
    problems = history.prune(tmp_path, keep=2)
    assert len(problems) == (0 if len(steps) < 6 else 1)
    assert history.prune(tmp_path, keep=2) == []
    assert [step_of(path) for path in lineage.list_checkpoints(tmp_path)] == steps


def test_what_cannot_be_removed_is_said_and_fails_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    for step in range(1, 5):
        save(tmp_path, step, model, optimizer)
    (tmp_path / "checkpoints" / ".trash-step_00000001").mkdir()  # of a kill
    monkeypatch.setattr(history.shutil, "rmtree", lambda *_, **__: None)
    problems = history.prune(tmp_path, keep=2)
    assert len(problems) == 3
    assert all("cannot be removed" in problem for problem in problems)
    monkeypatch.undo()
    assert history.prune(tmp_path, keep=2) == []
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000003", "step_00000004"}


def test_a_save_never_writes_over_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    there = save(tmp_path, 1, model, optimizer)
    before = {file.name: file.read_bytes() for file in there.iterdir()}
    with pytest.raises(OSError, match="not empty"):
        save(tmp_path, 1, model, optimizer)
    assert {file.name: file.read_bytes() for file in there.iterdir()} == before
    assert list((tmp_path / "checkpoints").iterdir()) == [there]


@pytest.mark.parametrize("killed_after", [0, 1, 2, 3])
def test_a_rewind_sets_aside_by_name_even_when_it_is_cut_off(
    tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    for step in (8, 16, 24, 32):
        save(tmp_path, step, model, optimizer)
    renames, rename = [0], os.rename

    def dies(source: Path, target: Path) -> None:
        if renames[0] == killed_after:
            raise KeyboardInterrupt
        renames[0] += 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies)
    aside = [f"step_{step:08d}.superseded-1" for step in (16, 24, 32)]
    if killed_after < 3:
        with pytest.raises(KeyboardInterrupt):
            history.rewind(tmp_path, "step_00000008", 8)
        monkeypatch.undo()
        assert history.settle(tmp_path) == aside[killed_after:]
    else:
        assert history.rewind(tmp_path, "step_00000008", 8) == aside
        monkeypatch.undo()
    assert history.settle(tmp_path) == []
    found = lineage.newest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 8
    save(tmp_path, 16, model, optimizer)
    assert history.settle(tmp_path) == []  # the new step 16 is not the one that was set aside
    assert history.rewind(tmp_path, "step_00000008", 8) == ["step_00000016.superseded-2"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        *("step_00000008", "step_00000016.superseded-2"),
        *aside,
    }


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw", "muon"])
def test_restored_state_is_laid_out_as_the_weights_are(tmp_path: Path, name: str) -> None:
    """Or the optimisers take their slow path for ever."""
    torch.manual_seed(0)
    model = build_model(CONFIG.model).to(memory_format=torch.channels_last)
    config = CONFIG.optim.model_copy(update={"optimizer": name})
    optimizer = build_optimizer(model, config)
    model(torch.randn(4, 3, 16, 16))[1].square().mean().backward()
    optimizer.step()
    found = checkpoint.read_checkpoint(save(tmp_path, 1, model, optimizer))
    other = build_model(CONFIG.model).to(memory_format=torch.channels_last)
    restored = build_optimizer(other, config)
    checkpoint.load_state(found, other, restored)
    compared = 0
    for parameter, entries in restored.state.items():
        for value in entries.values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
                compared += 1
    assert compared >= len(list(other.parameters()))


def test_a_snapshot_does_not_change_with_the_weights_and_its_memory_serves_again(tmp_path: Path) -> None:
    model, optimizer = trained()
    facts = {"config": CONFIG, "fingerprint": "f", "model": model, "optimizer": optimizer, "grad_scaler": {}}
    first = checkpoint.take_snapshot(state=TrainState(1, 4), versions={}, **facts)
    before = {name: tensor.clone() for name, tensor in first.tensors["model.safetensors"].items()}
    places = {name: tensor.data_ptr() for name, tensor in first.tensors["model.safetensors"].items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(first.tensors["model.safetensors"][name], value) for name, value in before.items())
    second = checkpoint.take_snapshot(state=TrainState(2, 8), versions={}, reuse=first, **facts)
    after = second.tensors["model.safetensors"]
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())


def test_everything_is_on_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine right after the commit finds whole files."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    written = save(tmp_path, 1, *trained())
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert {file.name for file in written.iterdir()} <= set(before)
    assert before[-1].startswith(".tmp-step_00000001")  # the names of the files, in their folder
    assert after == ["checkpoints"]


def test_a_refusal_just_before_the_commit_leaves_no_checkpoint(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise OwnershipError("taken over")

    with pytest.raises(OwnershipError):
        save(tmp_path, 1, *trained(), before_commit=taken_over)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("failing", ["save_file", "flush"])
def test_a_write_on_a_full_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model, optimizer = trained()

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device") if failing == "save_file" else OSError(28, "No space left")

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, optimizer)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_name_in_the_manifest_cannot_lead_elsewhere(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 2, model, optimizer)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name in ("../../elsewhere", "/etc/hostname"):
        crafted = {**manifest, "files": {**manifest["files"], name: manifest["files"]["state.json"]}}
        (path / "MANIFEST.json").write_text(json.dumps(crafted))
        with pytest.raises(CheckpointError, match="not a manifest"):
            checkpoint.read_checkpoint(path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 2, model, optimizer)
    (path / "model.safetensors").rename(tmp_path / "moved")
    (path / "model.safetensors").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read_checkpoint(path)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (5, 100_000_000, 20):
        save(tmp_path, step, model, optimizer)
    history.prune(tmp_path, keep=2)
    assert [p.name for p in lineage.list_checkpoints(tmp_path)] == ["step_00000020", "step_100000000"]


def test_another_architecture_is_refused_before_anything_changes(tmp_path: Path) -> None:
    found = checkpoint.read_checkpoint(save(tmp_path, 1, *trained()))
    other = build_model(CONFIG.model.model_copy(update={"width": 4}))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has shape .* the configured model has"):
        checkpoint.load_state(found, other, build_optimizer(other, CONFIG.optim))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_pretrained_model_comes_back_from_run_and_from_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer)
    x = torch.randn(2, 3, 16, 16)
    for place in (tmp_path, path):
        loaded, found = pretrained.load_pretrained(place)
        assert found.path == path
        assert torch.equal(loaded(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize(
    ("place", "message"), [("nowhere", "no such directory"), (".", "no checkpoint in it"), ("step_00000009", "missing")]
)
def test_wrong_paths_are_named(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lineage.find_checkpoint(tmp_path / place)


def test_files_are_not_world_readable(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained())
    for file in (path, *path.iterdir()):
        assert file.stat().st_mode & 0o007 == 0


def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained())
    marker = tmp_path / "executed"
    (path / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(marker) + b"'\ntR.")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    file = path / "model.safetensors"
    manifest["files"]["model.safetensors"] = {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.read_checkpoint(path)
    assert not marker.exists()
