"""The loader's promises: the same bytes anywhere, errors that arrive, nothing left behind, batches safe to hold."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data import Batch, Loader
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import Beton, open_beton
from simclr_dist.data.decode import ffcv_import
from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.loading.decode_pool import DecodePool
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.data.randomness import keys
from simclr_dist.errors import DataError
from simclr_dist.parallel.distributed import World
from simclr_dist.pixel_format import RGB
from tests.images import make_folder

needs_ffcv = pytest.mark.skipif(ffcv_import.unavailable() is not None, reason=str(ffcv_import.unavailable()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_SAMPLES, G, SIDE, SEED = 29, 8, 24, 3
STEPS_PER_EPOCH = NUM_SAMPLES // G
ALONE = World()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_folder(root, NUM_SAMPLES)
    return root


@pytest.fixture(scope="module")
def beton(folder: Path) -> Path:
    """JPEG and raw records, of many sizes."""
    out = folder.parent / "images.beton"
    prepare(folder, out, mode="smart", num_workers=1)
    return out


def open_loader(source: Path | str, *, world: World = ALONE, device: str = "cpu", **config) -> Loader:
    settings = DataConfig(**{"train": str(source), "image_size": SIDE, "num_threads": 1} | config)
    return build_loader(settings, AugmentConfig(), seed=SEED, global_batch_size=G, world=world, device=device)


def take(loader: Loader, step: int, count: int) -> list[Batch]:
    batches = loader.batches(step)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def digest(batches: list[Batch]) -> str:
    content = hashlib.sha256()
    for batch in batches:
        content.update(batch.views.numpy().tobytes() + batch.sample_ids.numpy().tobytes())
    return content.hexdigest()


def decoders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("decode")}


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = decoders()
    yield
    if decoders() - before:
        gc.collect()
    deadline = time.monotonic() + 10
    while decoders() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert decoders() <= before


# ---------------------------------------------------------------------------------------------------------------------
# What a batch is


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder", "synthetic"])
def test_batches_follow_the_order_and_carry_labels(kind: str, request: pytest.FixtureRequest) -> None:
    source = kind if kind == "synthetic" else request.getfixturevalue(kind)
    labels = describe(str(source)).labels
    with open_loader(source) as loader:
        steps = loader.order.steps_per_epoch
        for step, batch in enumerate(take(loader, 0, steps + 1)):
            assert batch.epoch == step // steps
            assert batch.views.shape == (2, G, SIDE, SIDE, 3)
            assert batch.views.dtype == torch.uint8
            assert batch.sample_ids.tolist() == loader.order.sample_ids(step // steps, step % steps).tolist()
            assert batch.labels.tolist() == labels[batch.sample_ids.numpy()].tolist()
        assert loader.wait_s > 0


@needs_ffcv
def test_crops_are_those_of_the_table(beton: Path, folder: Path) -> None:
    """The folder loader decodes with Pillow and crops with torchvision: same places, nearly the same pixels."""
    with open_loader(beton) as ours, open_loader(folder) as theirs:
        for a, b in zip(take(ours, 0, 3), take(theirs, 0, 3), strict=True):
            assert torch.equal(a.sample_ids, b.sample_ids)
            assert torch.equal(a.labels, b.labels)
            difference = (a.views.float() - b.views.float()).abs().mean((2, 3, 4))
            assert difference.mean() < 6  # JPEG and two rules of resizing, in grey levels
            shuffled = (a.views.float() - b.views.float().roll(1, 1)).abs().mean((2, 3, 4))
            assert shuffled.mean() > 5 * difference.mean()


@needs_ffcv
def test_raw_square_crops_are_exact(tmp_path: Path, folder: Path) -> None:
    """Where nothing has to be resized, a view is a piece of the image."""
    out = tmp_path / "raw.beton"
    prepare(folder, out, mode="raw", num_workers=1)
    sizes = {tuple(image.shape[1:3]) for image, _, _ in load_images(str(out), 20, batch_size=4)}
    assert sizes == {(20, 20)}
    pixels = make_folder(tmp_path / "again", NUM_SAMPLES)
    for images, _, ids in load_images(str(out), 20, batch_size=8):
        for image, i in zip(images, ids.tolist(), strict=True):
            if pixels[i].shape == (20, 20, 3):
                assert np.array_equal(image.numpy(), pixels[i])


# ---------------------------------------------------------------------------------------------------------------------
# Determinism


@needs_ffcv
def test_same_bytes_for_any_number_of_threads(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = set()
    for num_threads, batches_ahead in ((1, 1), (2, 2), (5, 4)):
        with open_loader(beton, num_threads=num_threads, batches_ahead=batches_ahead) as loader:
            found.add(digest(take(loader, 0, 4)))
    assert len(found) == 1


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder"])
def test_resumes_at_every_step_at_another_world_size(kind: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind)
    total = 2 * STEPS_PER_EPOCH
    with open_loader(source) as loader:
        expected = take(loader, 0, total)
    for world_size in (1, 2, 4):
        loaders = [open_loader(source, world=World(rank, world_size)) for rank in range(world_size)]
        for begin in range(0, total, 1 if kind == "beton" else 3):
            parts = [take(loader, begin, total - begin) for loader in loaders]
            for whole, ranks in zip(expected[begin:], zip(*parts, strict=True), strict=True):
                assert torch.equal(whole.views, torch.cat([part.views for part in ranks], dim=1))
                assert torch.equal(whole.sample_ids, torch.cat([part.sample_ids for part in ranks]))
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder"])
def test_a_sample_has_other_crops_in_the_next_epoch(kind: str, request: pytest.FixtureRequest) -> None:
    with open_loader(request.getfixturevalue(kind)) as loader:
        batches = take(loader, 0, 2 * STEPS_PER_EPOCH)
    first, second = (
        {
            i: batch.views[:, k]
            for batch in batches
            if batch.epoch == epoch
            for k, i in enumerate(batch.sample_ids.tolist())
        }
        for epoch in range(2)
    )
    seen_twice = first.keys() & second.keys()
    assert len(seen_twice) >= NUM_SAMPLES // 2
    assert not any(torch.equal(first[i], second[i]) for i in seen_twice)


@needs_ffcv
def test_page_local_order_changes_the_order_only(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beton, "pages", lambda self: np.arange(NUM_SAMPLES) // 4)
    options = {"seed": SEED, "global_batch_size": 1, "world": ALONE, "device": "cpu"}
    views = {}
    for order in ("random", "page_local"):
        settings = DataConfig(train=str(beton), image_size=SIDE, num_threads=1, order=order, order_window=2)
        with build_loader(settings, AugmentConfig(), **options) as loader:
            batches = take(loader, 0, NUM_SAMPLES)
            views[order] = {int(b.sample_ids[0]): b.views for b in batches}
    assert list(views["random"]) != list(views["page_local"])
    assert all(torch.equal(view, views["page_local"][i]) for i, view in views["random"].items())


def test_page_local_order_of_a_folder_is_refused(folder: Path) -> None:
    settings = DataConfig(train=str(folder), image_size=SIDE, order="page_local")
    with pytest.raises(DataError, match=r"data.order=page_local: .* has no pages"):
        build_loader(settings, AugmentConfig(), seed=SEED, global_batch_size=1, world=ALONE, device="cpu")


GOLDEN_SCRIPT = """
    import hashlib, sys
    import numpy as np
    from simclr_dist.data.decode import kernel
    from simclr_dist.data.decode.crops import random_crops
    from simclr_dist.data.randomness import keys
    from tests.images import SIZES, make_image

    b, S = 42, 32
    images = [make_image(i, *SIZES[i % len(SIZES)]) for i in range(b)]
    offsets = np.cumsum([0] + [p.nbytes for p in images])
    records = np.array([(o, p.nbytes, kernel.RAW, *p.shape[:2]) for o, p in zip(offsets, images)])
    view_keys = keys(1, 2, np.arange(b)[None], np.arange(2)[:, None])
    crops = random_crops(view_keys, records[:, 3], records[:, 4], scale_min=0.08, flip_p=0.5)
    views = np.empty((2, b, S, S, 3), np.uint8)
    scratch = np.empty((1, 1), np.uint8), np.empty((1, max(p.nbytes for p in images)), np.uint8)
    with open(sys.argv[1], "w+b") as file:
        file.write(b"".join(p.tobytes() for p in images))
        file.flush()
        status = np.ones(b, np.int32)
        kernel.decode_and_crop(file.fileno(), records, crops, views, status, *scratch)
    assert not status.any()
    hits = sum(kernel.decode_and_crop.stats.cache_hits.values())
    print(hashlib.sha256(crops.tobytes() + views.tobytes()).hexdigest(), hits)
