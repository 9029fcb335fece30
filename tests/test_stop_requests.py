"""Requests to a running training: what is granted, how often, and until when."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from simclr_dist.run import stop_requests
from simclr_dist.run.stop_requests import Request, Requests


@pytest.fixture(autouse=True)
def _look_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_requests, "POLL_S", 0.0)


def granted(requests: Requests) -> Request:
    """By the next step."""
    requests.announce()
    return requests.agreed()


def test_a_save_is_granted_once(tmp_path: Path) -> None:
    with Requests(tmp_path, torch.device("cpu")) as requests:
        assert granted(requests) == Request.NONE
        requests.ask(Request.SAVE)
        assert [granted(requests), granted(requests)] == [Request.SAVE, Request.NONE]
        (tmp_path / "SAVE").touch()
        assert [granted(requests), granted(requests)] == [Request.SAVE, Request.NONE]
        assert not (tmp_path / "SAVE").exists()


def test_a_stop_stays_and_a_signal_is_stronger(tmp_path: Path) -> None:
    with Requests(tmp_path, torch.device("cpu")) as requests:
        (tmp_path / "STOP").touch()
        assert [granted(requests), granted(requests)] == [Request.STOP, Request.STOP]
        requests.forget_files()
        assert not (tmp_path / "STOP").exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert granted(requests) == Request.PREEMPT


def test_signals_have_their_handlers_back_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Requests(tmp_path, torch.device("cpu")):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
