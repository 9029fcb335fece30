"""Randomness is a pure function of (seed, epoch, sample, view, draw), the same everywhere and for ever."""

from __future__ import annotations

import numpy as np
import pytest

from simclr_dist.data import randomness
from simclr_dist.data.randomness import keys, permutation, uniform

WORD = 2**64


def oracle_mix(z: int) -> int:
    """SplitMix64's finaliser in plain integers, as its authors print it."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def oracle_uniform(seed: int, epoch: int, sample: int, view: int, draw: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = oracle_mix((seed + golden) % WORD)
    for part in (epoch, sample, view):
        key = oracle_mix(key ^ ((part + golden) % WORD))
    return (oracle_mix((key + (draw + 1) * golden) % WORD) >> 11) * 2.0**-53


def test_agrees_with_plain_integers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        seed, epoch, sample, view, draw = (int(rng.integers(0, top)) for top in (2**63, 2000, 2**40, 8, 200))
        assert uniform(keys(seed, epoch, sample, view), draw)[0] == oracle_uniform(seed, epoch, sample, view, draw)


def test_numbers_never_change() -> None:
    """Golden: a change here makes every resumed run see other views."""
    assert uniform(keys(0, 0, [0, 1], 0), 0).tolist() == [oracle_uniform(0, 0, i, 0, 0) for i in (0, 1)]
    assert keys(7, 3, [5], 1)[0] == np.uint64(4899591385694858341)
    assert permutation(7, 3, 0, 10).tolist() == [3, 1, 9, 8, 5, 4, 7, 6, 0, 2]


def test_purposes_keep_their_draw_numbers() -> None:
    names = "CROP FLIP JITTER BRIGHTNESS CONTRAST SATURATION HUE JITTER_ORDER GRAYSCALE BLUR BLUR_SIGMA SOLARIZE"
    assert [getattr(randomness, name) for name in names.split()] == [0, 64, 80, 81, 82, 83, 84, 85, 96, 112, 113, 128]


def test_draws_are_uniform() -> None:
    x = uniform(keys(0, 0, np.arange(20_000)[:, None], 0), np.arange(5))
    counts = np.apply_along_axis(lambda column: np.histogram(column, 50, (0, 1))[0], 0, x)
    chi_squared = ((counts - 400) ** 2 / 400).sum(0)
    assert (chi_squared < 100).all()  # 49 degrees of freedom: p < 3e-5


@pytest.mark.parametrize("other", ["seed", "epoch", "sample", "view", "draw"])
def test_neighbours_are_independent(other: str) -> None:
    place = {"seed": 1, "epoch": 1, "sample": np.arange(20_000), "view": 0, "draw": 4}
    moved = place | {other: place[other] + 1}
    a, b = (uniform(keys(p["seed"], p["epoch"], p["sample"], p["view"]), p["draw"]) for p in (place, moved))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # 4 standard errors


def test_seed_and_epoch_do_not_trade_places() -> None:
    assert keys(0, 1, [5], 0) != keys(1, 0, [5], 0)


def test_permutation_is_one_and_looks_random() -> None:
    n = 10_000
    order = permutation(0, 0, 0, n)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.04
    assert np.mean(order == permutation(0, 1, 0, n)) < 0.001