"""
GOLDEN_VIEWS = "f1f4d17c41cfc575c1194925b8fa6dd63767168744c855f9f7cc5f384906b997"


def run_python(script: str, *arguments: str, **environment: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@needs_ffcv
@pytest.mark.parametrize("cpu", ["native", "x86-64"])
def test_views_are_the_golden_ones_on_any_cpu(cpu: str, tmp_path: Path) -> None:
    """In fresh processes, compiled for this CPU's features or for none; then from the cache, compiling nothing."""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} | ({"NUMBA_CPU_NAME": cpu} if cpu != "native" else {})
    outputs = [run_python(GOLDEN_SCRIPT, str(tmp_path / "data"), **environment).split() for _ in range(2)]
    assert outputs[0] == [GOLDEN_VIEWS, "0"]
    assert outputs[1] == [GOLDEN_VIEWS, "1"]


@needs_ffcv
def test_kernel_works_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """As if package and home were read-only: root can write everywhere, so numba is told that no place will do."""
    script = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n" + textwrap.dedent(GOLDEN_SCRIPT)
    assert run_python(script, str(tmp_path / "data")) == f"{GOLDEN_VIEWS} 0"


@needs_ffcv
def test_an_image_is_decoded_once_for_all_views(beton: Path) -> None:
    """With a codec of our own in ffcv's place, which counts."""
    script = """
        import ctypes, sys, types
        from simclr_dist.data.decode import ffcv_import

        calls = []
        kinds = [ctypes.c_void_p, ctypes.c_uint64, *[ctypes.c_uint32] * 2, ctypes.c_void_p, *[ctypes.c_uint32] * 6]
        def imdecode(source, size, height, width, destination, *rest):
            calls.append(size)
            ctypes.memset(destination, 77, height * width * 3)
            return 0
        fake = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds, ctypes.c_bool, ctypes.c_bool)(imdecode)
        ffcv_import.codec = lambda: types.SimpleNamespace(imdecode=fake)

        import numpy as np
        from simclr_dist.data.decode.crops import random_crops
        from simclr_dist.data.loading.ffcv_images import BetonImages
        from simclr_dist.data.randomness import keys

        images = BetonImages(sys.argv[1])
        jpeg = np.flatnonzero(images.beton.images["mode"] == 0)
        view_keys = keys(0, 0, jpeg[None], np.arange(5)[:, None])
        views = np.empty((5, len(jpeg), 16, 16, 3), np.uint8)
        images.fill(jpeg, lambda h, w: random_crops(view_keys, h, w, scale_min=0.08, flip_p=0.5), views)
        assert (views == 77).all()
        print(len(calls), len(jpeg))
    """
    calls, images = run_python(script, str(beton)).split()
    assert int(calls) == int(images) > 0


