"""Sources behind URLs: fetched whole, tried again, refused in words, and never with their secrets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.account import SourceOptions
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.sources import remote
from simclr_dist.data.sources.open import open_source
from simclr_dist.errors import DataError
from simclr_dist.safe_text import mask
from simclr_dist.source_text import is_url, missing
from tests.images import make_image
from tests.store import Store
from tests.test_data_containers import classes, names, png, samples, write_parquet, write_tar, write_zip

SECRET = "s3cr3t"


def run(*arguments: object) -> int:
    from simclr_dist.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(remote, "_fetched", {})
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)
    found = Store()
    yield found
    found.close()


def shard(folder: Path, first: int = 0) -> bytes:
    members = samples(*[{"png": png(first + i), "cls": b"ab"[i : i + 1]} for i in range(2)])
    return write_tar(folder / "shard", members).read_bytes()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.zip", lambda at: write_zip(at / "x", [("a/0.png", png(0)), ("b/1.png", png(1))]).read_bytes()),
        ("x.tar", shard),
        (
            "train.parquet",
            lambda at: write_parquet(at / "x", {"image": [png(0), png(1)], "label": ["a", "b"]}).read_bytes(),
        ),
    ],
)
def test_a_file_behind_a_url_is_the_file(name: str, make: Callable, store: Store, tmp_path: Path) -> None:
    store.files[f"/set/{name}"] = make(tmp_path)
    url = f"{store.url}/set/{name}"
    source = open_source(url)
    assert classes(source) == ["a", "b"]
    assert all(np.array_equal(source.read(i), make_image(i, 24, 32)) for i in range(2))
    assert all(found.startswith(f"{url}/") for found in names(source))
    assert source.account.source == url
    assert describe(url).content_fingerprint == source.content_fingerprint
    assert store.asked.count(f"/set/{name}") == 1  # although opened twice


def test_many_files_are_one_data_set(store: Store, tmp_path: Path) -> None:
    for i in range(3):
        store.files[f"/set/train-{i:02d}.tar"] = shard(tmp_path, 2 * i)
    source = open_source(f"{store.url}/set/train-{{00..02}}.tar")
    assert len(source.labels) == 6
    assert source.name(2) == f"{store.url}/set/train-01.tar/000.png"
    with pytest.raises(DataError, match=r"train-03\.tar: no such file or folder"):
        open_source(f"{store.url}/set/train-{{00..03}}.tar")


@pytest.mark.parametrize("fault", ["cut", "short", "500", "503"])
def test_what_fails_once_is_tried_again_and_what_fails_always_is_refused(
    fault: str, store: Store, tmp_path: Path
) -> None:
    store.files["/x.tar"] = shard(tmp_path)
    store.faults["/x.tar"] = [fault]
    if fault in ("cut", "short"):
        assert len(open_source(f"{store.url}/x.tar").labels) == 2
        assert store.asked.count("/x.tar") == 2
    remote._fetched.clear()
    store.faults["/y.tar"] = [fault] * 100
    store.files["/y.tar"] = store.files["/x.tar"]
    with pytest.raises(DataError, match=rf"^{store.url}/y\.tar: .*\(3 tries\)$"):
        open_source(f"{store.url}/y.tar")


@pytest.mark.parametrize(
    ("fault", "message"), [("401", "access is refused"), ("403", "access is refused"), ("404", "no such file")]
)
def test_what_will_not_change_is_not_tried_again(fault: str, message: str, store: Store, tmp_path: Path) -> None:
    store.files["/x.tar"] = shard(tmp_path)
    store.faults["/x.tar"] = [fault] * 100
    with pytest.raises(DataError, match=rf"/x\.tar: {message}"):
        open_source(f"{store.url}/x.tar")


def test_no_server_no_package_and_no_protocol_are_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/x\.tar: cannot be fetched: .*\(3 tries\)"):
        open_source("http://127.0.0.1:9/x.tar")
    for url in ("s3://bucket/x.tar", "gs://bucket/x.tar", "nonsense://bucket/x.tar", "az://box/x.zip"):
        with pytest.raises(DataError, match=rf"^{url}: "):
            open_source(url)
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(DataError, match=r"needs a package: pip install 'fsspec\[http\]'"):
        open_source("https://example.org/x.tar")


@pytest.mark.parametrize(
    "place",
    [
        "http://user:{secret}@{host}/x.tar",
        "http://{host}/x.tar?X-Amz-Signature={secret}",
        "http://user:{secret}@{host}/x.tar?sig={secret}&other={secret}",
        "http://{host}/x.tar?{secret}#{secret}",
    ],
)
def test_secrets_are_nowhere(place: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = place.format(secret=SECRET, host=store.url.removeprefix("http://"))
    store.files["/x.tar"] = shard(tmp_path)[:2000]
    assert run("prepare", url, str(tmp_path / "x.beton"), "--workers", "1") != 0
    store.files["/x.tar"] = shard(tmp_path)
    remote._fetched.clear()
    assert run("prepare", url, str(tmp_path / "x.beton"), "--workers", "1", "--split", "none") != 0
    assert run("prepare", url, str(tmp_path / "x.beton"), "--workers", "1") == 0
    assert run("doctor", url) == 0
    assert run("inspect", str(tmp_path / "x.beton")) == 0
    store.faults["/x.tar"] = ["403"] * 9
    remote._fetched.clear()
    for name in ("y", "z"):
        assert run("prepare", url, str(tmp_path / f"{name}.beton"), "--workers", "1") != 0
        store.faults["/x.tar"] = ["cut"] * 99
    said = capsys.readouterr()
    written = (tmp_path / "x.beton.json").read_text()
    assert "x.tar" in said.out
    assert "x.tar" in said.err
    assert "x.tar" in json.loads(written)["source"]
    assert SECRET not in said.out + said.err + written
    with pytest.raises(DataError, match="holds a password or a signature, which would be written into the files") as no:
        describe(url)  # as trainings and evaluations do
    assert SECRET not in str(no.value)


def test_folders_and_patterns_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(remote, "_fetched", {})
    memory = fsspec.filesystem("memory")
    for name in ("set/train/a/0.png", "set/train/b/1.png", "set/test/a/2.png"):
        memory.pipe(f"/{name}", png(int(name[-5])))
    for i in range(2):
        memory.pipe(f"/shards/{i}.tar", shard(tmp_path, i))
    try:
        source = open_source("memory://set", SourceOptions(split="train"))
        assert classes(source) == ["a", "b"]
        assert names(source) == ["memory://set/train/a/0.png", "memory://set/train/b/1.png"]
        assert len(open_source("memory://shards/*.tar").labels) == 4
        assert len(open_source("memory://shards").labels) == 4
        with pytest.raises(DataError, match=r"^memory://none/\*\.tar: no file is called so"):
            open_source("memory://none/*.tar")
    finally:
        memory.rm("/", recursive=True)


def test_what_is_a_url() -> None:
    assert all(map(is_url, ["s3://a/b", "https://x", "GS://x/y", "abfs+x://y"]))
    assert missing("s3://a/b") is missing("x-{0..2}.tar") is None
    assert not any(map(is_url, ["a/b", "/a//b", "c:/x", "://x", "x.tar", "a:b://"]))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see https://a/b?c=d&e=f, now", "see https://a/b?*** now"),
        ("s3://k:v@b/x.tar", "s3://***@b/x.tar"),
        ("https://a/b#frag", "https://a/b#***"),
        ("what? a://b", "what? a://b"),
    ],
)
def test_urls_are_shown_without_what_they_ask_with(text: str, masked: str) -> None:
    assert mask(text) == masked
