"""One cluster for most tests; those that kill daemons get their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, make_checkout
from tests.slurm.mini_slurm import PREEMPTION, MiniSlurm, why_not


@pytest.fixture(scope="session")
def _slurm_installed() -> None:
    reason = why_not()
    if reason and os.environ.get("SIMCLR_REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="package")
def shared_cluster(_slurm_installed: None) -> Iterator[MiniSlurm]:
    with MiniSlurm(extra=PREEMPTION) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: MiniSlurm) -> Iterator[MiniSlurm]:
    yield shared_cluster
    shared_cluster.reset()


@pytest.fixture
def own_cluster(_slurm_installed: None) -> Iterator[MiniSlurm]:
    with MiniSlurm() as running:
        yield running


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")
