"""A data set is known by its content: pixels as stored, labels and class names, wherever and however it lies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_dist.cli import main
from simclr_dist.config import DataConfig, load_config
from simclr_dist.data.beton import content
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import DESCRIPTOR, HEADER, metadata_type, open_beton, sidecar_path
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.loading.inspect import inspect_beton
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.errors import CheckpointError
from simclr_dist.evaluation.offline import features_of
from simclr_dist.few_labels.subsets import Subset, load_subset, save_subset
from simclr_dist.training.resuming import restore
from tests.conftest import REPOSITORY
from tests.images import make_folder

needs_ffcv = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_noise(root: Path, seed: int, classes: tuple[str, str] = ("ant", "bee"), side: int = 8) -> Path:
    """Six images of noise whose file names, sizes and classes do not depend on the seed."""
    random = np.random.default_rng(seed)
    for i in range(6):
        path = root / classes[i % 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return root


def make_noise_beton(root: Path, seed: int, **options) -> Path:
    prepare(make_noise(root / f"in{seed}", seed, **options), root / f"{seed}.beton", num_workers=1)
    return root / f"{seed}.beton"


def fingerprint(path: Path) -> str:
    return describe(str(path)).content_fingerprint


def without_written_digest(path: Path) -> Path:
    """As ffcv's own writer and release 0.1 leave it: nothing in the descriptor, no sidecar."""
    raw = bytearray(path.read_bytes())
    start = HEADER.itemsize + DESCRIPTOR.fields["arguments"][1]
    raw[start : start + 1024] = bytes(1024)
    other = path.with_name("of_others.beton")
    other.write_bytes(raw)
    return other


class TestFingerprint:
    def test_other_pixels_of_the_same_sizes_and_labels_are_other_data(self, tmp_path: Path) -> None:
        a, b = (make_noise_beton(tmp_path, seed) for seed in (1, 2))
        assert a.stat().st_size == b.stat().st_size
        assert fingerprint(a) != fingerprint(b)
        assert fingerprint(without_written_digest(a)) != fingerprint(without_written_digest(b))

    def test_a_renamed_class_is_other_data(self, tmp_path: Path) -> None:
        a = make_noise_beton(tmp_path / "a", 1)
        b = make_noise_beton(tmp_path / "b", 1, classes=("ant", "cow"))
        assert fingerprint(a) != fingerprint(b)

    def test_the_same_images_with_other_labels_are_other_data(self, tmp_path: Path) -> None:
        path = without_written_digest(make_noise_beton(tmp_path, 1))
        before = fingerprint(path)
        row, start = metadata_type([2, 1]), HEADER.itemsize + 2 * DESCRIPTOR.itemsize
        raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
        labels = raw[start : start + 6 * row.itemsize].view(row)["f1"]
        labels[:] = 1 - labels
        path.write_bytes(raw)
        assert fingerprint(path) != before

    def test_the_same_data_elsewhere_are_the_same(self, tmp_path: Path) -> None:
        a = make_noise_beton(tmp_path, 1)
        moved = tmp_path / "moved" / "to.beton"
        moved.parent.mkdir()
        shutil.copy(a, moved)
        shutil.copy(sidecar_path(a), sidecar_path(moved))
        assert fingerprint(moved) == fingerprint(a)

    def test_what_prepare_writes_is_what_reading_finds(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "in", 40)
        prepare(tmp_path / "in", tmp_path / "a.beton", num_workers=1)
        with open_beton(tmp_path / "a.beton") as beton:
            assert content.read_records_digest(beton) == beton.written_digest

    def test_files_of_others_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = without_written_digest(make_noise_beton(tmp_path, 1))
        reads = []
        real = content.read_records_digest
        monkeypatch.setattr(content, "read_records_digest", lambda beton: reads.append(1) or real(beton))
        first = fingerprint(path)
        assert fingerprint(path) == first
        assert len(reads) == 1
        os.utime(path, ns=(0, 0))  # changed, as far as one can tell without reading it
        assert fingerprint(path) == first
        assert len(reads) == 2

    def test_a_cache_folder_that_cannot_be_written_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = without_written_digest(make_noise_beton(tmp_path, 1))
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert fingerprint(path) == fingerprint(path)