@pytest.mark.parametrize("kind", ["folder", "synthetic", pytest.param("beton", marks=needs_ffcv)])
def test_a_view_does_not_depend_on_how_many_there_are(kind: str, request: pytest.FixtureRequest) -> None:
    source = kind if kind == "synthetic" else request.getfixturevalue(kind)
    with open_loader(source) as loader:
        two = take(loader, 0, 2)
    with open_loader(source, num_views=5) as loader:
        five = take(loader, 0, 2)
    for few, many in zip(two, five, strict=True):
        assert many.views.shape == (5, *few.views.shape[1:])
        assert torch.equal(many.views[:2], few.views)
        assert torch.equal(many.sample_ids, few.sample_ids)
        assert len({view.numpy().tobytes() for view in many.views}) == 5
    halves = []
    for rank in range(2):
        with open_loader(source, num_views=5, world=World(rank, 2)) as loader:
            halves.append(take(loader, 0, 1)[0].views)
    assert torch.equal(torch.cat(halves, dim=1), five[0].views)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def spoil(beton: Path, out: Path, sample: int) -> Path:
    """A copy of the file whose JPEG of `sample` is zeroed behind its header."""
    content = bytearray(beton.read_bytes())
    with open_beton(beton) as opened:
        offset, size, mode, _, _ = opened.records(np.array([sample]))[0].tolist()
    assert mode == 0
    content[offset + 20 : offset + size] = bytes(size - 20)
    out.write_bytes(content)
    return out


