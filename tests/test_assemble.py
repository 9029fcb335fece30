"""merge, split and append copy every byte of every record, and lose nothing whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simclr_dist import cli
from simclr_dist.data.beton import assemble
from simclr_dist.data.beton.assemble import append, merge, split
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import Beton, open_beton, sidecar_path
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError
from tests.images import make_folder
from tests.test_shards import tiny

NUM_SAMPLES = 23


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    make_folder(root / "images", NUM_SAMPLES)
    (root / "images" / "class0" / "notes.txt").write_text("")
    prepare(root / "images", root / "train.beton", num_workers=1, for_views=72)
    return root / "train.beton"


def samples(path: Path) -> list[tuple[bytes, int, int, int, str]]:
    """Record, mode, height, width and class of each."""

    def one(beton: Beton, i: int) -> tuple[bytes, int, int, int, str]:
        offset, size, mode, height, width = beton.records(np.array([i]))[0].tolist()
        label = int(beton.labels[i])
        return os.pread(beton.fd, size, offset), mode, height, width, beton.class_names[label] if label >= 0 else ""

    with open_beton(path) as beton:
        return [one(beton, i) for i in range(beton.num_samples)]


def said(path: Path) -> dict:
    return json.loads(sidecar_path(path).read_text())


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, arguments)))
    return int(stop.value.code or 0)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("num_shards", [1, 4, NUM_SAMPLES])
def test_split_then_merge_gives_the_same_bytes(whole: Path, tmp_path: Path, num_shards: int) -> None:
    folder, written = split(whole, num_shards, tmp_path / "shards")
    paths = sorted(folder.glob("*.beton"))
    assert [path.name for path in paths] == [f"train-{k:05}-of-{num_shards:05}.beton" for k in range(num_shards)]
    assert [one.path for one in written] == paths
    sizes = [len(samples(path)) for path in paths]
    assert sum(sizes) == NUM_SAMPLES
    assert max(sizes) - min(sizes) <= 1
    assert [sample for path in paths for sample in samples(path)] == samples(whole)
    merge(tmp_path / "again.beton", [folder])
    assert (tmp_path / "again.beton").read_bytes() == whole.read_bytes()
    before, after = said(whole), said(tmp_path / "again.beton")
    told = set(before) - {"source", "account"}
    assert {key: after[key] for key in told} == {key: before[key] for key in told}
    assert describe(str(tmp_path / "again.beton")).content_fingerprint == describe(str(whole)).content_fingerprint
    assert after["account"]["left_out"] == before["account"]["left_out"] != []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_merged_classes_are_matched_by_name_and_statistics_are_those_of_all(tmp_path: Path) -> None:
    for part, numbers in (("a", (0, 1)), ("b", (2, 1))):
        made = make_folder(tmp_path / "made", 9)
        assert made
        for number in numbers:
            source = tmp_path / "made" / f"class{number}"
            target = tmp_path / part / f"class{number}"
            target.mkdir(parents=True)
            for image in source.iterdir():
                (target / f"{part}{image.name}").write_bytes(image.read_bytes())
        prepare(tmp_path / part, tmp_path / f"{part}.beton", num_workers=1, mode="raw")
    merged = merge(tmp_path / "all.beton", [tmp_path / "b.beton", tmp_path / "a.beton"])
    assert samples(tmp_path / "all.beton") == samples(tmp_path / "b.beton") + samples(tmp_path / "a.beton")
    assert merged.class_names == ("class1", "class2", "class0")
    assert merged.class_counts == (6, 3, 3)
    both = tmp_path / "both"
    both.mkdir()
    for part in ("a", "b"):
        for folder in (tmp_path / part).iterdir():
            (both / folder.name).mkdir(exist_ok=True)
            for image in folder.iterdir():
                (both / folder.name / image.name).write_bytes(image.read_bytes())
    prepare(both, tmp_path / "both.beton", num_workers=1, mode="raw")
    for key in ("mean", "std"):
        assert said(tmp_path / "all.beton")[key] == pytest.approx(said(tmp_path / "both.beton")[key], abs=3e-6)
    assert [part["file"] for part in said(tmp_path / "all.beton")["parts"]] == [
        str(tmp_path / "b.beton"),
        str(tmp_path / "a.beton"),
    ]


def test_files_of_ffcvs_own_writer_and_unlabelled_ones_are_copied(tmp_path: Path) -> None:
    tiny(tmp_path / "a.beton", 2, label=3)
    tiny(tmp_path / "b.beton", 2, value=9, label=-1)
    merge(tmp_path / "out.beton", [tmp_path / "a.beton", tmp_path / "b.beton"])
    assert [sample[-1] for sample in samples(tmp_path / "out.beton")] == ["3", "3", "", ""]
    assert "account" not in said(tmp_path / "out.beton")
    assert "mean" not in said(tmp_path / "out.beton")


def test_append_keeps_numbers_and_settings_and_does_not_add_twice(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.beton"
    merge(file, [whole])
    old = samples(file)
    make_folder(tmp_path / "more", 5, num_classes=5)  # class3 and class4 are new
    written = append(file, tmp_path / "more")
    assert samples(file)[:NUM_SAMPLES] == old
    assert written.num_samples == NUM_SAMPLES + 5
    assert written.class_names == ("class0", "class1", "class2", "class3", "class4")
    prepare(tmp_path / "more", tmp_path / "more.beton", num_workers=1, for_views=72)
    assert samples(file)[NUM_SAMPLES:] == samples(tmp_path / "more.beton")
    assert said(file)["account"]["taken"] == NUM_SAMPLES + 5
    assert said(file)["parts"][-1]["file"] == str(tmp_path / "more")
    for again in (tmp_path / "more", tmp_path / "more.beton"):
        with pytest.raises(DataError, match=r"has the samples of .*more.* already: they were added from"):
            append(file, again)
    with pytest.raises(DataError, match="is the file itself"):
        append(file, file)
    assert len(samples(file)) == NUM_SAMPLES + 5


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_cannot_be_copied_rightly_is_refused_and_nothing_is_written(whole: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.beton"
    content = bytearray(whole.read_bytes())
    with open_beton(whole) as beton:
        content[int(beton.images["data_ptr"][7]) + 40] ^= 1
    damaged.write_bytes(content)
    sidecar_path(damaged).write_bytes(sidecar_path(whole).read_bytes())
    there = sorted(os.listdir(tmp_path))
    out = tmp_path / "out.beton"
    with pytest.raises(DataError, match=r"damaged\.beton: its pixels or labels have changed since it was written"):
        merge(out, [whole, damaged])
    with pytest.raises(DataError, match=r"damaged\.beton: its pixels"):
        split(damaged, 3)
    with pytest.raises(DataError, match="named twice"):
        merge(out, [whole, whole])
    with pytest.raises(DataError, match=r"damaged\.beton: exists already; --overwrite"):
        merge(damaged, [whole])
    with pytest.raises(DataError, match="is a source itself"):
        merge(damaged, [whole, damaged], overwrite=True)
    with pytest.raises(DataError, match=r"--shards 99: .* holds 23 samples"):
        split(whole, 99, tmp_path / "shards")
    with pytest.raises(DataError, match=r"images: is no \.beton file; make one"):
        merge(out, [whole.parent / "images"])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.txt").touch()
    with pytest.raises(DataError, match="is there already, and is not overwritten"):
        split(whole, 2, tmp_path / "shards")
    assert sorted(set(os.listdir(tmp_path)) - {"shards"}) == there


def test_other_fields_are_not_lost_in_silence(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "open_beton", lambda path: _with_field(open_beton(path), "boxes"))
    with pytest.raises(DataError, match=r"fields besides image and label, which would be lost: boxes"):
        merge(tmp_path / "out.beton", [whole])


def _with_field(beton: Beton, name: str) -> Beton:
    object.__setattr__(beton, "other_fields", (name,))
    return beton


KILLED = """
import sys, os, signal
from simclr_dist.data.beton import assemble, out_file, writer
where = sys.argv[1]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "copying":
    real, count = writer.PagedWriter.add, iter(range(10))
    writer.PagedWriter.add = lambda self, record: die() if next(count) == 9 else real(self, record)
