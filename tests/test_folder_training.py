"""Training on a folder of images goes through the same door as `prepare`: the same account, the same identity."""

from __future__ import annotations

import os
from pathlib import Path

from simclr_dist.data.loading.open_images import describe, open_images
from simclr_dist.data.sources.open import open_source
from tests.images import make_folder
from tests.training import Training

SMALL = ("data.loader=folder", "train.global_batch_size=8", "train.epochs=1")


def make_awkward_folder(root: Path) -> None:
    """Eight images; a name that is not UTF-8, a broken link and a file that is no image."""
    make_folder(root, 8)
    (root / "class0").rename(root / os.fsdecode(b"caf\xe9"))
    (root / "class1" / "gone.png").symlink_to("nowhere.png")
    (root / "class1" / "0.cr2").write_bytes(b"")


def test_every_door_gives_the_same_account(tmp_path: Path) -> None:
    make_awkward_folder(tmp_path / "in")
    source = str(tmp_path / "in")
    account = open_source(source).account
    assert (account.taken, account.num_left_out) == (8, 2)
    assert open_images(source, "folder").account == describe(source).account == account


def test_a_training_says_what_it_leaves_out_and_knows_its_images_again(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_awkward_folder(root)
    first = Training(root, tmp_path / "runs", "run", *SMALL)
    assert first.wait() == [0]
    assert r"read as        3 classes, the outermost folders (caf\xe9, class1, class2)" in first.output[0]
    assert "left out: 1 × a format that Pillow does not open (.cr2): class1/0.cr2" in first.output[0]
    assert "left out: 1 × link to nothing: class1/gone.png" in first.output[0]

    root.rename(tmp_path / "moved")
    moved = Training(tmp_path / "moved", tmp_path / "runs", "run", *SMALL)
    assert moved.wait() == [0], moved.output
    assert "resumes at step 1 of 1" in moved.output[0]

    image = tmp_path / "moved" / "class2" / "0002.png"
    image.write_bytes(image.read_bytes()[:-12] + bytes(12))
    changed = Training(tmp_path / "moved", tmp_path / "runs", "run", *SMALL)
    assert changed.wait() == [2]
    assert "fingerprint" in changed.output[0]
