"""A kind of data that is no image goes the whole way: trained, resumed, evaluated, embedded, planned for."""

from __future__ import annotations

import json
import os
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from examples import gene_expression
from examples.gene_expression import Cells
from simclr_dist.config import AugmentConfig, DataConfig, load_config
from simclr_dist.data.randomness import keys
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.evaluation.embeddings_file import load_embeddings
from simclr_dist.kinds import kind_of, register
from simclr_dist.kinds.arrays import Rows
from simclr_dist.kinds.images import Images
from simclr_dist.parallel.distributed import World
from tests.fork_server import ModuleProcess
from tests.own_kind import Points, write_points
from tests.training import Training

CONFIG = """
name: points
data: {kind: points, train: none, options: {noise: 1.0}}
model: {encoder: of_points, head_hidden_dim: 32, head_out_dim: 16}
optim: {optimizer: adamw, base_lr: 0.003, lr_scaling: none, warmup_epochs: 1}
train: {global_batch_size: 64, epochs: 3, precision: fp32}
evaluation: {knn_k: 10}
"""


@pytest.fixture
def points(tmp_path: Path) -> Path:
    (tmp_path / "points.yaml").write_text(CONFIG)
    write_points(tmp_path / "test.npz", 96, seed=2)
    return write_points(tmp_path / "train.npz", 512, seed=1)


def section(points: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"kind": "points", "train": str(points), **more})


def training(points: Path, name: str, *overrides: str, world_size: int = 1) -> Training:
    config = points.parent / "points.yaml"
    return Training(
        points, points.parent, name, *overrides, world_size=world_size, module="tests.own_kind", config=config
    )