class TestSidecar:
    def test_one_of_another_file_is_not_believed(self, tmp_path: Path) -> None:
        a = make_noise_beton(tmp_path / "a", 1)
        b = make_noise_beton(tmp_path / "b", 2, classes=("x", "y"))
        shutil.copy(sidecar_path(b), sidecar_path(a))
        with pytest.warns(UserWarning, match="belongs to another file .* class names are not used"):
            assert describe(str(a)).class_names == ("0", "1")

    @pytest.mark.parametrize(
        "change",
        [lambda s: s | {"class_names": ["first", "second"]}, lambda s: {"class_names": ["first", "second"]}],
        ids=["edited by hand", "written by hand"],
    )
    def test_its_class_names_can_be_given_by_hand(self, tmp_path: Path, change) -> None:
        a = make_noise_beton(tmp_path, 1)
        before = fingerprint(a)
        sidecar_path(a).write_text(json.dumps(change(json.loads(sidecar_path(a).read_text()))))
        assert describe(str(a)).class_names == ("first", "second")
        assert fingerprint(a) != before

    def test_a_link_finds_it_beside_its_target(self, tmp_path: Path) -> None:
        a = make_noise_beton(tmp_path, 1)
        (tmp_path / "link.beton").symlink_to(a)
        assert describe(str(tmp_path / "link.beton")).class_names == ("ant", "bee")


@needs_ffcv
def test_verify_finds_a_changed_pixel(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = make_noise_beton(tmp_path, 1)
    assert inspect_beton(path, verify=True).changed is False
    raw = bytearray(path.read_bytes())
    with open_beton(path) as beton:
        raw[int(beton.images["data_ptr"][3]) + 7] ^= 1
    path.write_bytes(raw)
    found = inspect_beton(path, verify=True)
    assert (found.damaged, found.changed) == ({}, True)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--verify"])
    assert ended.value.code == 2
    assert "have changed since it was written" in capsys.readouterr().err
    assert inspect_beton(without_written_digest(path), verify=True).changed is None


class TestWhoUsesIt:
    def test_features_of_other_pixels_do_not_come_from_the_cache(self, tmp_path: Path) -> None:
        class Mean(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.mean((2, 3))

        def features(path: Path, said: list[str]) -> torch.Tensor:
            return features_of(
                Mean(),
                str(path),
                describe(str(path)),
                DataConfig(train=str(path), image_size=8),
                device=torch.device("cpu"),
                precision="fp32",
                batch_size=4,
                cache=tmp_path / "features",
                say=said.append,
            ).h

        a, b = (without_written_digest(make_noise_beton(tmp_path / str(seed), seed)) for seed in (1, 2))
        assert describe(str(a)).fingerprint == describe(str(b)).fingerprint  # of the tables, as release 0.1 had it
        said: list[str] = []
        first = features(a, said)
        assert not torch.equal(first, features(b, said))
        assert torch.equal(first, features(a, said))
        assert [str(tmp_path / "features") in line for line in said] == [False, False, True]

    @pytest.mark.parametrize("recorded", ["of the content", "of release 0.1"])
    def test_a_run_is_continued_on_the_same_images(self, recorded: str) -> None:
        with pytest.raises(CheckpointError, match="these differ: seed: 1 then, 2 now\\."):
            self.restore_with(recorded)

    def test_a_run_is_not_continued_on_other_images(self) -> None:
        with pytest.raises(CheckpointError, match="the images' fingerprint: of other images then, of the content now"):
            self.restore_with("of other images")

    def restore_with(self, recorded: str) -> None:
        """Always refused, for another seed at least: the message says what else differs."""

        before, now = (load_config(REPOSITORY / "configs" / "smoke.yaml", [f"seed={seed}"]) for seed in (1, 2))
        loader = SimpleNamespace(content_fingerprint="of the content", fingerprint="of release 0.1")
        found = SimpleNamespace(path="there", config=before, fingerprint=recorded)
        restore(found, now, loader, nn.Linear(1, 1), None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("attribute", ["content_fingerprint", "fingerprint"])
    def test_a_subset_is_used_on_the_images_it_was_drawn_from(self, tmp_path: Path, attribute: str) -> None:
        info = describe(str(make_noise_beton(tmp_path, 1)))
        save_subset(tmp_path / "subset.json", Subset((0, 5), getattr(info, attribute), 0.3, 0))
        assert load_subset(tmp_path / "subset.json", info).ids == (0, 5)


def test_every_reader_names_the_same_content(tmp_path: Path) -> None:
    path = make_noise_beton(tmp_path, 1)
    assert BetonSource(path).content_fingerprint == fingerprint(path)
    assert inspect_beton(path).fingerprint == fingerprint(path)
