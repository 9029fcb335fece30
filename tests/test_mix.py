"""data.mix: every batch has the shares of the weights, each source is gone through, any step can be entered."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_dist import cli
from simclr_dist.config import AugmentConfig, ConfigError, DataConfig, load_config
from simclr_dist.data.beton.assemble import merge, split
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.data.mix import MixedOrder, floor_sum
from simclr_dist.errors import DataError
from simclr_dist.parallel.distributed import World
from tests.conftest import REPOSITORY
from tests.test_shards import tiny
from tests.training import Training, write_images

SMOKE = REPOSITORY / "configs" / "smoke.yaml"
SIZES, WEIGHTS, G = (1000, 37, 5000), (5.0, 1.0, 4.0), 64


def draws(order: MixedOrder, num_epochs: int) -> np.ndarray:
    return np.concatenate([order.permutation(epoch) for epoch in range(num_epochs)])


def source_of(order: MixedOrder, samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(order.sizes), samples, side="right")


def test_floor_sum_is_the_sum_of_floors() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        n, m, a, b = (int(random.integers(low, 60)) for low in (0, 1, 0, 0))
        assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_every_batch_has_the_shares_of_the_weights() -> None:
    order = MixedOrder(SIZES, WEIGHTS, G, seed=3)
    batches = source_of(order, draws(order, 4)).reshape(-1, G)
    counts = np.stack([np.bincount(batch, minlength=3) for batch in batches])
    assert np.abs(counts - G * np.array(order.shares)).max() <= 3
    assert np.abs(counts.mean(0) / G - order.shares).max() < 1e-3
    rank = batches.reshape(-1, 4, G // 4)  # of four processes too
    assert np.abs(np.stack([(rank == s).sum(2) for s in range(3)], -1) - G / 4 * np.array(order.shares)).max() <= 3


def test_a_source_is_gone_through_before_it_begins_again_in_another_order() -> None:
    order = MixedOrder(SIZES, WEIGHTS, G, seed=3)
    drawn = draws(order, 3)
    source = source_of(order, drawn)
    for number, size in enumerate(SIZES):
        own = drawn[source == number]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch.tolist())) == size for epoch in epochs)
        assert len(epochs) < 2 or not np.array_equal(epochs[0], epochs[1])


def test_any_epoch_can_be_entered() -> None:
    order = MixedOrder(SIZES, WEIGHTS, G, seed=3)
    drawn = draws(order, 3)
    for place in (0, 1, 63, 5000, len(drawn)):
        counted = np.bincount(source_of(order, drawn[:place]), minlength=3).tolist()
        assert order.num_drawn(place) == counted
    assert np.array_equal(MixedOrder(SIZES, WEIGHTS, G, seed=3).permutation(2), drawn[2 * len(drawn) // 3 :])
    far = MixedOrder(SIZES, WEIGHTS, G, seed=3).num_drawn(10**15)
    assert sum(far) == 10**15
    assert np.array(far) / 1e15 == pytest.approx(order.shares, abs=1e-9)


def test_weights_too_unequal_to_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match="1e-12 is too small a weight beside 1"):
        MixedOrder((10, 10), (1.0, 1e-12), 4, seed=0)


def test_views_are_the_same_on_any_processes_and_differ_when_a_sample_comes_again(tmp_path: Path) -> None:
    files = [str(tiny(tmp_path / f"{i}.beton", n, value=v)) for i, (n, v) in enumerate([(3, 0), (30, 100)])]
    data = DataConfig(train=files, mix=[1.0, 1.0], image_size=8, num_threads=1, loader="folder")  # type: ignore[arg-type]
    augment = AugmentConfig(crop_scale_min=0.2)

    def read(step: int, count: int, world: World = World()) -> list:  # noqa: B008 - frozen
        with build_loader(data, augment, seed=3, global_batch_size=4, world=world, device="cpu") as loader:
            return list(itertools.islice(loader.batches(step), count))

    alone = read(0, 20)
    halves = [read(0, 20, World(rank=rank, size=2, local_size=2)) for rank in range(2)]
    for one, *parts in zip(alone, *halves, strict=True):
        assert one.sample_ids.tolist() == [i for part in parts for i in part.sample_ids.tolist()]
        assert torch.equal(one.views, torch.cat([part.views for part in parts], 1))
    for one, again in zip(alone[13:], read(13, 7), strict=True):
        assert torch.equal(one.views, again.views)
        assert one.epoch == again.epoch
    assert all((batch.sample_ids < 3).sum() in (1, 2, 3) for batch in alone)
    keys = {(batch.epoch, int(i)) for batch in alone[:8] for i in batch.sample_ids}
    assert len(keys) == sum(len(set(batch.sample_ids.tolist())) for batch in alone[:8])  # within the first epoch


def test_settings_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    files = [str(tiny(tmp_path / f"{i}.beton")) for i in range(2)]
    listed = f"data.train=[{', '.join(files)}]"
    for settings, message in (
        ([listed, "data.mix=[1.0]"], "data.mix has 1 weights, but data.train lists 2 places"),
        ([f"data.train={tmp_path}", "data.mix=[1.0, 2.0]"], "lists 1 place: it takes one weight for each of a list"),
        ([listed, "data.mix=[1.0, 0.0]"], "greater than 0"),
        ([listed, "data.mix=[1.0, 1.0]", "data.order=page_local"], "set data.order to random, not page_local"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(SMOKE, settings)


@pytest.mark.distributed
def test_a_training_says_its_mix_goes_on_exactly_and_refuses_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, written = split(write_images(tmp_path / "train.beton"), 4)
    rest = merge(tmp_path / "rest.beton", [one.path for one in written[1:]])
    listed = f"[{written[0].path}, {rest.path}]"
    mix = (f"data.train={listed}", "data.mix=[1.0, 1.0]", "train.max_steps=12")
    one = Training(folder, tmp_path, "one", *mix)
    assert one.wait() == [0], one.output
    assert "50.0% of" in one.output[0]
    assert "128 images, 3.0 epochs" in one.output[0]
    begun = Training(folder, tmp_path, "two", *mix, "train.max_steps=5")
    assert begun.wait() == [0], begun.output
    gone_on = Training(folder, tmp_path, "two", *mix)
    assert gone_on.wait() == [0], gone_on.output
    assert gone_on.losses() == one.losses()
    assert gone_on.final_bytes() == one.final_bytes()
    other = Training(folder, tmp_path, "two", *mix, "data.mix=[1.0, 3.0]", "train.max_steps=14")
    assert other.wait() == [2]
    assert "data.mix: [1.0, 1.0] then, [1.0, 3.0] now" in other.output[0]
    with pytest.raises(SystemExit):
        cli.main(["plan", str(SMOKE), *mix, "data.test=null", "evaluation.knn_every_epochs=null"])
    planned = capsys.readouterr().out
    assert f"50.0% of {written[0].path}: 128 images, 3.0 epochs" in planned