elif where == "committing":
    out_file.os.replace = die
else:
    real = out_file.os.replace
    done = []
    def replace(*args):
        real(*args)
        done.append(args)
        len(done) == int(where) and die()
    out_file.os.replace = replace
if sys.argv[2] == "append":
    assemble.append(sys.argv[3], sys.argv[4])
else:
    assemble.split(sys.argv[3], 3, sys.argv[4])
"""


@pytest.mark.parametrize("where", ["copying", "committing", "1", "2"])
def test_a_kill_loses_nothing(whole: Path, tmp_path: Path, where: str) -> None:
    """In the middle of an append the file is the old or the new one, with the JSON file that belongs to it."""
    file, more = tmp_path / "train.beton", tmp_path / "more.beton"
    merge(file, [whole])
    tiny(more, 3, names=["class9"])
    old = samples(file)
    killed = subprocess.run([sys.executable, "-c", KILLED, where, "append", str(file), str(more)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    found = samples(file)
    assert found in (old, old + samples(more))
    with open_beton(file) as beton:
        assert beton.class_names[:3] == ("class0", "class1", "class2")
        assert ("class9" in beton.class_names) == (len(found) > len(old))
    if found == old:
        append(file, more)
    assert samples(file) == old + samples(more)
    merge(file, [whole], overwrite=True)  # the next one removes what was left
    assert not [name for name in os.listdir(tmp_path) if ".part-" in name]


def test_a_killed_split_leaves_no_folder(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    for where in ("copying", "1"):
        killed = subprocess.run([sys.executable, "-c", KILLED, where, "split", str(whole), str(folder)], timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert not folder.exists()
    split(whole, 3, folder)
    assert os.listdir(tmp_path) == ["shards"]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_commands(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("split", whole, "--shards", 3, "--out", tmp_path / "shards") == 0
    assert f"data.train: {tmp_path / 'shards'}" in capsys.readouterr().out
    assert run("merge", tmp_path / "all.beton", tmp_path / "shards" / "*.beton") == 0
    assert "23 images in 3 classes" in capsys.readouterr().out
    make_folder(tmp_path / "more", 2)
    assert run("append", tmp_path / "all.beton", tmp_path / "more") == 0
    assert "25 images in 3 classes" in capsys.readouterr().out
    assert run("append", tmp_path / "all.beton", tmp_path / "more") == 2
    assert "already" in capsys.readouterr().err
    assert run("merge", tmp_path / "all.beton", tmp_path / "gone.beton", "--overwrite") == 2
    assert "gone.beton: No such file" in capsys.readouterr().err
