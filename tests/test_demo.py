"""What `simclr-dist demo` says at its end. The demo itself: tests/test_docs.py and `make demo`."""

from __future__ import annotations

import re
from pathlib import Path

from simclr_dist.cli.demo import closing_line
from simclr_dist.run.layout import read_records
from tests.training import Training


def test_the_closing_speed_is_that_of_the_trainings_own_table(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", "train.epochs=1")
    assert training.wait() == [0], training.output
    (table,) = re.findall(r"512 images, ([0-9,]+) images/s in all", training.output[0])
    log = read_records(training.run_dir / "log.jsonl")
    assert closing_line(log, 3.2) == f"training: {table} images/s in all; the demo, from images to this table: 3 s"


def test_a_run_of_release_0_1_has_no_such_figure() -> None:
    assert closing_line([{"speed/images_per_s": 1549.0}], 7.0) == "the demo, from images to this table: 7 s"
