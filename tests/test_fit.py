"""`prepare --for-views`: photographs take fewer bytes, small images stay as they are, and all of it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simclr_dist.cli import main
from simclr_dist.config import DataConfig, load_config
from simclr_dist.data.beton.fit import Fit, choose_fit, prepared_for, remark_on_views
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.doctor.data import examine_data
from simclr_dist.training.preflight import check_training
from tests.conftest import REPOSITORY
from tests.images import make_image
from tests.training import TINY


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of 375 x 500 pixels."""
    return made(tmp_path_factory.mktemp("photographs"), [(375, 500)] * 8)


def made(root: Path, sizes: list[tuple[int, int]]) -> Path:
    (root / "a").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(make_image(i, height, width)).save(root / "a" / f"{i}.jpg", quality=95, subsampling="4:2:0")
    return root


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def test_the_rule() -> None:
    assert choose_fit(None, None, None) == Fit(None, 90, 90)
    assert choose_fit(None, 400, 80) == Fit(400, 80, 80)
    assert choose_fit(224, None, None) == Fit(320, 90, 75)
    assert choose_fit(384, None, None).max_side == 549
    assert [choose_fit(side, None, None).max_side for side in (1, 24, 32, 64)] == [96] * 4  # such images are raw


def test_what_is_said_wins_over_the_rule() -> None:
    assert choose_fit(224, 400, None) == Fit(400, 90, 75)
    assert choose_fit(224, None, 85) == Fit(320, 85, 85)


def test_photographs_take_less_than_45_percent_of_the_bytes(photographs: Path, tmp_path: Path) -> None:
    default = prepare(photographs, tmp_path / "default.beton", num_workers=1)
    fit = prepare(photographs, tmp_path / "fit.beton", for_views=224, num_workers=1)
    with open_beton(default.path) as large, open_beton(fit.path) as small:
        assert int(small.record_bytes.sum()) <= 0.45 * int(large.record_bytes.sum())
        assert {tuple(row) for row in small.images[["height", "width"]].tolist()} == {(240, 320)}
    assert (default.num_shrunk, fit.num_shrunk) == (0, 8)


@pytest.mark.parametrize("side", [24, 32, 64, 96])
def test_images_that_are_small_already_are_stored_to_the_byte_as_without_it(side: int, tmp_path: Path) -> None:
    source = made(tmp_path / "in", [(32, 32), (96, 96), (64, 90)])
    files = [tmp_path / "default.beton", tmp_path / "fit.beton"]
    for file, for_views in zip(files, (None, side), strict=True):
        prepare(source, file, for_views=for_views, num_workers=1)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert remark_on_views(files[1], 224) == ""  # nothing was taken from them


def test_only_images_that_are_shrunk_become_coarser(tmp_path: Path) -> None:
    source = made(tmp_path / "in", [(200, 320), (400, 500)])
    contents = []
    for for_views in (None, 224):
        with open_beton(prepare(source, tmp_path / f"{for_views}.beton", for_views=for_views, num_workers=1).path) as b:
            contents.append([b.path.read_bytes()[r[0] : r[0] + r[1]] for r in b.records(b.labels * 0 + [0, 1])])
    (kept, large), (same, small) = contents
    assert kept == same
    assert len(small) < 0.6 * len(large)


def test_the_choice_is_printed_written_and_shown(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "fit.beton"
    run("prepare", photographs, out, "--for-views", "224", "--workers", "1")
    printed = capsys.readouterr().out
    assert "for views of 224 px: longer sides of up to 320 px, JPEG quality 75" in printed
    assert "8 of 8 images were shrunk" in printed
    sidecar = json.loads(sidecar_path(out).read_text())
    chosen = [sidecar[key] for key in ("for_views", "max_side", "quality", "quality_of_shrunk", "num_shrunk")]
    assert chosen == [224, 320, 90, 75, 8]
    run("inspect", out)
    assert "views of 224 px: 8 images shrunk to 320 px, JPEG quality 75" in capsys.readouterr().out


def test_a_training_on_larger_views_is_warned_before_it_starts(photographs: Path, tmp_path: Path) -> None:
    out = str(prepare(photographs, tmp_path / "fit.beton", for_views=112, num_workers=1).path)
    assert remark_on_views(out, 112) == ""
    said = "prepared for views of 112 px; this training takes 128 px"
    settings = [*TINY, f"data.train={out}", f"runs_dir={tmp_path}", "train.global_batch_size=8"]
    smoke = REPOSITORY / "configs" / "smoke.yaml"
    assert any(
        said in remark for remark in check_training(load_config(smoke, [*settings, "data.image_size=128"])).remarks
    )
    assert check_training(load_config(smoke, [*settings, "data.image_size=96"])).remarks == ()
    found = [f for f in examine_data(DataConfig(train=out, image_size=128), 8) if said in f.found]
    assert [finding.level for finding in found] == ["warning"]


@pytest.mark.parametrize("value", ["224", 0, -1, True, None, [224], 1.5])
def test_a_sidecar_that_says_something_else_says_nothing(value: object) -> None:
    assert prepared_for({"for_views": value}) is None