@needs_ffcv
def test_a_damaged_image_is_named_when_its_batch_is_due(beton: Path, tmp_path: Path) -> None:
    with open_loader(beton) as loader:
        order, expected = loader.order, take(loader, 0, 2)
        with open_beton(beton) as opened:
            third = next(int(i) for i in order.sample_ids(0, 2) if opened.images["mode"][i] == 0)
    bad = spoil(beton, tmp_path / "bad.beton", third)
    with open_loader(bad, batches_ahead=4) as loader:
        batches = loader.batches(0)
        assert digest([next(batches), next(batches)]) == digest(expected)
        with pytest.raises(DataError, match=rf"bad\.beton: sample {third}: its JPEG data cannot be decoded"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)
        assert digest(take(loader, 0, 2)) == digest(expected)  # the loader itself is fine


@needs_ffcv
def test_a_file_cut_while_open_is_an_error_not_a_signal(beton: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cut.beton"
    copy.write_bytes(beton.read_bytes())
    with open_loader(copy) as loader:
        os.truncate(copy, 20_000)
        with pytest.raises(DataError, match=r"cut\.beton: sample \d+: the file shrank from \d+ to 20000 bytes"):
            take(loader, 0, STEPS_PER_EPOCH)


def test_an_unreadable_file_in_a_folder_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, G)
    broken = tmp_path / "class0" / "0003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with open_loader(tmp_path) as loader, pytest.raises(DataError, match=r"class0/0003\.png: cannot be decoded"):
        take(loader, 0, 1)


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder"])
def test_evaluations_can_do_without_what_cannot_be_read(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    whole = {
        int(i): image
        for images, _, ids in load_images(str(source), SIDE, batch_size=4)
        for i, image in zip(ids, images, strict=True)
    }
    if kind == "beton":
        with open_beton(source) as opened:
            bad = int(np.flatnonzero(opened.images["mode"] == 0)[0])
        source = spoil(source, tmp_path / "bad.beton", bad)
    else:
        bad = 4
        shutil.copytree(source, tmp_path / "copy")
        source = tmp_path / "copy"
        sorted(source.rglob("*.*"))[bad].write_bytes(b"")
    unreadable: dict[int, str] = {}
    batches = list(load_images(str(source), SIDE, batch_size=4, unreadable=unreadable))
    ids = torch.cat([found for _, _, found in batches])
    assert ids.tolist() == [i for i in range(NUM_SAMPLES) if i != bad]
    assert torch.equal(torch.cat([images for images, _, _ in batches]), torch.stack([whole[i] for i in ids.tolist()]))
    assert torch.cat([found for _, found, _ in batches]).tolist() == describe(str(source)).labels[ids].tolist()
    assert list(unreadable) == [bad]
    assert source.name in unreadable[bad]


@needs_ffcv
def test_samples_outside_of_the_file_are_refused(beton: Path) -> None:
    for outside in (NUM_SAMPLES, -1):
        with pytest.raises(DataError, match=f"no sample {outside}; it holds 0 to {NUM_SAMPLES - 1}"):
            list(load_images(str(beton), SIDE, batch_size=4, ids=np.array([0, outside])))


def test_a_loader_that_cannot_start_leaves_nothing_open(folder: Path) -> None:
    with pytest.raises(DataError, match="29 samples, fewer than one global batch of 64"):
        build_loader(
            DataConfig(train=str(folder), image_size=SIDE),
            AugmentConfig(),
            seed=0,
            global_batch_size=64,
            world=World(),
            device="cpu",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Life and death


@needs_ffcv
def test_early_breaks_and_closing_twice_leave_nothing(beton: Path) -> None:
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        loader = open_loader(beton)
        for _batch in loader.batches(0):
            break
        loader.close()
        loader.close()
    del loader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


@needs_ffcv
def test_a_forgotten_loader_ends_its_threads(beton: Path) -> None:
    loader = open_loader(beton)
    batches = loader.batches(0)
    next(batches)
    del loader, batches  # the fixture waits for the threads


@needs_ffcv
def test_iterators_live_side_by_side(beton: Path) -> None:
    with open_loader(beton) as a, open_loader(beton) as b:
        expected = [take(a, step, 3) for step in (0, 5)]
        streams = [a.batches(0), a.batches(5), b.batches(0), b.batches(5)]
        rounds = [[next(stream) for stream in streams] for _ in range(3)]
        for i, stream in enumerate(zip(*rounds, strict=True)):
            assert digest(list(stream)) == digest(expected[i % 2])


@needs_ffcv
def test_a_closed_loader_says_so(beton: Path) -> None:
    loader = open_loader(beton)
    batches = loader.batches(0)
    next(batches)
    loader.close()
    with pytest.raises(DataError, match=r"loader (is|was) closed"):
        list(batches)
    with pytest.raises(DataError, match="loader is closed"):
        next(loader.batches(0))


@needs_ffcv
def test_batches_that_are_held_do_not_change(beton: Path) -> None:
    with open_loader(beton, batches_ahead=1) as loader:
        batches = loader.batches(0)
        held, copies = [], []
        for k in range(12):
            batch = next(batches)
            held.append(batch.views[k % 2, 1:3] if k % 3 else batch.views)  # some whole, some as a view
            copies.append(held[-1].clone())
            if k % 4 == 3:
                del held[0], copies[0]
        assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@needs_ffcv
def test_memory_is_used_again(beton: Path) -> None:
    with open_loader(beton) as loader:
        batches = loader.batches(0)
        places = {next(batches).views.data_ptr() for _ in range(20)}
    assert len(places) <= 5


@needs_ffcv
def test_exit_with_an_open_loader_is_quick_and_clean(beton: Path) -> None:
    script = """
        import sys
        from simclr_dist.config import AugmentConfig, DataConfig
        from simclr_dist.data.loading.view_loader import build_loader
        from simclr_dist.parallel.distributed import World
        loader = build_loader(DataConfig(train=sys.argv[1], image_size=24), AugmentConfig(), seed=0,
                              global_batch_size=8, world=World(), device="cpu")
        for batch in loader.batches(0):
            print(batch.views.shape[1])
            sys.exit(0)
    """
    assert run_python(script, str(beton)) == "8"


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@needs_ffcv
def test_torchs_threads_are_left_alone(beton: Path) -> None:
    before = torch.get_num_threads()
    with open_loader(beton) as loader:
        take(loader, 0, 2)
        assert torch.get_num_threads() == before


@needs_ffcv
def test_works_when_bound_to_one_cpu(beton: Path) -> None:
    script = """
        import os, sys
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from simclr_dist.data.loading.load_images import load_images
        print(sum(len(ids) for _, _, ids in load_images(sys.argv[1], 24, batch_size=8)))
    """
    assert run_python(script, str(beton)) == str(NUM_SAMPLES)


def test_more_threads_than_cpus_are_not_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.warns(UserWarning, match="num_threads is 9, but this process may use 2 CPUs"):
        open_loader(folder, num_threads=9).close()


def test_ranks_of_a_node_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from simclr_dist.parallel.threads import default_num_threads

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [default_num_threads(None, ranks) for ranks in (1, 4, 16, 64)] == [16, 4, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Without ffcv


def test_without_ffcv_a_beton_file_is_read_slowly_and_says_so_once(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffcv_import, "unavailable", lambda: "ffcv is not installed")
    with (
        pytest.warns(UserWarning, match="the same crops, at a fifth of the speed") as warned,
        open_loader(beton) as slow,
    ):
        slow_batches = take(slow, 0, 2)
    assert len(warned) == 1
    monkeypatch.undo()
    if ffcv_import.unavailable() is None:
        with open_loader(beton) as fast:
            for a, b in zip(take(fast, 0, 2), slow_batches, strict=True):
                assert torch.equal(a.sample_ids, b.sample_ids)
                assert (a.views.float() - b.views.float()).abs().mean() < 5
        assert slow.fingerprint == fast.fingerprint


def test_ffcv_asked_for_by_name_is_not_replaced(beton: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"reads \.beton files; run `simclr-dist prepare"):
        open_loader(folder, loader="ffcv")
    monkeypatch.setattr(ffcv_import, "unavailable", lambda: "ffcv is not installed")
    with pytest.raises(DataError, match="ffcv is not installed"):
        open_loader(beton, loader="ffcv")


def test_folder_loader_reads_beton_files_when_asked_to(beton: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_loader(beton, loader="folder") as loader:
            assert take(loader, 0, 1)[0].views.any()


# ---------------------------------------------------------------------------------------------------------------------
# Images for evaluation


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder"])
def test_load_images_leaves_nothing_out_and_keeps_the_order(kind: str, request: pytest.FixtureRequest) -> None:
    source = str(request.getfixturevalue(kind))
    wanted = np.array([28, 3, 3, 0, 17, 9, 11])
    for ids in (None, wanted):
        batches = list(load_images(source, SIDE, batch_size=4, ids=ids))
        expected = np.arange(NUM_SAMPLES) if ids is None else ids
        assert torch.cat([b[2] for b in batches]).tolist() == expected.tolist()
        assert torch.cat([b[1] for b in batches]).tolist() == describe(source).labels[expected].tolist()
        assert [len(b[0]) for b in batches][-1] == (len(expected) - 1) % 4 + 1


@pytest.mark.parametrize("kind", [pytest.param("beton", marks=needs_ffcv), "folder"])
def test_load_images_crops_as_torchvision_evaluates(
    kind: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path
) -> None:
    pixels = make_folder(tmp_path, NUM_SAMPLES)
    source = str(request.getfixturevalue(kind))
    S = 56
    for images, _, ids in load_images(source, S, batch_size=8):
        for image, i in zip(images, ids.tolist(), strict=True):
            if min(pixels[i].shape[:2]) < 2 * S:
                continue  # enlarging blurs, and the rules differ
            planar = torch.from_numpy(pixels[i]).permute(2, 0, 1)
            expected = reference.center_crop(reference.resize(planar, [64], antialias=True), [S, S])
            assert (expected.permute(1, 2, 0).float() - image.float()).abs().mean() < 8


def test_describe_decodes_nothing_and_agrees(beton: Path, folder: Path) -> None:
    a, b = describe(str(beton)), describe(str(folder))
    assert a.num_samples == b.num_samples == NUM_SAMPLES
    assert a.class_names == b.class_names == ("class0", "class1", "class2")
    assert np.array_equal(a.labels, b.labels)
    assert a.fingerprint == describe(str(beton)).fingerprint != b.fingerprint


def test_fingerprint_tells_datasets_apart(beton: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.beton"
    prepare(folder, other, mode="smart", num_workers=1, limit=NUM_SAMPLES - 1)
    assert describe(str(other)).fingerprint != describe(str(beton)).fingerprint


def test_importing_the_package_does_not_import_torch() -> None:
    assert run_python("import sys, simclr_dist.data.beton.prepare; print('torch' in sys.modules)") == "False"


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@needs_ffcv
@needs_gpu
@pytest.mark.gpu
def test_gpu_batches_are_the_cpus_even_when_the_gpu_is_far_behind(beton: Path) -> None:
    with open_loader(beton) as loader:
        expected = take(loader, 0, 16)
    with open_loader(beton, device="cuda", batches_ahead=1) as loader:
        batches = loader.batches(0)
        held = []
        for _ in range(16):
            torch.cuda._sleep(20_000_000)  # the host runs ahead of the device
            batch = next(batches)
            held.append((batch, batch.views.clone()))
        for (batch, copy), cpu in zip(held, expected, strict=True):
            assert batch.views.device.type == "cuda"
            assert torch.equal(copy.cpu(), cpu.views)
            assert torch.equal(batch.views.cpu(), cpu.views)
            assert torch.equal(batch.sample_ids.cpu(), cpu.sample_ids)


def test_keys_of_a_batch_are_those_of_its_samples(folder: Path) -> None:
    """The crops of a sample depend on seed, epoch, id and view, not on its neighbours."""
    ids = np.array([4, 9, 2])
    alone = [keys(SEED, 1, np.array([i])[None], np.arange(2)[:, None]) for i in ids]
    together = keys(SEED, 1, ids[None], np.arange(2)[:, None])
    assert np.array_equal(np.concatenate(alone, axis=1), together)
    sizes = np.array([40, 50, 60])
    table = random_crops(together, sizes, sizes, scale_min=0.08, flip_p=0.5)
    for k in range(3):
        one = random_crops(alone[k], sizes[k : k + 1], sizes[k : k + 1], scale_min=0.08, flip_p=0.5)
        assert np.array_equal(one[:, 0], table[:, k])


class Counted:
    """Images that remember how many were asked for at a time."""

    pixel_format = RGB

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def fill(self, ids: NDArray[np.int64], crops: object, out: NDArray[np.uint8]) -> None:
        self.sizes.append(len(ids))

    def close(self) -> None: ...


@pytest.mark.parametrize(("side", "size"), [(32, 128), (224, 16)])
def test_threads_take_parts_that_are_worth_their_while(side: int, size: int) -> None:
    """512 images for 16 threads: small ones by 128, so that not 32 wait for a lock; large ones by 16."""
    images = Counted()
    pool = DecodePool(images, 16)  # type: ignore[arg-type]
    try:
        batch: Any = (np.arange(512), lambda ids: None)
        next(pool.read([batch], num_views=2, image_size=side))
    finally:
        pool.close()
    assert set(images.sizes) == {size}
    assert sum(images.sizes) == 512
