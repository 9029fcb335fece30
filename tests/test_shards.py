"""Many .beton files are one data set: the views of one file, classes by name, no limit on how many there are."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_dist import cli
from simclr_dist.config import AugmentConfig, ConfigError, DataConfig, load_config
from simclr_dist.config.yaml_source import render_config
from simclr_dist.data import Loader
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton import open_files, shard_set
from simclr_dist.data.beton.assemble import merge, split
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.data.beton.shard_files import beton_files
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.beton.writer import PagedWriter, Record
from simclr_dist.data.decode import ffcv_import
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.errors import DataError
from simclr_dist.kinds import kind_of
from simclr_dist.parallel.distributed import World
from simclr_dist.source_text import SourceText, source_text
from tests.conftest import REPOSITORY
from tests.images import make_folder
from tests.training import Training, write_images

needs_ffcv = pytest.mark.skipif(ffcv_import.unavailable() is not None, reason=str(ffcv_import.unavailable()))
NUM_SAMPLES, NUM_SHARDS, G, SIDE = 37, 5, 8, 24
SMOKE = REPOSITORY / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_folder(root / "images", NUM_SAMPLES)
    prepare(root / "images", root / "train.beton", num_workers=1)
    return root / "train.beton"


@pytest.fixture(scope="module")
def shards(whole: Path) -> Path:
    return split(whole, NUM_SHARDS)[0]


def tiny(path: Path, num_samples: int = 2, value: int = 0, label: int = 0, names: list[str] | None = None) -> Path:
    """A file of raw images of one colour. names: of classes; without them it is like one of ffcv's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar_path(path).unlink(missing_ok=True)
    with path.open("wb") as file:
        writer = PagedWriter(file, num_samples)
        for i in range(num_samples):
            writer.add(Record(np.full((8, 8, 3), value + i, np.uint8).tobytes(), 1, 8, 8, label))
        writer.finish()
    if names is not None:
        with open_beton(path) as beton:
            said = {"num_samples": num_samples, "class_names": names, "fingerprint": beton.fingerprint}
        sidecar_path(path).write_text(json.dumps(said))
    return path


def open_loader(source: object, world: World = World(), **settings: object) -> Loader:  # noqa: B008 - frozen
    data = DataConfig(**{"train": str(source), "image_size": SIDE, "num_threads": 1} | settings)
    return build_loader(data, AugmentConfig(), seed=3, global_batch_size=G, world=world, device="cpu")


def views(
    source: object, step: int = 0, count: int = 9, **settings: object
) -> tuple[list[int], torch.Tensor, list[int]]:
    with open_loader(source, **settings) as loader:
        batches = list(itertools.islice(loader.batches(step), count))
    ids = [i for batch in batches for i in batch.sample_ids.tolist()]
    labels = [i for batch in batches for i in batch.labels.tolist()]
    return ids, torch.cat([batch.views for batch in batches], 1), labels


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"part-{i:02}.beton" for i in range(12)]
    for name in np.random.default_rng(0).permutation(names):
        tiny(tmp_path / "all" / str(name))
    (tmp_path / "all" / ".hidden.beton").write_bytes(b"")
    (tmp_path / "all" / "notes.txt").write_text("none of the data")
    expected = tuple(tmp_path / "all" / name for name in names)
    for source in (tmp_path / "all", tmp_path / "all" / "*.beton", tmp_path / "*" / "part-*.beton"):
        assert beton_files(source).paths == expected
    monkeypatch.chdir(tmp_path)
    assert beton_files("all/part-0?.beton").paths == tuple(Path("all", name) for name in names[:10])
    listed = source_text([str(expected[7]), f"{tmp_path}/all/part-0[12].beton", str(expected[0])])
    assert beton_files(listed).paths == (expected[7], expected[1], expected[2], expected[0])  # a list's own order
    assert beton_files(tmp_path / "all").others == ("notes.txt",)


