"""Writing .beton files: the same bytes for any number of workers, whole or not at all, and awkward images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.data.beton.writer import PAGE_BYTES
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.loading.inspect import inspect_beton
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.errors import DataError
from tests.images import make_folder, make_image

needs_ffcv = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 100)
    for workers in (1, 2):
        prepare(tmp_path / "in", tmp_path / f"{workers}.beton", num_workers=workers, mode="smart")
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()
    a, b = (json.loads(sidecar_path(tmp_path / f"{n}.beton").read_text()) for n in (1, 2))
    assert a == b


def test_raw_images_come_back_as_they_were(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "in", 10)
    info = prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1)
    source = BetonSource(tmp_path / "out.beton")
    assert info.num_samples == 10
    assert all(np.array_equal(source.read(i), pixels[i]) for i in range(10))
    assert source.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3


def test_jpeg_images_come_back_nearly_as_they_were(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "in", 10)
    prepare(tmp_path / "in", tmp_path / "out.beton", mode="jpg", num_workers=1)
    source = BetonSource(tmp_path / "out.beton")
    for i in range(10):
        assert abs(source.read(i).astype(int) - pixels[i]).mean() < 12


def test_smart_keeps_small_images_raw(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i, side in enumerate((32, 96, 97, 200)):
        Image.fromarray(make_image(i, side, side)).save(tmp_path / "in" / "a" / f"{i}.png")
    prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1)
    with open_beton(tmp_path / "out.beton") as beton:
        assert beton.images["mode"].tolist() == [1, 1, 0, 0]


def test_longer_sides_are_capped_and_proportions_kept(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i, (height, width) in enumerate([(50, 300), (300, 50), (60, 60), (3, 600)]):
        Image.fromarray(make_image(i, height, width)).save(tmp_path / "in" / "a" / f"{i}.png")
    prepare(tmp_path / "in", tmp_path / "out.beton", max_side=100, num_workers=1)
    with open_beton(tmp_path / "out.beton") as beton:
        assert beton.images[["height", "width"]].tolist() == [(17, 100), (100, 17), (60, 60), (1, 100)]


def test_limit_spreads_over_the_source(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 30)
    info = prepare(tmp_path / "in", tmp_path / "out.beton", limit=6, num_workers=1)
    assert info.class_counts == (2, 2, 2)


def test_sidecar_says_what_is_in_the_file(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "in", 7)
    info = prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1)
    sidecar = json.loads(sidecar_path(tmp_path / "out.beton").read_text())
    assert sidecar["num_samples"] == 7
    assert sidecar["class_names"] == ["class0", "class1", "class2"]
    assert sidecar["class_counts"] == [3, 2, 2]
    described = describe(str(tmp_path / "out.beton"))
    assert sidecar["fingerprint"] == described.fingerprint
    assert sidecar["content_fingerprint"] == info.fingerprint == described.content_fingerprint
    every = np.concatenate([p.reshape(-1, 3) for p in pixels]) / 255
    np.testing.assert_allclose(sidecar["mean"], every.mean(0), atol=1e-5)
    np.testing.assert_allclose(sidecar["std"], every.std(0), atol=1e-5)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 9)
    seen: list[tuple[int, int]] = []
    prepare(
        tmp_path / "in", tmp_path / "out.beton", num_workers=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, 9) for i in range(9)]


def test_records_fill_pages_and_never_cross_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encode", "writer"):
        monkeypatch.setattr(f"simclr_dist.data.beton.{module}.PAGE_BYTES", 1 << 15)
    make_folder(tmp_path / "in", 40)
    prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1, on_error="skip")
    with open_beton(tmp_path / "out.beton") as beton:
        first = beton.images["data_ptr"].astype(np.int64) // (1 << 15)
        last = (beton.images["data_ptr"].astype(np.int64) + beton.record_bytes - 1) // (1 << 15)
        assert np.array_equal(first, last)
        assert len(np.unique(first)) > 5
        assert np.array_equal(beton.pages(), first)


class TestAwkwardImages:
    """Everything becomes RGB, upright, on white."""

    def read(self, tmp_path: Path, image: Image.Image, suffix: str, **options) -> np.ndarray:
        (tmp_path / "in" / "a").mkdir(parents=True)
        image.save(tmp_path / "in" / "a" / f"0{suffix}", **options)
        prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1)
        return BetonSource(tmp_path / "out.beton").read(0)

    def test_grey(self, tmp_path: Path) -> None:
        grey = make_image(0, 20, 30)[..., 0]
        assert np.array_equal(self.read(tmp_path, Image.fromarray(grey), ".png"), np.repeat(grey[..., None], 3, 2))

    def test_grey_of_16_bits(self, tmp_path: Path) -> None:
        grey = make_image(0, 20, 30)[..., 0]
        image = Image.fromarray(grey.astype(np.uint16) * 256 + 99)
        assert np.array_equal(self.read(tmp_path, image, ".png"), np.repeat(grey[..., None], 3, 2))

    def test_black_and_white(self, tmp_path: Path) -> None:
        bits = make_image(0, 20, 30)[..., 0] > 127
        assert np.array_equal(self.read(tmp_path, Image.fromarray(bits), ".png")[..., 1], bits * 255)

    def test_palette(self, tmp_path: Path) -> None:
        image = Image.fromarray(make_image(0, 20, 30)).quantize(16)
        assert np.array_equal(self.read(tmp_path, image, ".gif"), np.asarray(image.convert("RGB")))

    def test_cmyk(self, tmp_path: Path) -> None:
        pixels = make_image(0, 40, 30)
        read = self.read(tmp_path, Image.fromarray(pixels).convert("CMYK"), ".jpg", quality=100, subsampling=0)
        assert abs(read.astype(int) - pixels).mean() < 4

    def test_transparency_lies_on_white(self, tmp_path: Path) -> None:
        pixels = np.dstack([make_image(0, 20, 30), np.full((20, 30), 255, np.uint8)])
        pixels[:10, :, 3] = 0
        read = self.read(tmp_path, Image.fromarray(pixels), ".png")
        assert (read[:10] == 255).all()
        assert np.array_equal(read[10:], pixels[10:, :, :3])

    def test_exif_orientation(self, tmp_path: Path) -> None:
        pixels = make_image(0, 20, 30)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by a quarter to see it upright
        read = self.read(tmp_path, Image.fromarray(pixels), ".png", exif=exif)
        assert np.array_equal(read, np.rot90(pixels, -1))

    def test_only_the_first_image_of_an_animation(self, tmp_path: Path) -> None:
        frames = [Image.fromarray(np.full((9, 9, 3), level, np.uint8)) for level in (10, 200)]
        assert self.read(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:]).max() < 20


class TestUnusableImages:
    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Path:
        root = tmp_path / "in"
        make_folder(root, 12, suffix=".jpg")
        truncated = root / "class1" / "0004.jpg"
        truncated.write_bytes(truncated.read_bytes()[:400])
        (root / "class2" / "0005.jpg").write_bytes(b"this is no image")
        (root / "class2" / "0008.jpg").write_bytes(b"")
        return root

    def test_refuse_names_the_file_and_leaves_nothing(self, damaged: Path, tmp_path: Path) -> None:
        before = everything(tmp_path)
        with pytest.raises(DataError, match=r"class1/0004\.jpg: cannot be decoded: .*leave such images out"):
            prepare(damaged, tmp_path / "out.beton", num_workers=1)
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("workers", [1, 2])
    def test_skip_reports_each(self, damaged: Path, tmp_path: Path, workers: int) -> None:
        info = prepare(damaged, tmp_path / "out.beton", num_workers=workers, on_error="skip")
        assert info.num_samples == 9
        assert info.class_counts == (4, 3, 2)
        assert [any(name in line for line in info.skipped) for name in ("0004", "0005", "0008")] == [True] * 3
        assert json.loads(sidecar_path(tmp_path / "out.beton").read_text())["skipped"] == list(info.skipped)

    def test_nothing_usable_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "a").mkdir(parents=True)
        (tmp_path / "in" / "a" / "0.jpg").write_bytes(b"no")
        before = everything(tmp_path)
        with pytest.raises(DataError, match="none of its 1 images can be used; the first: "):
            prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1, on_error="skip")
        assert everything(tmp_path) == before

    def test_larger_than_a_page_needs_a_cap(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "a").mkdir(parents=True)
        side = int((PAGE_BYTES / 3) ** 0.5) + 20
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "in" / "a" / "0.png")
        with pytest.raises(DataError, match="more than a page of 8388608; set --max-side or --mode jpg"):
            prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1)
        prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", max_side=500, num_workers=1)

    def test_wider_than_the_format_can_say(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "a").mkdir(parents=True)
        Image.new("RGB", (70_000, 2)).save(tmp_path / "in" / "a" / "0.png")
        with pytest.raises(DataError, match="70000 x 2 pixels are too many; set --max-side"):
            prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiff"}, "mode `tiff`: expected one of auto, jpg, raw, smart"),
        ({"on_error": "cry"}, "on_error `cry`: expected one of skip, refuse"),
        ({"quality": 101}, "JPEG quality 101: expected 1 to 100"),
        ({"out": "missing/too/out.beton"}, "there is no folder"),
        ({"out": ""}, "is a folder"),
    ],
)
def test_wrong_options_are_told_before_any_work(options: dict, message: str, tmp_path: Path) -> None:
    out = tmp_path / options.pop("out", "out.beton")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "no such source", out, **options)


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "good", 3)
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "0.jpg").write_bytes(b"no")
    out = tmp_path / "out.beton"
    prepare(tmp_path / "good", out, num_workers=1)
    before = out.read_bytes()
    with pytest.raises(DataError, match="cannot be decoded"):
        prepare(tmp_path / "bad", out, num_workers=1, overwrite=True)
    assert out.read_bytes() == before
    prepare(tmp_path / "good", out, num_workers=1, limit=2, overwrite=True)
    assert describe(str(out)).num_samples == 2


def test_a_kill_at_any_moment_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 200)
    script = (
        "import sys; from simclr_dist.data.beton.prepare import prepare\n"
        "if __name__ == '__main__': prepare(sys.argv[1], sys.argv[2], num_workers=2, mode='jpg',"
        " progress=lambda done, total: print(done, flush=True))"
    )
    (tmp_path / "script.py").write_text(script)
    for stop_at in (1, 60, 199):
        out = tmp_path / f"{stop_at}.beton"
        child = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "in"), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) >= stop_at:
                    break
            workers = [int(p) for p in _children(child.pid)]
            child.send_signal(signal.SIGKILL)
            child.wait(30)
        assert not out.exists()
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_alive(pid) for pid in workers)
        assert any(name.startswith(f".{out.name}.") for name in os.listdir(tmp_path))
        prepare(tmp_path / "in", out, num_workers=1, limit=2)  # tidies up
        assert not any(name.startswith(f".{out.name}.") for name in os.listdir(tmp_path))


def test_the_unfinished_file_of_another_that_still_runs_stays(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 20)
    out = tmp_path / "out.beton"

    def unfinished() -> list[Path]:
        return list(tmp_path.glob(".out.beton.part-*"))

    seen: list[Path] = []

    def another_starts(done: int, total: int) -> None:
        if not seen:
            seen.extend(unfinished())
            prepare(tmp_path / "in", out, num_workers=1, limit=2)
            assert unfinished() == seen

    prepare(tmp_path / "in", out, num_workers=1, progress=another_starts)
    assert seen
    assert not unfinished()


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class TestInspect:
    def test_tells_what_is_in_the_file(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "in", 14)
        prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1)
        found = inspect_beton(tmp_path / "out.beton")
        assert (found.num_samples, found.class_counts, found.sides) == (14, (5, 5, 4), (9, 64, 150))
        assert found.num_jpeg == 2
        assert found.damaged is None

    @needs_ffcv
    def test_verify_finds_every_damaged_image(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "in", 70)
        out = tmp_path / "out.beton"
        prepare(tmp_path / "in", out, mode="jpg", num_workers=1)
        assert inspect_beton(out, verify=True).damaged == {}
        content = bytearray(out.read_bytes())
        with open_beton(out) as beton:
            for i in (3, 66):
                offset = int(beton.images["data_ptr"][i])
                content[offset + 2 : offset + 200] = bytes(198)
        out.write_bytes(content)
        seen: list[int] = []
        damaged = inspect_beton(out, verify=True, progress=lambda done, _: seen.append(done)).damaged
        assert damaged == dict.fromkeys((3, 66), "its JPEG data cannot be decoded")
        assert seen[-1] == 70
