"""Writing .beton files: the same bytes for any number of workers, whole or not at all, and awkward images."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from simclr_dist.cli import main
from simclr_dist.cli.prepare import _in_classes
from simclr_dist.config import DataConfig
from simclr_dist.data.account import Account
from simclr_dist.data.beton.encode import Encoded, Encoder, Unusable
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.data.beton.workers import WorkerDiedError, Workers, chunks_of, share
from simclr_dist.data.beton.writer import PAGE_BYTES, Record
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.loading.inspect import inspect_beton
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.decoding import Decoded
from simclr_dist.doctor.data import examine_data
from simclr_dist.errors import DataError
from tests.images import make_folder, make_image

needs_ffcv = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_same_bytes_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_dist.data.beton.prepare.default_num_threads", lambda asked, **_: asked)
    make_folder(tmp_path / "in", 150)
    for workers in (1, 2, 3):
        prepare(tmp_path / "in", tmp_path / f"{workers}.beton", num_workers=workers, mode="smart")
    assert len({(tmp_path / f"{n}.beton").read_bytes() for n in (1, 2, 3)}) == 1
    assert len({sidecar_path(tmp_path / f"{n}.beton").read_text() for n in (1, 2, 3)}) == 1


class FakeWorkers:
    """Do what was submitted when the test says so, or when somebody waits for it."""

    def __init__(self, takes: int, started: list[Future]) -> None:
        self.started = started
        self.takes = takes  # the index of the chunk that ends next
        self.queue: list[tuple[Future, SimpleNamespace]] = []
        self.most_queued = 0

    def submit(self, encoder: object, chunk: SimpleNamespace) -> Future:
        future = Future()  # type: ignore[var-annotated]
        wait, future.result = future.result, lambda: self.wait_for(future) or wait()  # type: ignore[method-assign, func-returns-value]
        self.queue.append((future, chunk))
        self.most_queued = max(self.most_queued, len(self.queue))
        return future

    def wait_for(self, future: Future) -> None:
        while not future.done():
            self.end_one()

    def end_one(self) -> None:
        future, chunk = self.queue.pop(self.takes)
        future.set_result(chunk.number)


class TestWorkIsShared:
    """Between this process and workers that start late and end in any order."""

    def run(self, workers: FakeWorkers, encode) -> Iterator[int]:
        chunks = (SimpleNamespace(number=i) for i in range(100))
        return share(encode, chunks, workers)  # type: ignore[arg-type, return-value]

    def test_nothing_waits_for_workers_that_have_not_started(self) -> None:
        workers, here = FakeWorkers(0, [Future(), Future()]), []
        results = self.run(workers, lambda chunk: here.append(chunk.number) or chunk.number)
        assert [next(results) for _ in range(100)] == here == list(range(100))
        assert workers.most_queued == 0

    @pytest.mark.parametrize("takes", [0, -1], ids=["in order", "last first"])
    def test_the_order_is_that_of_the_source_and_the_queue_is_bounded(self, takes: int) -> None:
        started = [Future(), Future()]
        for future in started:
            future.set_result(1)
        workers, here, seen = FakeWorkers(takes, started), [], []

        def encode(chunk: SimpleNamespace) -> int:
            """Workers end two chunks while this process does one."""
            here.append(chunk.number - len(seen))
            for _ in range(min(2, len(workers.queue))):
                workers.end_one()
            return chunk.number

        for number in self.run(workers, encode):
            seen.append(number)
        assert seen == list(range(100))
        assert 20 < len(here) < 40
        assert workers.most_queued == 6
        assert max(here) <= 12  # so many are in memory

    def test_a_worker_that_could_not_start_is_an_error_also_when_this_process_did_it_all(self) -> None:
        started = [Future()]
        results = self.run(FakeWorkers(0, started), lambda chunk: chunk.number)
        for _ in range(100):
            next(results)
        started[0].set_exception(WorkerDiedError())
        with pytest.raises(WorkerDiedError):
            next(results)


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 300)

    def kill_worker(done: int, total: int) -> None:
        for pid in _children(os.getpid()):
            with suppress(OSError):  # it has ended meanwhile
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(DataError, match="a worker process died, perhaps because memory ran out"):
        prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=2, progress=kill_worker)
    assert everything(tmp_path) == {"in", *(f"in/{name}" for name in everything(tmp_path / "in"))}


def dies_in_its_answer(images: object) -> Encoded:
    def send_half(pipe: Connection, message: bytes) -> None:
        os.write(pipe.fileno(), bytes(message)[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = send_half  # type: ignore[attr-defined]
    return Encoded()


def cannot_encode(images: object) -> Encoded:
    raise ZeroDivisionError(f"{images}")


class TestAnswers:
    def test_of_a_worker_killed_in_the_middle_of_one(self) -> None:
        """Python's own pool waits for ever then."""
        workers = Workers(1)
        for _ in range(2):
            with pytest.raises(WorkerDiedError):
                workers.submit(dies_in_its_answer, []).result(timeout=60)  # type: ignore[arg-type]
        workers.stop()

    def test_that_are_errors_say_where_they_were_raised(self) -> None:
        workers = Workers(1)
        for _ in range(2):  # it goes on
            with pytest.raises(ZeroDivisionError, match="17") as caught:
                workers.submit(cannot_encode, 17).result(timeout=60)  # type: ignore[arg-type]
            assert "in cannot_encode" in caught.value.__notes__[0]
        workers.stop()
        assert multiprocessing.active_children() == []