@pytest.mark.distributed
def test_points_train_alike_on_two_processes_and_end_with_the_same_bytes_after_a_stop(points: Path) -> None:
    test = f"data.test={points.parent / 'test.npz'}"
    alone = training(points, "alone", test, "evaluation.knn_every_epochs=1", "evaluation.online_probe=true")
    assert alone.wait() == [0], alone.output
    stopped = training(points, "stopped", test, "train.max_steps=10", world_size=2)
    assert stopped.wait() == [0, 0], stopped.output
    resumed = training(points, "stopped", test, world_size=2)
    assert resumed.wait() == [0, 0], resumed.output
    whole = training(points, "whole", test, world_size=2)
    assert whole.wait() == [0, 0], whole.output
    assert resumed.final_bytes() == whole.final_bytes()
    np.testing.assert_allclose(whole.losses(), alone.losses(), rtol=1e-4)
    assert "512 points, 2 views of 12 numbers" in alone.output[0]

    # Online and afterwards, kNN says the same of the same encoder.
    run("evaluate", "knn", str(alone.run_dir), "--no-cache", "--baselines")
    *_, online, offline = [json.loads(line) for line in (alone.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert online["top1"] == offline["top1"] > 0.8  # chance is a quarter
    assert "image_size" not in offline
    assert offline["options"] == {"noise": 1.0}


def run(*arguments: str, code: int = 0) -> str:
    process = ModuleProcess("tests.own_kind", list(arguments), {**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait(200) == code, process.output()
    return process.output()


def test_other_commands_take_points_or_say_that_they_do_not(points: Path) -> None:
    test, config = f"data.test={points.parent / 'test.npz'}", str(points.parent / "points.yaml")
    gallery = training(points, "run", test, "monitor.projector_every_epochs=3", "monitor.image_pairs=4")
    assert gallery.wait() == [0], gallery.output
    projector = next((gallery.run_dir / "tensorboard" / "projector").iterdir())
    assert {path.name for path in projector.iterdir()} == {"vectors.tsv", "labels.tsv"}  # of points there is no picture
    out = points.parent / "points.parquet"
    run("embed", str(gallery.run_dir), str(points), str(out))
    assert load_embeddings(out).h.shape == (512, 16)
    assert "0.9" in run("neighbours", str(out), f"{points}[3]", "--k", "2")
    assert "neither the name of what was embedded" in run("neighbours", str(out), str(points), code=2)
    assert "export is for encoders of images" in run("export", str(gallery.run_dir), "--crop", "1", code=2)
    assert "verdict is for encoders of images" in run("verdict", str(gallery.run_dir), code=2)
    assert "fine-tuning is for encoders of images" in run("finetune", str(gallery.run_dir), code=2)
    run("report", str(gallery.run_dir), "--out", str(points.parent / "page.html"))
    page = (points.parent / "page.html").read_text()
    assert "views of a point are neither pictures nor texts" in page
    assert "t-SNE of h" in page
    assert "512 points" in run("doctor", config, f"data.train={points}", test)
    assert "512 points" in run("plan", config, f"data.train={points}", test, "--measure")


def test_a_view_is_a_function_of_its_key_and_a_wrong_one_is_named(points: Path) -> None:
    """In a batch of all processes, or of one; in one order, or another; again after the file was opened anew."""
    kind = Points(section(points))

    def views(world: World) -> tuple[list[int], torch.Tensor]:
        with kind.loader(AugmentConfig(), seed=3, global_batch_size=8, world=world, device="cpu") as loader:
            batches = loader.batches(5)
            next(batches)
            batch = next(batches)
            return batch.sample_ids.tolist(), batch.views

    ids, whole = views(World())
    for rank in (0, 1):
        own_ids, own = views(World(rank=rank, size=2))
        assert own_ids == ids[4 * rank : 4 * rank + 4]
        assert torch.equal(own, whole[:, 4 * rank : 4 * rank + 4])
    assert not torch.equal(whole[0], whole[1])

    class Wrong(Points):
        def draw_views(self, values: NDArray, view_keys: NDArray[np.uint64]) -> NDArray:
            return values

    with pytest.raises(DataError, match="draw_views gave"):
        next(
            Wrong(section(points))
            .loader(AugmentConfig(), seed=0, global_batch_size=8, world=World(), device="cpu")
            .batches(0)
        )


def test_views_of_the_next_batches_are_drawn_while_a_step_computes(points: Path) -> None:
    calls = queue.Queue[int]()

    class Counted(Points):
        def draw_views(self, values: NDArray, view_keys: NDArray[np.uint64]) -> NDArray:
            calls.put(threading.get_ident())
            return super().draw_views(values, view_keys)

    kind = Counted(section(points, batches_ahead=3))
    with kind.loader(AugmentConfig(), seed=0, global_batch_size=8, world=World(), device="cpu") as loader:
        next(loader.batches(0))
        threads = {calls.get(timeout=60) for _ in range(4)}  # this one, and three ahead
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert calls.empty()


def test_rows_have_the_fingerprint_of_their_content(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    rows = Rows(values, np.array(["b", "", "a"]))
    assert rows.class_names == ("a", "b")
    assert rows.labels.tolist() == [1, -1, 0]
    assert Rows(values).labels.tolist() == [-1, -1, -1]
    others = [
        Rows(values),
        Rows(values, np.array(["b", "", "b"])),
        Rows(values + 1, rows.classes),
        Rows(values.T, None),
    ]
    assert len({rows.fingerprint, *(other.fingerprint for other in others)}) == 5
    path = write_points(tmp_path / "points.npz", 16, seed=0)
    before = kind_of(section(path)).describe(str(path))
    write_points(path, 17, seed=0)
    assert kind_of(section(path)).describe(str(path)).num_samples == before.num_samples + 1


def test_settings_that_only_images_have_and_unknown_kinds_are_refused(points: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            load_config(points.parent / "points.yaml", [f"data.train={points}", *overrides])
        return str(error.value)

    assert "data.image_size: is of images, not of data.kind=points: leave it out" in refused("data.image_size=32")
    for setting in ("augment.blur_p=0.5", "model.first_layer=whitened", "data.order=page_local", "data.loader=folder"):
        assert "only images have it, and data.kind is points" in refused(setting)
    assert "evaluation.image_size: only images have it" in refused("evaluation.image_size=64")
    assert "data.image_size: is missing" in refused("data.kind=images", "data.options={}")
    with pytest.raises(ConfigError, match=r"unknown kind 'pointz'; known are images, .*points"):
        kind_of(section(points, kind="pointz"))
    with pytest.raises(ValueError, match="is taken"):
        register("images", Images)


def test_a_run_of_images_is_not_continued_with_points(points: Path, tmp_path: Path) -> None:
    images = Training(tmp_path / "none", tmp_path, "run", "data.train=synthetic", "train.max_steps=1")
    assert images.wait() == [0], images.output
    again = training(points, "run")
    assert again.wait() == [2]
    assert "data.kind: images then, points now" in again.output[0]


def test_the_example_of_cells_splits_hides_and_compares_as_it_says(tmp_path: Path) -> None:
    """examples/gene_expression.py trains on such cells in the same way; its counts are drawn here."""
    generator = np.random.default_rng(0)
    counts, types = np.log1p(generator.poisson(2.0, (100, 30))), np.array([f"type {i % 3}" for i in range(100)])
    path = str(tmp_path / "cells.npz")
    np.savez(path, log_counts=counts, types=types)
    cells = Cells(DataConfig.model_validate(gene_expression.settings(path)["data"]))
    train, test = cells.rows(f"{path}#train"), cells.rows(f"{path}#test")
    assert (len(train.values), len(test.values)) == (80, 20)
    together = np.concatenate([train.values, test.values])
    np.testing.assert_array_equal(np.sort(together[:, 0]), np.sort(counts[:, 0].astype(np.float32)))

    view_keys = keys(0, 0, np.arange(80)[None], np.arange(2)[:, None])
    views = cells.draw_views(train.values, view_keys)
    kept = views[:, train.values > 0] != 0
    assert kept.mean() == pytest.approx(0.6, abs=0.03)
    np.testing.assert_array_equal(views[views != 0], np.broadcast_to(train.values, views.shape)[views != 0])

    from sklearn.decomposition import PCA

    expected = PCA(20).fit(train.values).transform(test.values)
    found = cells.baselines(f"{path}#train")["20 components"](torch.from_numpy(test.values)).detach().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    with pytest.raises(DataError, match="not a file with log_counts"):
        cells.open(str(write_points(tmp_path / "points.npz", 4, seed=0)) + "#train")
    assert load_config(gene_expression.settings(path)).data.options == {"hidden": 0.4}
