"""What `simclr-dist demo` says at its end. The demo itself: tests/test_docs.py and `make demo`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simclr_dist.cli.demo import closing_line
from simclr_dist.monitor.speed import LAST_INTERVAL, SINCE_START
from simclr_dist.run.layout import read_records
from tests.training import Training


def test_the_closing_speed_is_that_of_the_trainings_own_table(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", "train.epochs=1")
    assert training.wait() == [0], training.output
    (table,) = re.findall(r"512 images, ([0-9,]+) images/s without evaluations and saves", training.output[0])
    log = read_records(training.run_dir / "log.jsonl")
    said = f"training: {table} images/s without evaluations and saves; the demo, from images to this table: 3 s"
    assert closing_line(log, 3.2) == said
    speeds = [line[LAST_INTERVAL] for line in log if LAST_INTERVAL in line]
    (step,) = {line["samples_seen"] for line in log if LAST_INTERVAL in line and line["step"] == 1}
    whole_s, intervals_s = 512 / log[-1][SINCE_START], sum(step / speed for speed in speeds)
    assert intervals_s == pytest.approx(whole_s, rel=0.2)  # the intervals, one a step here, make up the whole


def test_a_run_of_release_0_1_has_no_such_figure() -> None:
    assert closing_line([{"speed/images_per_s": 1549.0}], 7.0) == "the demo, from images to this table: 7 s"