FORKED = """
import os, signal, sys, time
from contextlib import suppress
from pathlib import Path
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.errors import DataError

def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()

def progress(done, total):
    own = Path("/proc/self/cmdline").read_bytes()
    for pid in children():
        with suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{pid}/cmdline").read_bytes() == own:
                forked.add(pid)
            if sys.argv[3] == "kill":
                os.kill(int(pid), signal.SIGKILL)

forked = set()
assert len(os.listdir("/proc/self/task")) == 1
try:
    prepare(sys.argv[1], sys.argv[2], num_workers=2, progress=progress)
except DataError as error:
    sys.exit(str(error))
assert forked
deadline = time.monotonic() + 60
while children():  # it leaves by itself
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""


def test_without_threads_workers_are_forked_and_nothing_else_differs(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 300)
    prepare(tmp_path / "in", tmp_path / "here.beton", num_workers=1)

    def run(out: Path, what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", FORKED, tmp_path / "in", out, what],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(tmp_path / "forked.beton", "leave")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "forked.beton").read_bytes() == (tmp_path / "here.beton").read_bytes()
    died = run(tmp_path / "died.beton", "kill")
    assert (died.returncode, "a worker process died" in died.stderr) == (1, True), died.stderr
    assert not (tmp_path / "died.beton").exists()


@pytest.mark.parametrize(("num_images", "workers"), [(1, 2), (65, 2), (1000, 2), (1000, 7), (10**6, 64)])
def test_chunks_get_smaller_towards_the_end(num_images: int, workers: int) -> None:
    chunks = list(chunks_of(np.arange(num_images), workers))
    sizes = [len(chunk) for chunk in chunks]
    assert np.array_equal(np.concatenate(chunks), np.arange(num_images))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= 64
    assert sizes[-1] <= 4


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


@needs_ffcv  # which comes with libturbojpeg
@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_libturbojpeg_writes_the_bytes_that_pillow_writes(quality: int) -> None:
    for i, (height, width) in enumerate([(1, 1), (8, 9), (97, 31), (150, 110), (200, 17)]):
        pixels = make_image(i, height, width)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        assert turbojpeg.encode_jpeg(pixels, quality) == buffer.getvalue()
        assert turbojpeg.encode_jpeg(pixels[:, ::-1], quality) == turbojpeg.encode_jpeg(pixels[:, ::-1].copy(), quality)


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


def test_statistics_of_photographs_are_close(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "in", 20)
    prepare(tmp_path / "in", tmp_path / "out.beton", mode="jpg", num_workers=1)
    sidecar = json.loads(sidecar_path(tmp_path / "out.beton").read_text())
    every = np.concatenate([p.reshape(-1, 3) for p in pixels]) / 255
    np.testing.assert_allclose(sidecar["mean"], every.mean(0), atol=0.02)
    np.testing.assert_allclose(sidecar["std"], every.std(0), atol=0.02)


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
        ({"max_side": 0}, "max_side 0: expected at least 1"),
        ({"limit": 0}, "limit 0: expected at least 1"),
        ({"num_workers": -1}, "num_workers -1: expected at least 1"),
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


def failing(error: int):
    """A call that fails with this errno."""

    def call(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return call


class TestFileSystemsWithoutConveniences:
    """Locks, permissions and flushed folders are wanted, not needed."""

    @pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
    @pytest.mark.parametrize("call", ["fcntl.flock", "os.fchmod"])
    def test_prepare_works(self, call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path / "in", 3)
        monkeypatch.setattr(call, failing(error))
        assert prepare(tmp_path / "in", tmp_path / "out" / "a.beton", num_workers=1).num_samples == 3
        assert everything(tmp_path / "out") == {"a.beton", "a.beton.json"}

    @pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
    def test_a_folder_that_cannot_be_flushed(self, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path / "in", 3)
        real = os.fsync

        def fsync(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                failing(error)()
            real(fd)

        monkeypatch.setattr("os.fsync", fsync)
        assert prepare(tmp_path / "in", tmp_path / "a.beton", num_workers=1).num_samples == 3

    def test_a_failure_leaves_no_unfinished_file_there_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(tmp_path / "in", 3)
        (tmp_path / "in" / "class0" / "0000.png").write_bytes(b"no")
        before = everything(tmp_path)
        monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
        with pytest.raises(DataError, match="cannot be decoded"):
            prepare(tmp_path / "in", tmp_path / "a.beton", num_workers=1)
        assert everything(tmp_path) == before

    def test_a_file_that_cannot_be_flushed_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path / "in", 3)
        before = everything(tmp_path)
        monkeypatch.setattr("os.fsync", failing(errno.EIO))
        with pytest.raises(DataError, match=r"a\.beton: cannot be written: Input/output error"):
            prepare(tmp_path / "in", tmp_path / "a.beton", num_workers=1)
        assert everything(tmp_path) == before


class TestWhatIsReplaced:
    """A .beton file when asked, and nothing else."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        make_folder(tmp_path / "in", 4)
        return tmp_path / "in"

    def refused(self, source: Path, out: Path, message: str) -> None:
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(DataError, match=message):
            prepare(source, out, num_workers=1, overwrite=True)
        assert (out.read_bytes() if out.is_file() else None) == before

    @pytest.mark.parametrize("name", ["notes.txt", "out", "out.beton.tar", "beton"])
    def test_the_name_must_end_in_beton(self, name: str, source: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_text("my notes")
        self.refused(source, tmp_path / name, "must be called something.beton")

    @pytest.mark.parametrize("content", [b"my notes", b"PK\3\4", bytes(100), b"\x89PNG\r\n"])
    def test_something_else_of_that_name_stays(self, content: bytes, source: Path, tmp_path: Path) -> None:
        (tmp_path / "a.beton").write_bytes(content)
        self.refused(source, tmp_path / "a.beton", "holds something other than a .beton file")

    @pytest.mark.parametrize("content", ["my notes", "[1, 2]", "{}", "null"])
    def test_something_else_in_the_sidecars_place_stays(self, content: str, source: Path, tmp_path: Path) -> None:
        sidecar_path(tmp_path / "a.beton").write_text(content)
        self.refused(source, tmp_path / "a.beton", "holds something else; move it away")
        assert sidecar_path(tmp_path / "a.beton").read_text() == content

    def test_a_beton_file_is_replaced_only_when_asked(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "a.beton"
        prepare(source, out, num_workers=1)
        with pytest.raises(DataError, match="exists already; --overwrite replaces it"):
            prepare(source, out, num_workers=1, limit=2)
        assert describe(str(out)).num_samples == 4
        prepare(source, out, num_workers=1, limit=2, overwrite=True)
        assert describe(str(out)).num_samples == 2

    @pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
    def test_the_source_stays_also_behind_a_link(self, link, source: Path, tmp_path: Path) -> None:
        archive = tmp_path / "images.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(source, "in")
        link(archive, tmp_path / "a.beton")
        self.refused(archive, tmp_path / "a.beton", "is the source itself")
        self.refused(archive, archive, "must be called something.beton")

    def test_a_link_is_followed(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "large disk").mkdir()
        target, link = tmp_path / "large disk" / "b.beton", tmp_path / "a.beton"
        link.symlink_to(target)
        for limit in (4, 3):  # once nothing is there, once a .beton
            prepare(source, link, num_workers=1, limit=limit, overwrite=True)
            assert link.is_symlink()
            assert everything(target.parent) == {"b.beton", "b.beton.json"}
            info = describe(str(link))
            assert (info.num_samples, info.class_names[0]) == (limit, "class0")

    def test_a_link_to_nowhere_is_named(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "a.beton").symlink_to(tmp_path / "unmounted" / "b.beton")
        self.refused(source, tmp_path / "a.beton", "links to .*unmounted")

    @pytest.mark.parametrize(
        "option", ["--max-side=0", "--max-side=-5", "--limit=0", "--quality=0", "--quality=101", "--workers=0"]
    )
    def test_sizes_out_of_range_are_refused_by_the_command_line(
        self, option: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["prepare", str(source), str(tmp_path / "a.beton"), option])
        assert ended.value.code == 2
        assert f"argument {option.partition('=')[0]}: must be" in capsys.readouterr().err


def test_few_small_images_make_a_small_file(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "in", 24)
    info = prepare(tmp_path / "in", tmp_path / "a.beton", mode="raw", num_workers=1)
    assert info.num_bytes < sum(p.size for p in pixels) + 8192


class TestAccount:
    """What was found, taken and left out: the same in what is printed, beside the file, and from every command."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        make_folder(tmp_path / "in", 4)
        (tmp_path / "in" / "class1" / "notes.cls").write_text("7")
        (tmp_path / "in" / "class2" / "broken.jpg").write_bytes(b"no")
        return tmp_path / "in"

    def run(self, *arguments: str | Path) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0)

    def test_it_is_printed_kept_and_shown(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        out = tmp_path / "a.beton"
        assert self.run("prepare", source, out, "--on-error", "skip", "--workers", "1") == 0
        printed = capsys.readouterr()
        account = Account.from_json(json.loads(sidecar_path(out).read_text())["account"])
        assert (account.taken, account.num_left_out) == (4, 2)
        assert {name for group in account.left_out for name in group.names} >= {str(source / "class2" / "broken.jpg")}
        assert printed.out.splitlines()[: len(account.lines())] == account.lines()
        last = f"2 found at {source} but not taken, see above; --strict makes this an error"
        assert printed.out.splitlines()[-1] == last
        assert "broken.jpg: cannot be decoded" in printed.err
        assert self.run("inspect", out) == 0
        shown = capsys.readouterr().out
        assert all(line in shown for line in account.lines())

    def test_the_doctor_tells_the_same_before(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (source / "class2" / "broken.jpg").unlink()
        self.run("prepare", source, tmp_path / "a.beton", "--workers", "1")
        lines = describe(str(tmp_path / "a.beton")).account.lines()
        capsys.readouterr()
        for data in (source, tmp_path / "a.beton"):
            assert self.run("doctor", data, "--json") == 0
            findings = json.loads(capsys.readouterr().out)["findings"]
            assert [finding["found"] for finding in findings] == lines
            assert [finding["level"] for finding in findings].count("warning") == 1
        assert self.run("doctor", tmp_path / "nowhere") == 1
        of_a_training = [finding.found for finding in examine_data(DataConfig(train=str(source), image_size=8), 2)]
        assert set(lines) <= set(of_a_training)

    def test_nothing_lost_means_no_word_about_losses(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        make_folder(tmp_path / "clean", 4)
        assert self.run("prepare", tmp_path / "clean", tmp_path / "a.beton", "--workers", "1", "--strict") == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert "not taken" not in printed.out

    @pytest.mark.parametrize(
        ("names", "said"), [((), "without classes"), (("a",), "in 1 class"), (("a", "b"), "in 2 classes")]
    )
    def test_the_number_of_classes_is_said_in_words(self, names: tuple[str, ...], said: str) -> None:
        assert _in_classes(names) == said

    @pytest.mark.parametrize("lost", ["a file that is no image", "an image that cannot be read"])
    def test_strict_makes_a_loss_an_error(
        self, lost: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (source / ("class1/notes.cls" if lost == "an image that cannot be read" else "class2/broken.jpg")).unlink()
        assert self.run("prepare", source, tmp_path / "a.beton", "--on-error", "skip", "--strict", "--workers=1") == 2
        assert ("notes.cls" if "file" in lost else "broken.jpg") in capsys.readouterr().err
        assert not (tmp_path / "a.beton").exists()

    def test_a_limit_is_no_loss(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "clean", 9)
        account = prepare(tmp_path / "clean", tmp_path / "a.beton", num_workers=1, limit=4, strict=True).account
        assert (account.taken, account.num_left_out) == (4, 0)
        assert [(note.reason, note.count) for note in account.notes] == [("beyond --limit 4", 5)]

    def test_lines_of_a_log_file_are_not_folded(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        out = tmp_path / ("long " * 20) / "a.beton"
        out.parent.mkdir()
        self.run("prepare", source, out, "--on-error", "skip", "--workers", "1")
        self.run("inspect", out)
        assert capsys.readouterr().out.count(f"{out}") == 2

    @pytest.mark.parametrize("on_damage", ["warn", "skip", "stop"])
    def test_damaged_images_are_taken_or_not_as_asked(self, on_damage: str, tmp_path: Path) -> None:
        images = SimpleNamespace(
            labels=np.array([0, 0]),
            name=lambda index: f"image {index}",
            recoded=lambda index, _: Decoded(make_image(index, 9, 9), "corrupt data" if index else None),
        )
        encoded = Encoder("raw", 90, None, on_damage)(images)  # type: ignore[arg-type]
        assert isinstance(encoded.results[0], Record)
        if on_damage == "warn":
            assert isinstance(encoded.results[1], Record)
            assert encoded.damaged == ["image 1: corrupt data"]
        else:
            assert encoded.results[1] == Unusable("image 1", "image 1: is damaged: corrupt data", damaged=True)


def test_nearly_constant_images_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((9, 9, 3), 3 + i, np.uint8)).save(tmp_path / "in" / "a" / f"{i}.png")
    (warning,) = prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1).warnings
    assert re.search(r"nearly constant .*mean 0\.016, 0\.016, 0\.016, std 0\.003", warning)
    make_folder(tmp_path / "good", 3)
    assert prepare(tmp_path / "good", tmp_path / "good.beton", num_workers=1).warnings == ()


class TestWorkersThatCannotStart:
    """The message blames what is to blame, and says what helps."""

    def run(self, tmp_path: Path, script: str) -> str:
        make_folder(tmp_path / "in", 80)
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "in"), str(tmp_path / "out.beton")],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode != 0
        assert not list(tmp_path.glob(".out.beton*"))
        return done.stderr.splitlines()[-1]

    def test_a_script_without_a_guard(self, tmp_path: Path) -> None:
        script = (
            "import sys, threading; from simclr_dist.data.beton.prepare import prepare\n"
            "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"  # so workers are not forked
            "prepare(sys.argv[1], sys.argv[2], num_workers=2)\n"
        )
        message = self.run(tmp_path, script)
        assert "each imports it, so put what it does below `if __name__" in message

    def test_too_few_open_files(self, tmp_path: Path) -> None:
        script = (
            "import resource, sys; from simclr_dist.data.beton.prepare import prepare\n"
            "if __name__ == '__main__':\n"
            "    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n"
            "    prepare(sys.argv[1], sys.argv[2], num_workers=2)\n"
        )
        message = self.run(tmp_path, script)
        assert "worker processes cannot be started: Too many open files" in message
        assert "ulimit -n" in message
        assert "--workers 1" in message

    def test_too_many_processes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path / "in", 80)
        monkeypatch.setattr("multiprocessing.popen_spawn_posix.Popen.__init__", failing(errno.EAGAIN))
        with pytest.raises(DataError, match=r"worker processes cannot be started: Resource .*--workers 1"):
            prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=2)
        assert prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1).num_samples == 80

    def test_none_needs_semaphores_which_some_containers_lack(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(tmp_path / "in", 80)
        monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", failing(errno.ENOSYS))
        assert prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=2).num_samples == 80


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
