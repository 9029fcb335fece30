"""What tests share: where real images are, and one intra-op thread so that results do not depend on the machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# A suite that runs in the background, or under nohup, ignores these, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionfinish() -> None:
    """A test that fails may leave a training behind, for which Python would wait for ever."""
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with real images: $SIMCLR_DATA, or the one beside the checkout."""
    candidates = [Path(os.environ["SIMCLR_DATA"])] if "SIMCLR_DATA" in os.environ else []
    candidates.append(REPOSITORY.parent / "shared" / "data")
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"no real images at {', '.join(map(str, candidates))}; set SIMCLR_DATA")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 images of noise to train on, as a .beton file."""
    from tests.training import write_images  # which imports this file

    return write_images(tmp_path_factory.mktemp("images") / "noise.beton")
