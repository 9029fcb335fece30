"""Shards behind URLs: the batches of local ones, fetched as the order needs them, verified, within a size, no hang."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simclr_dist import cli
from simclr_dist.config import Config, ConfigError, load_config
from simclr_dist.data.beton import remote_tables, shard_cache, shard_set
from simclr_dist.data.beton.assemble import merge, split
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.shard_cache import NEVER, CachedShard, CachePlace, ShardCache, keep_shards_in
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.loading.fetch_ahead import ShardUses
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.mix import MixedOrder
from simclr_dist.data.order import Order
from simclr_dist.data.sources import remote
from simclr_dist.doctor.data import examine_data
from simclr_dist.errors import CheckpointError, DataError
from simclr_dist.parallel.distributed import World
from simclr_dist.source_text import source_text
from simclr_dist.training.resuming import refuse_another_training
from tests.images import make_folder
from tests.store import Store
from tests.test_shards import NUM_SAMPLES, NUM_SHARDS, SMOKE, G, needs_ffcv, open_loader, tiny, views
from tests.training import Training, write_images

MANY, OF_EACH = 24, 8
ALL = "{00000..00004}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five, of JPEG and raw images."""
    root = tmp_path_factory.mktemp("store")
    make_folder(root / "images", NUM_SAMPLES)
    prepare(root / "images", root / "train.beton", num_workers=1)
    return split(root / "train.beton", NUM_SHARDS)[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tiny ones of one size."""
    root = tmp_path_factory.mktemp("many")
    for i in range(MANY):
        tiny(root / f"{i:02}.beton", OF_EACH, value=i * OF_EACH, names=["class0"])
    return root


@pytest.fixture
def store(shards: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    found = Store(ranges=True, tells_versions=True)
    found.put(shards)
    found.put(many, "/many")
    forget()
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)
    monkeypatch.setattr(shard_cache, "_LONGEST_PAUSE_S", 0.05)
    yield found
    found.close()
    keep_shards_in(None)
    forget()


def forget() -> None:
    """As a process that has just begun."""
    for known in (remote_tables._known, remote_tables._remote, shard_set._opened, shard_cache._opened):
        known.clear()


def url_of(store: Store) -> str:
    return f"{store.url}/set/train-{ALL}-of-00005.beton"


def url_of_many(store: Store) -> str:
    return f"{store.url}/many/{{00..{MANY - 1}}}.beton"


def fetched(store: Store) -> list[str]:
    """Shards that were fetched whole, in their sequence."""
    return [path for path in store.whole if path.endswith(".beton")]


def opened(
    store: Store, folder: Path, size: int | None = None, timeout_s: float = 60.0
) -> tuple[ShardCache, CachedShard]:
    """A cache, and one of the shards."""
    place = CachePlace(folder, size, timeout_s)
    keep_shards_in(place)
    with open_data(f"{store.url}/set/train-00001-of-00005.beton") as data:
        [shard] = data.shards
    assert shard.cached is not None
    return shard_cache.shard_cache(), shard.cached


def on_disk(folder: Path) -> int:
    """Bytes, each file once, although it may get its name meanwhile."""
    found: dict[int, int] = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found[path.stat().st_ino] = path.stat().st_size
    return sum(found.values())


def content(cache: ShardCache, shard: CachedShard) -> bytes:
    with cache.reading(shard) as fd:
        return os.pread(fd, shard.num_bytes + 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The same batches


@needs_ffcv
@pytest.mark.parametrize("order", ["random", "page_local", "shard_local", "mix"])
def test_batches_are_those_of_local_shards(
    order: str, store: Store, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    local, remote = str(shards / "*.beton"), url_of(store)
    settings: dict[str, object] = {"order": order, "order_window": 2}
    if order == "mix":
        files = sorted(shards.glob("*.beton"))
        local = source_text([str(files[0]), str(files[3]), str(files[1])])
        remote = source_text([str(files[0]), *(f"{store.url}/set/{files[i].name}" for i in (3, 1))])  # one of each kind
        settings = {"mix": (1.0, 3.0, 2.0)}
    ids, pixels, labels = views(local, **settings)
    cached = settings | {"cache_dir": str(tmp_path / "cache")}
    found = views(remote, **cached, num_threads=3)
    assert (found[0], found[2]) == (ids, labels)
    assert torch.equal(found[1], pixels)
    assert len(fetched(store)) == len(set(fetched(store)))  # each once
    later = views(remote, step=6, count=3, **cached)  # as a resume begins
    assert later[0] == ids[6 * G :]
    assert torch.equal(later[1], pixels[:, 6 * G :])
    halves = [views(remote, world=World(rank, 2, rank, 2), **cached) for rank in range(2)]
    for step in range(9):
        part, whole = slice(step * G // 2, (step + 1) * G // 2), slice(step * G, (step + 1) * G)
        assert halves[0][0][part] + halves[1][0][part] == ids[whole]
        assert torch.equal(torch.cat([half[1][:, part] for half in halves], 1), pixels[:, whole])
    assert len(fetched(store)) == len(set(fetched(store)))


def test_a_store_s_shards_are_known_as_the_local_ones(store: Store, shards: Path, tmp_path: Path) -> None:
    local = describe(str(shards))
    there = describe(url_of(store))  # without a cache_dir: in a folder of this process
    assert fetched(store) == []
    assert store.asked.count("/set/train-00003-of-00005.beton") <= 3  # parts of it
    assert there.content_fingerprint == local.content_fingerprint
    assert there.fingerprint == local.fingerprint
    assert (there.class_names, there.labels.tolist()) == (local.class_names, local.labels.tolist())
    one = shards / "train-00002-of-00005.beton"
    assert describe(f"{store.url}/set/{one.name}").content_fingerprint == describe(str(one)).content_fingerprint
    a, b = (views(source, loader="folder", count=3) for source in (shards, url_of(store)))
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])


def test_files_of_others_are_fetched_for_their_fingerprint(store: Store, many: Path, tmp_path: Path) -> None:
    for i in range(2):
        path = tiny(tmp_path / "all" / f"{i}.beton", value=i)
        written = path.read_bytes()
        at = written.index(b"records sha256")
        path.write_bytes(written[:at] + bytes(80) + written[at + 80 :])
    store.put(tmp_path / "all", "/others")
    store.faults["/others/0.beton.json"] = ["403"]  # as S3 answers for what is not there
    with pytest.warns(UserWarning, match=r"0\.beton\.json: access is refused.*; its class names are not used"):
        there = describe(f"{store.url}/others/{{0..1}}.beton")
    assert there.content_fingerprint == describe(str(tmp_path / "all")).content_fingerprint
    assert len(fetched(store)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# When what is needed


@pytest.mark.parametrize("kind", ["random", "window", "mix"])
def test_next_use_and_most_at_once_are_those_of_the_order_read_step_by_step(kind: str) -> None:
    sizes = np.array([5, 17, 3, 8, 11, 9])
    file_of_each = np.repeat(np.arange(6), sizes)
    order = {
        "random": lambda: Order(53, 4, 1),
        "window": lambda: Order(53, 4, 1, pages=file_of_each, window_pages=2),
        "mix": lambda: MixedOrder((22, 31), (1.0, 5.0), 4, 1),
    }[kind]()
    num_bytes = np.array([100, 200, 400, 800, 1600, 3200])
    uses = ShardUses(order, file_of_each, num_bytes, (1, 4))
    steps = order.steps_per_epoch

    def read_at(step: int) -> set[int]:
        ids = order.sample_ids(*divmod(step, steps))[1:4]
        return set(file_of_each[ids].tolist())

    for step in (0, 5, steps - 1, steps, 2 * steps + 3):
        horizon = range(step, (step // steps + 2) * steps)
        expected = [next((s for s in horizon if number in read_at(s)), NEVER) for number in range(6)]
        assert uses.next_use(step).tolist() == expected
        soonest, _ = uses.soonest(step, 2000)
        assert sum(num_bytes[soonest]) <= 2000
        assert [expected[i] for i in soonest] == sorted(expected[i] for i in soonest)
        assert all(expected[i] <= expected[j] for i in soonest for j in set(range(6)) - set(soonest.tolist()))
    for ahead in (1, 3):
        windows = [
            set().union(*(read_at(s) for s in range(max(0, t - 1), min(steps, t + ahead + 1)))) for t in range(steps)
        ]
        assert uses.most_at_once(ahead) == max(sum(num_bytes[list(window)]) for window in windows)


@needs_ffcv
def test_a_small_cache_stays_small_and_fetches_each_shard_once_an_epoch(
    store: Store, many: Path, tmp_path: Path
) -> None:
    size = (many / "00.beton").stat().st_size
    settings: dict[str, object] = {"order": "shard_local", "order_window": 2}
    ids, pixels, _ = views(many, count=3 * MANY, **settings)
    settings |= {"cache_dir": str(tmp_path / "cache"), "cache_size": f"{8 * size / 1000}KB"}
    seen: list[int] = []
    largest = 0
    with open_loader(url_of_many(store), **settings) as loader:
        for step, batch in enumerate(itertools.islice(loader.batches(0), 3 * MANY)):
            seen += batch.sample_ids.tolist()
            assert torch.equal(batch.views, pixels[:, step * G : (step + 1) * G])
            largest = max(largest, on_disk(tmp_path / "cache" / "shards"))
    assert seen == ids
    assert largest <= 8 * size
    counts = [fetched(store).count(f"/many/{i:02}.beton") for i in range(MANY)]
    assert min(counts) >= 2  # three epochs; some stay from one to the next, some are fetched ahead of the fourth
    assert sum(counts) <= 3 * MANY + 8


def test_the_least_soon_needed_is_deleted_first_and_never_one_that_is_read_or_needed_next(
    store: Store, tmp_path: Path
) -> None:
    url = url_of_many(store)
    keep_shards_in(CachePlace(tmp_path / "cache", None, 60.0))
    with open_data(url) as data:
        found = [shard.cached for shard in data.shards if shard.cached is not None]
    size = found[0].num_bytes
    cache = ShardCache(CachePlace(tmp_path / "cache", 4 * size, 60.0))
    for shard in found[:4]:
        cache.fetch(shard)
    next_use = {found[0].name: 9, found[1].name: 30, found[2].name: 20, found[3].name: 1, found[4].name: 5}
    cache.follow(lambda: next_use, now=2)
    soonest = {found[i].name for i in (0, 3, 4)}
    with cache.reading(found[1]):  # least soon needed, but read
        assert cache.fetch(found[4], keep=soonest)
    assert set(cache.names()) == soonest | {found[1].name}
    with pytest.raises(shard_cache.NoRoomError):
        cache.fetch(found[5], keep=soonest | {found[1].name})
    assert cache.fetch(found[5], keep=soonest)
    assert set(cache.names()) == soonest | {found[5].name}  # 5 is not in the plan: the first to go
    assert cache.fetch(found[6])
    assert set(cache.names()) == soonest | {found[6].name}
    next_use |= {shard.name: 1 for shard in found}
    with pytest.warns(UserWarning, match="do not hold all shards that are read at once"):
        assert content(cache, found[7])  # waited for: rather too large than without it
    assert len(cache.names()) == 5


@needs_ffcv
def test_a_resume_fetches_only_what_is_next(store: Store, many: Path, tmp_path: Path, monkeypatch) -> None:
    size, step = (many / "00.beton").stat().st_size, 2 * MANY + 13
    settings = {
        "order": "shard_local",
        "order_window": 1,
        "cache_dir": str(tmp_path),
        "cache_size": f"{6 * size / 1000}KB",
    }
    monkeypatch.setattr("simclr_dist.data.loading.fetch_ahead._THREADS_OF_A_MACHINE", 1)
    with open_loader(url_of_many(store), **settings) as loader:
        order = loader.order
        expected = [int(order.sample_ids(*divmod(s, MANY))[0]) // OF_EACH for s in range(step, step + 6)]
        next(iter(loader.batches(step)))
    names = fetched(store)
    assert set(names) <= {f"/many/{number:02}.beton" for number in expected}
    assert names[0] == f"/many/{expected[0]:02}.beton"


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("fault", ["cut", "short", "long", "other", "503"])
def test_what_fails_is_tried_again_and_nothing_but_the_shard_is_kept(
    fault: str, store: Store, shards: Path, tmp_path: Path
) -> None:
    name = "/set/train-00001-of-00005.beton"
    cache, shard = opened(store, tmp_path / "cache", timeout_s=5)
    store.faults[name] = [fault, fault, ""]
    with pytest.warns(UserWarning, match=rf"{name}: .*; trying again for 5 s"):
        assert content(cache, shard) == (shards / Path(name).name).read_bytes()
    assert set(cache.names()) == {shard.name}
    assert not list(cache.place.folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "the server answers 503"),
        ("cut", "cannot be fetched"),
        ("other", "pixels or labels differ"),
        ("silent", "no answer in time"),
        ("404", "no such file"),
    ],
)
def test_a_store_that_goes_on_failing_is_given_up_in_time(
    fault: str, message: str, store: Store, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    cache, shard = opened(store, tmp_path / "cache", timeout_s=1)
    store.faults[f"/set/{shard.file.name.rpartition('/')[2]}"] = [fault] * 99
    began_s = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=rf"^{re.escape(shard.file.shown)}: .*{message}"):
            content(cache, shard)
    assert time.monotonic() - began_s < (0.9 if fault == "404" else 8)
    assert cache.names() == {}


@needs_ffcv
def test_a_training_that_waits_for_a_dead_store_says_so(store: Store, tmp_path: Path) -> None:
    with open_loader(url_of(store), cache_dir=str(tmp_path), fetch_timeout_s=1.0) as loader:
        store.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DataError, match=r"cannot be fetched: .*nothing new for 1 s: data\.fetch_timeout_s"):
                next(loader.batches(0))


def test_a_damaged_copy_is_fetched_again(store: Store, shards: Path, tmp_path: Path) -> None:
    cache, shard = opened(store, tmp_path / "cache")
    whole = content(cache, shard)
    path = cache.path(shard)
    for damaged in (whole[:-7], whole[:500] + bytes(500) + whole[1000:]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"was changed since it was verified; http"):
            assert content(cache, shard) == whole
        cache._told.clear()
    before = len(fetched(store))
    forget()
    cache, shard = opened(store, tmp_path / "cache")
    assert content(cache, shard) == whole  # of another process: trusted as it is
    assert len(fetched(store)) == before == 3


def test_what_a_dead_process_left_is_neither_trusted_nor_in_the_way(store: Store, shards: Path, tmp_path: Path) -> None:
    cache, shard = opened(store, tmp_path / "cache")
    part = Path(f"{cache.path(shard)}.part")
    holding = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write(bytes(99)); file.flush(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(part)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert cache.fetch(shard) is False  # another one is at it
        assert fetched(store) == []
        other.kill()
    assert part.stat().st_size == 99
    assert content(cache, shard) == (shards / Path(shard.file.name).name).read_bytes()
    assert not part.exists()


def test_a_shard_that_is_replaced_in_the_store(store: Store, shards: Path, many: Path, tmp_path: Path) -> None:
    name = "train-00001-of-00005.beton"
    cache, shard = opened(store, tmp_path / "cache", timeout_s=1)
    for suffix in ("", ".json"):
        store.files[f"/set/{name}{suffix}"] = (many / f"03.beton{suffix}").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"train-00001-of-00005\.beton: "):
            content(cache, shard)  # never mixed with what was read before
    record = next(cache.tables.rglob("store.json"))
    record.write_text(json.dumps([*json.loads(record.read_text())[:3], 0]))  # long ago
    forget()
    cache, shard = opened(store, tmp_path / "cache")
    assert content(cache, shard) == (many / "03.beton").read_bytes()


def test_tables_that_are_known_are_not_asked_for_again(store: Store, tmp_path: Path) -> None:
    for version in (True, False):
        store.tells_versions = version
        folder = tmp_path / str(version)
        opened(store, folder)
        store.asked.clear()
        forget()
        cache, _ = opened(store, folder)
        assert store.asked == []  # a moment ago
        record = next(cache.tables.rglob("store.json"))
        record.write_text(json.dumps([*json.loads(record.read_text())[:3], 0]))
        forget()
        opened(store, folder)
        assert (store.asked.count("/set/train-00001-of-00005.beton") == 0) is version  # where the store tells versions


def test_a_server_without_parts_of_files(
    store: Store, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ranges = False
    monkeypatch.setattr(remote, "_SMALLEST_READ", 1 << 10)
    keep_shards_in(CachePlace(tmp_path, None, 60.0))
    with pytest.warns(UserWarning, match="its server gives no parts of files, so shards are fetched whole"):
        info = describe(url_of(store))
    assert info.content_fingerprint == describe(str(shards)).content_fingerprint
    forget()
    views(url_of(store), cache_dir=str(tmp_path))
    assert sorted(fetched(store)) == sorted(f"/set/{path.name}" for path in shards.glob("*.beton"))  # once


# ---------------------------------------------------------------------------------------------------------------------
# Known before the first step


def test_settings_that_cannot_be_are_refused_when_they_are_read() -> None:
    url = "data.train=https://host.example/{00..10}.beton"
    plain = ("data.test=null", "evaluation.knn_every_epochs=null")
    for given, message in (
        ((url,), r"data\.train: https://host\.example/.* is a URL: set data\.cache_dir to a folder on a local disk"),
        (("data.cache_size=2GB",), r"data\.cache_size is that of data\.cache_dir"),
        (("data.cache_dir=/tmp/x", "data.cache_size=12"), r"data\.cache_size"),
        ((url, "data.cache_dir=/x", "data.fetch_timeout_s=100.0"), r"set timeout\.step_s to 150 or more"),
        (("evaluation.train=s3://a/b.beton",), r"evaluation\.train: s3://a/b\.beton is a URL"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(SMOKE, [*plain, *given])
    sizes = {"200GB": 200 * 10**9, "1.5TiB": 3 << 39, "1 KB": 1000}
    for text, expected in sizes.items():
        config = load_config(SMOKE, [*plain, url, "data.cache_dir=/x", f"data.cache_size={text}"])
        assert config.data.cache_bytes == expected


@needs_ffcv
def test_a_cache_that_cannot_be_used_or_is_too_small(store: Store, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"data\.cache_dir: .*/file cannot be used: .*; choose a folder on a local disk"
    ):
        open_loader(url_of(store), cache_dir=str(tmp_path / "file"))
    with pytest.raises(
        DataError,
        match=r"data\.cache_size: 0\.04 MB, but 0\.27 MB of shards are read at once, of 0\.27 MB in all: raise it",
    ):
        open_loader(url_of(store), cache_dir=str(tmp_path / "cache"), cache_size="40KB")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"0\.00 MB are free in .*/cache, but shards of 0\.27 MB are to come"):
        open_loader(url_of(store), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("set/nothing.beton", r"/set/nothing\.beton: no such file"),
        ("set/page.beton", r"/set/page\.beton: is no .beton file of version 2"),
        ("set/cut.beton", r"/set/cut\.beton: what came is truncated"),
        ("set/train-00001-of-00005.beton?sig=abc", r"\?\*\*\*: holds a password or a signature"),
    ],
)
def test_what_a_store_does_not_have_is_told(place: str, message: str, store: Store, tmp_path: Path) -> None:
    whole = store.files["/set/train-00001-of-00005.beton"]
    store.files |= {"/set/page.beton": b"<html>" * 100, "/set/cut.beton": whole[:-24]}
    keep_shards_in(CachePlace(tmp_path, None, 60.0))
    with pytest.raises(DataError, match=message):
        describe(f"{store.url}/{place}")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/x\.beton: cannot be fetched: .*\(3 tries\)"):
        describe("http://127.0.0.1:9/x.beton")


@needs_ffcv
def test_a_pattern_in_a_store_that_lists_its_files(many: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in many.iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    forget()
    try:
        ids, pixels, _ = views(many, count=3)
        found = views("memory://bucket/set/*.beton", count=3, cache_dir=str(tmp_path / "cache"))
        assert found[0] == ids
        assert torch.equal(found[1], pixels)
        for place in ("memory://bucket/set", "memory://bucket/set/"):
            with pytest.raises(
                DataError, match=r"holds \.beton files; name these alone: memory://bucket/set/\*\.beton$"
            ):
                describe(place)
    finally:
        memory.rm("/", recursive=True)
        keep_shards_in(None)
        forget()


def test_what_cannot_be_done_with_a_url_is_told(store: Store, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a web server does not list its files; name them by a range, such as"):
        describe(f"{store.url}/set/*.beton")
    with pytest.raises(DataError, match=r"\.beton: is a \.beton file already"):
        prepare(f"{store.url}/set/train-00001-of-00005.beton", tmp_path / "out.beton")
    with pytest.raises(DataError, match="lies elsewhere; shards are split and joined on this machine"):
        merge(tmp_path / "x.beton", [url_of(store)])
    with pytest.raises(DataError, match="is named twice as a part of one data set"):
        describe(source_text([f"{store.url}/set/train-00001-of-00005.beton"] * 2))
    make_folder(tmp_path / "images", 9)
    with pytest.raises(DataError, match=r"data\.order=shard_local: .*/images has no pages; use \.beton files"):
        open_loader(tmp_path / "images", order="shard_local")


def test_commands_take_urls(store: Store, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        forget()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out

    local, remote = run("inspect", str(shards)), run("inspect", url_of(store))
    for key in ("images", "longer side", "classes", "fingerprint"):
        rows = [next(line for line in text.splitlines() if line.startswith(key)) for text in (local, remote)]
        assert rows[0] == rows[1]
    assert fetched(store) == []
    settings = (
        *(f"data.train={url_of(store)}", f"data.cache_dir={tmp_path}", "data.test=null"),
        *("evaluation.knn_every_epochs=null", "train.global_batch_size=8"),
    )
    planned = run("plan", str(SMOKE), *settings)
    assert re.search(
        r"store +5 shards behind URLs, 0\.27 MB, of which 0\.00 MB are in .*; each is fetched once", planned
    )
    assert fetched(store) == []
    chosen = run("train", url_of(store), "--out", str(tmp_path / "out"), "--dry-run", "train.epochs=1")
    assert re.search(r"data\.cache_dir .*where they are kept", chosen)
    data = load_config(SMOKE, settings).data
    findings = [finding for finding in examine_data(data, 8) if finding.what == "data.cache_dir"]
    assert [finding.level for finding in findings] == ["ok"]
    small = data.model_copy(update={"cache_size": "90KB"})
    [finding] = [finding for finding in examine_data(small, 8) if finding.what == "data.cache_dir"]
    assert finding.level == "problem"
    assert "more than data.cache_size (0.09 MB)" in finding.found


def test_a_run_keeps_its_window_where_the_order_has_one() -> None:
    def config(order: str, window: int) -> Config:
        return load_config(SMOKE, [f"data.order={order}", f"data.order_window={window}"], check_data=False)

    found = SimpleNamespace(config=config("shard_local", 4), path="a checkpoint", fingerprint="")
    with pytest.raises(CheckpointError, match=r"data\.order_window: 4 then, 8 now"):
        refuse_another_training(found, config("shard_local", 8), None)  # type: ignore[arg-type]
    found.config = config("random", 4)
    refuse_another_training(found, config("random", 8), None)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# A training


@pytest.mark.distributed
def test_a_training_from_urls_is_the_local_one_and_its_ranks_fetch_each_shard_once(tmp_path: Path) -> None:
    folder, _ = split(write_images(tmp_path / "train.beton"), 7)
    order = ("data.order=shard_local", "data.order_window=2", "train.max_steps=10")
    order += ("train.virtual_shards=2", "model.batch_norm=per_shard")
    local = Training(folder, tmp_path, "local", *order)
    assert local.wait() == [0], local.output
    store = Store(ranges=True, tells_versions=True)
    store.put(folder)
    store.slow_s = 0.02
    url = f"{store.url}/set/train-{{00000..00006}}-of-00007.beton"
    settings = (*order, f"data.train={url}", f"data.cache_dir={tmp_path}/cache", "checkpoint.every_steps=2")
    try:
        begun = Training(folder, tmp_path, "remote", *settings, world_size=2)
        begun.wait_until(lambda: begun.has_logged(3))
        begun.kill()
        counts = [fetched(store).count(f"/set/{path.name}") for path in folder.glob("*.beton")]
        assert max(counts) == 1  # by two processes
        shutil.rmtree(tmp_path / "cache")  # as on another machine
        gone_on = Training(folder, tmp_path, "remote", *settings)
        assert gone_on.wait() == [0], gone_on.output
    finally:
        store.close()
    assert re.search(r"resumes at step [2-9]", gone_on.output[0])
    assert "7 shards behind URLs" in gone_on.output[0]
    assert gone_on.final_bytes() == local.final_bytes()