def test_a_folder_of_images_stays_one_with_a_beton_file_in_it(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    tiny(tmp_path / "images" / "train.beton")
    assert beton_files(tmp_path / "images") is None
    assert describe(str(tmp_path / "images")).num_samples == 4
    assert beton_files("synthetic") is None


def test_different_splits_are_asked_about_and_other_things_refused(tmp_path: Path) -> None:
    for name in ("train-0.beton", "train-1.beton", "test.beton"):
        tiny(tmp_path / "all" / name)
    for source in (tmp_path / "all", tmp_path / "all" / "*.beton"):
        with pytest.raises(DataError, match=r"different parts of a data set: .*test\.beton.*train\*\.beton|test\*"):
            describe(str(source))
    assert describe(str(tmp_path / "all" / "train*.beton")).num_samples == 4
    folder = tmp_path / "images"
    make_folder(folder, 2)
    with pytest.raises(DataError, match=r"images: is no \.beton file.*simclr-dist prepare"):
        describe(source_text([str(tmp_path / "all" / "test.beton"), str(folder)]))
    (tmp_path / "again.beton").symlink_to(tmp_path / "all" / "test.beton")
    with pytest.raises(DataError, match=r"again\.beton: is named twice .*also as .*test\.beton"):
        describe(source_text([str(tmp_path / "all" / "test.beton"), str(tmp_path / "again.beton")]))
    with pytest.raises(DataError, match=r"gone\.beton: No such file"):
        describe(source_text([str(tmp_path / "all" / "test.beton"), str(tmp_path / "gone.beton")]))


def test_a_list_in_a_configuration_is_read_written_and_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(tiny(tmp_path / f"{i}.beton")) for i in range(3)]
    monkeypatch.setenv("SHARDS", str(tmp_path))
    config = load_config(SMOKE, [f"data.train=[$SHARDS/0.beton, {files[1]}, {files[2]}]", f"data.test=[{files[0]}]"])
    assert config.data.train == "\n".join(files)
    assert f"{config.data.train}" == f"{files[0]} and 2 more"
    assert config.data.test == files[0]
    (tmp_path / "again.yaml").write_text(render_config(config))
    assert f"  - {files[1]}" in render_config(config)
    assert load_config(tmp_path / "again.yaml") == config
    assert isinstance(load_config(tmp_path / "again.yaml").data.train, SourceText)
    for value, message in (
        ("[]", "name of a file"),
        ("[1]", "name of a file"),
        (f"[{files[0]}, x.beton]", "x.beton does not"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(SMOKE, [f"data.train={value}"])
    with pytest.raises(ConfigError, match=r"nothing-\*\.beton does not exist"):
        load_config(SMOKE, [f"data.train={tmp_path}/nothing-*.beton"])


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@needs_ffcv
def test_views_are_those_of_one_file_on_any_threads_ranks_and_open_files(
    whole: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    ids, pixels, labels = views(whole)
    listed = source_text(str(path) for path in sorted(shards.glob("*.beton")))
    for source in (shards, shards / "*.beton", listed):
        for threads in (1, 3):
            found = views(source, num_threads=threads)
            assert found[0] == ids
            assert found[2] == labels
            assert torch.equal(found[1], pixels)
    monkeypatch.setattr(open_files, "_MOST", 1)
    assert torch.equal(views(shards, num_threads=3)[1], pixels)
    later = views(shards, step=6, count=3)  # in the second epoch, as a resume begins
    assert (later[0], later[2]) == (ids[6 * G :], labels[6 * G :])
    assert torch.equal(later[1], pixels[:, 6 * G :])
    halves = [views(shards, world=World(rank=rank, size=2, local_size=2), count=9) for rank in range(2)]
    for step in range(9):
        part = slice(step * G // 2, (step + 1) * G // 2)
        assert halves[0][0][part] + halves[1][0][part] == ids[step * G : (step + 1) * G]
        assert torch.equal(torch.cat([half[1][:, part] for half in halves], 1), pixels[:, step * G : (step + 1) * G])


def test_without_ffcv_views_are_those_of_one_file_too(whole: Path, shards: Path) -> None:
    a, b = (views(source, loader="folder", count=5) for source in (whole, shards))
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])


def test_evaluations_see_the_same_images(whole: Path, shards: Path) -> None:
    ids = np.array([36, 0, 8, 7, 20])
    one, many = (next(load_images(str(source), SIDE, batch_size=5, ids=ids)) for source in (whole, shards))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    kind = kind_of(DataConfig(train=str(shards), image_size=SIDE))
    first = sorted(shards.glob("*.beton"))[:2]
    assert kind.names(str(shards), NUM_SAMPLES)[7:9] == (f"{first[0]}[7]", f"{first[1]}[0]")
    assert kind.size_on_disk(str(shards)) == sum(path.stat().st_size for path in shards.glob("*.beton"))


def test_pages_are_near_each_other_and_every_sample_is_visited(tmp_path: Path) -> None:
    for i in range(70):
        tiny(tmp_path / f"{i:03}.beton", 3)
    with open_data(tmp_path) as data:
        pages = data.pages()
    assert [len(set(pages[i : i + 3])) for i in range(0, 210, 3)] == [1] * 70
    assert len(set(pages.tolist())) == 70
    with open_loader(tmp_path, order="page_local") as loader:
        order = loader.order.permutation(0)
        assert sorted(order.tolist()) == list(range(210))
        assert len(set((order[: 64 * 3] // 3).tolist())) == 64  # a window of 64 pages first
        assert (np.diff(order[:9] // 3) != 0).any()  # shuffled within it


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    tiny(tmp_path / "a.beton", 2, label=1, names=["ant", "bee"])
    tiny(tmp_path / "b.beton", 1, label=0, names=["bee", "cow"])
    tiny(tmp_path / "c.beton", 1, label=1, names=["bee", "cow"])
    tiny(tmp_path / "d.beton", 1, label=-1, names=[])
    info = describe(str(tmp_path))
    assert info.class_names == ("ant", "bee", "cow")
    assert info.labels.tolist() == [1, 1, 1, 2, -1]
    with open_data(tmp_path) as data:
        assert "matched by name" in data.sentence
    tiny(tmp_path / "e.beton", 1, label=0)
    with pytest.raises(DataError, match=r"e\.beton: its classes have no names, and those of .*a\.beton have"):
        describe(str(tmp_path))
    tiny(tmp_path / "e.beton", 1, label=0, names=["cow", "cow"])
    with pytest.raises(DataError, match=r"e\.beton: two of its classes have the same name: cow"):
        describe(str(tmp_path))
    tiny(tmp_path / "e.beton", 1, label=5, names=["cow"])
    with pytest.raises(DataError, match=r"e\.beton: has label 5, but names only 1 classes"):
        describe(str(tmp_path))


def test_files_of_ffcvs_own_writer_keep_their_numbers(tmp_path: Path) -> None:
    tiny(tmp_path / "a.beton", 1, label=2)
    tiny(tmp_path / "b.beton", 1, label=11)
    info = describe(str(tmp_path))
    assert info.labels.tolist() == [2, 11]
    assert info.class_names == tuple(map(str, range(12)))


# ---------------------------------------------------------------------------------------------------------------------
# Channels and depth


def two_channels(folder: Path, count: int, brightness: int) -> Path:
    """16 bits, from a stack of two pages each."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i + brightness).integers(0, brightness, (2, 12, 14)).astype(np.uint16)
        np.save(folder / f"{i}.npy", pixels.transpose(1, 2, 0))
    out = folder.with_suffix(".beton")
    prepare(folder, out, num_workers=1, options=SourceOptions(channels="keep", layout="flat", axes="hwc"))
    return out


def test_images_with_channels_of_their_own_are_split_merged_and_read(tmp_path: Path) -> None:
    whole = two_channels(tmp_path / "whole", 19, 40_000)
    shards, _ = split(whole, 4)
    assert describe(str(shards)).pixel_format == describe(str(whole)).pixel_format
    one, many = (views(source, count=4) for source in (whole, shards))
    assert one[0] == many[0]
    assert one[1].dtype == torch.uint16
    assert torch.equal(one[1], many[1])
    merge(tmp_path / "again.beton", [shards])
    assert (tmp_path / "again.beton").read_bytes() == whole.read_bytes()
    dark = two_channels(tmp_path / "dark", 5, 1000)
    both = merge(tmp_path / "both.beton", [whole, dark])
    expected = describe(str(two_channels_of(tmp_path / "all", whole, dark))).pixel_format
    for source in (both.path, source_text([str(whole), str(dark)])):
        found = describe(str(source)).pixel_format
        assert found.mean == pytest.approx(expected.mean, rel=1e-6)
        assert found.std == pytest.approx(expected.std, rel=1e-6)
    with pytest.raises(DataError, match=r"whole\.beton keeps the channels of its images, and .*rgb\.beton holds RGB"):
        describe(source_text([str(whole), str(tiny(tmp_path / "rgb.beton"))]))


def two_channels_of(folder: Path, *files: Path) -> Path:
    """All images of several, prepared together."""
    folder.mkdir()
    for file in files:
        for image in file.with_suffix("").iterdir():
            shutil.copy(image, folder / f"{file.stem}{image.name}")
    prepare(
        folder,
        folder.with_suffix(".beton"),
        num_workers=1,
        options=SourceOptions(channels="keep", layout="flat", axes="hwc"),
    )
    return folder.with_suffix(".beton")


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def test_the_fingerprint_is_of_contents_in_their_order(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a.beton", value=1, names=["x"]), tiny(tmp_path / "b.beton", value=9, names=["x"])

    def of(*paths: Path) -> str:
        return describe(source_text(map(str, paths))).content_fingerprint

    both = of(a, b)
    for path, name in ((a, "1.beton"), (b, "2.beton")):
        copy = tmp_path / "elsewhere" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
        shutil.copy(sidecar_path(path), sidecar_path(copy))
    assert describe(str(tmp_path / "elsewhere")).content_fingerprint == both  # where they lie makes no difference
    assert of(b, a) != both
    assert of(a) == describe(str(a)).content_fingerprint  # one file is itself, also in a list or a folder
    (tmp_path / "one").mkdir()
    merge(tmp_path / "one" / "merged.beton", [a, b])
    assert describe(str(tmp_path / "one")).content_fingerprint != both
    tiny(b, value=9, label=0, names=["y"])
    assert of(a, b) != both
    tiny(b, value=10, names=["x"])
    assert of(a, b) != both


def test_files_of_others_are_read_for_their_fingerprint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(3):
        path = tiny(tmp_path / "all" / f"{i}.beton", value=i)
        content = path.read_bytes()
        at = content.index(b"records sha256")
        path.write_bytes(content[:at] + bytes(80) + content[at + 80 :])
    first = describe(str(tmp_path / "all")).content_fingerprint
    shard_set._opened.clear()
    monkeypatch.setattr("simclr_dist.data.beton.content.read_records_digest", None)
    assert describe(str(tmp_path / "all")).content_fingerprint == first


# ---------------------------------------------------------------------------------------------------------------------
# Many, and broken ones


@needs_ffcv
def test_many_files_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        tiny(tmp_path / f"{i:03}.beton", 1, value=i % 200)
    monkeypatch.setattr(open_files, "_MOST", 16)
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    with open_loader(tmp_path, num_threads=2) as loader:
        for batch in itertools.islice(loader.batches(0), 40):
            assert (batch.views[0, :, 0, 0, 0] == batch.sample_ids % 200).all()
            most = max(most, len(os.listdir("/proc/self/fd")))
    assert most - before <= 16 + 4  # two threads, the listing itself, numba
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_what_was_read_before_is_not_read_again_until_a_file_changes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shards, tmp_path / "all")
    before = describe(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(shard_set, "_read_shard", None)
        assert describe(str(folder)).content_fingerprint == before.content_fingerprint
    tiny(sorted(folder.glob("*.beton"))[2], 9, names=["class0"])
    assert describe(str(folder)).num_samples == NUM_SAMPLES - 7 + 9


@needs_ffcv
def test_a_damaged_image_is_named_with_its_file(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(shards, tmp_path / "all")
    victim = sorted(folder.glob("*.beton"))[3]
    with open_beton(victim) as beton:
        jpegs = np.flatnonzero(beton.images["mode"] == 0)
        offset = int(beton.images["data_ptr"][jpegs[0]])
    with victim.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(64))
    with pytest.raises(DataError, match=rf"{victim}: sample {jpegs[0]}: its JPEG data cannot be decoded"):
        views(folder, count=9)
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(folder), "--verify"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert f"{victim}, sample {jpegs[0]} there: its JPEG data" in err
    assert f"{victim}: its pixels or labels have changed" in err
    assert f"{NUM_SHARDS} files" in out


@needs_ffcv
def test_a_file_that_is_replaced_while_it_is_used_is_no_silent_change(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shards, tmp_path / "all")
    monkeypatch.setattr(open_files, "_MOST", 1)
    victim = sorted(folder.glob("*.beton"))[1]
    with open_loader(folder) as loader:
        batches = loader.batches(0)
        next(batches)
        shutil.copy(victim, tmp_path / "copy")
        os.replace(tmp_path / "copy", victim)
        with pytest.raises(DataError, match=rf"{victim}: was changed or replaced while it was in use"):
            list(itertools.islice(batches, 9))


def test_a_file_that_is_not_whole_is_named(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "all")
    victim = sorted(folder.glob("*.beton"))[1]
    victim.write_bytes(victim.read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"{victim}: truncated"):
        describe(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_commands_take_shards(whole: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out

    one, many = run("inspect", str(whole)), run("inspect", str(shards))
    for key in ("images", "longer side", "classes"):
        rows = [next(line for line in text.splitlines() if line.startswith(key)) for text in (one, many)]
        assert rows[0] == rows[1]
    assert f"{NUM_SHARDS} .beton files, train-00000-of-00005.beton to train-00004-of-00005.beton" in many
    settings = (f"data.train={shards}/*.beton", "data.test=null", "evaluation.knn_every_epochs=null")
    planned = json.loads(run("plan", str(SMOKE), *settings, "train.global_batch_size=8", "--json"))
    assert planned["num_images"] == NUM_SAMPLES
    assert planned["data_bytes"] == sum(path.stat().st_size for path in shards.glob("*.beton"))
    doctor = run("doctor", str(shards))
    assert "taken: 37 images" in doctor


@pytest.mark.distributed
def test_a_training_on_shards_is_that_on_one_file_and_goes_on_where_shards_were_moved(tmp_path: Path) -> None:
    images = write_images(tmp_path / "train.beton")
    folder, _ = split(images, 7)
    knn = ("evaluation.knn_every_epochs=1", "evaluation.knn_k=5", "train.max_steps=12")
    one = Training(images, tmp_path, "one", f"data.test={folder}", *knn)
    assert one.wait() == [0], one.output
    begun = Training(folder, tmp_path, "many", f"data.test={folder}", *knn, "train.max_steps=5")
    assert begun.wait() == [0], begun.output
    moved = folder.rename(tmp_path / "moved")
    gone_on = Training(moved / "*.beton", tmp_path, "many", f"data.test={moved}", *knn)
    assert gone_on.wait() == [0], gone_on.output
    assert "resumes at step 5" in gone_on.output[0]
    assert gone_on.losses() == one.losses()
    assert gone_on.final_bytes() == one.final_bytes()
