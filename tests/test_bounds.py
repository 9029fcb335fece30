"""Whatever others may have written has a limit, and the message says it: depth, declared sizes, aliases, links."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from launcher.errors import LaunchError
from launcher.sweep import read_points
from simclr_dist.bounded_json import MOST_DEPTH, parse_json, read_json
from simclr_dist.checkpoint.files import read_checkpoint, read_facts
from simclr_dist.config import load_config, load_section
from simclr_dist.config.bounded_yaml import read_yaml
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton import out_file
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import open_beton, sidecar_path
from simclr_dist.data.loading.open_images import describe, open_images
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.data.sources import compressed, members
from simclr_dist.data.sources.open import open_source
from simclr_dist.errors import CheckpointError, ConfigError, DataError, UserError
from simclr_dist.evaluation.cache import read_features
from simclr_dist.evaluation.embeddings_file import load_embeddings
from simclr_dist.few_labels.classifier import load_classifier
from simclr_dist.few_labels.recipe import Recipe
from simclr_dist.few_labels.subsets import load_subset
from simclr_dist.report.record import read_run
from simclr_dist.run.layout import RunDir, append_record, read_record, read_records
from simclr_dist.run.status import read_status
from tests.images import make_folder
from tests.test_data_account import add_member, write_tar
from tests.test_data_beton import NUM_SAMPLES, Editor, jpeg_sample, raw_sample, whole  # noqa: F401
from tests.tiff_files import tiff_bytes

DEEP = {
    "lists": "[" * 5000 + "]" * 5000,
    "objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "never closed": "[" * 20_000,
    "just too deep": "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
}
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


# ---------------------------------------------------------------------------------------------------------------------
# JSON and YAML


def test_json_within_the_bounds_is_what_it_says() -> None:
    for value in ([], {"a": ["[" * 500, '"[', "\\"]}, "[[[[", 1.5, None, [[[]]] * 1000):
        assert parse_json(json.dumps(value)) == value
        assert parse_json(json.dumps(value).encode()) == value
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH) is not None


@pytest.mark.parametrize("text", [*DEEP.values(), '"' + "[" * 100, '"\\' * 200_000, "", "\udcff", "9" * 5000, "nul"])
def test_other_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{5,200}$"):
        parse_json(text)


def test_a_json_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps("x" * 1000))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_json(tmp_path / "long.json", most_bytes=1000)
    assert len(read_json(tmp_path / "long.json", most_bytes=1002)) == 1000
    with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
        read_json(Path("/dev/zero"))


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deep_json_is_damage_like_any_other(text: str, tmp_path: Path, whole: Path) -> None:  # noqa: F811
    file = tmp_path / "any.json"
    file.write_text(text)
    for name in ("MANIFEST.json", "state.json"):
        (tmp_path / name).write_text(text)
    beton = tmp_path / "any.beton"
    beton.write_bytes(whole.read_bytes())
    sidecar_path(beton).write_text(text)
    header = json.dumps({"__metadata__": {"class_names": text, "start": "head", "config": text}}).encode()
    (tmp_path / "classifier.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    readers: list[tuple[type[UserError], Callable[[], Any]]] = [
        (CheckpointError, lambda: read_checkpoint(tmp_path)),
        (CheckpointError, lambda: read_facts(tmp_path)),
        (CheckpointError, lambda: load_classifier(tmp_path / "classifier.safetensors")),
        (DataError, lambda: read_features(tmp_path.parent, tmp_path.name)),
        (DataError, lambda: load_subset(file, describe(str(whole)))),
        (DataError, lambda: open_beton(beton)),
        (DataError, lambda: out_file.choose_target(beton, "elsewhere", overwrite=True)),
    ]
    for kind, read in readers:
        with pytest.raises(kind) as refused:
            read()
        assert len(str(refused.value)) < 1000
    assert read_record(file) is None
    run = RunDir(tmp_path)
    run.status.write_text(text)
    assert read_status(tmp_path) is None
    run.log.write_text(f"{text}\n")
    append_record(run.log, {"step": 1})
    assert read_records(run.log) == [{"step": 1}]


YAML_BOMBS = {
    "a billion": BOMB,
    "merged": "a: &a {b: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join(['*a'] * 99)}]}}\n" for i in range(200)),
    "of itself": "grid: &a {x: *a}\n",
    "deep": "grid: " + "[" * 300 + "]" * 300,
    "deep blocks": "- " * 5000,
    "long": "# " + "x" * (2 << 20),
    "one long value": "grid: " + "1:1" * 40_000,
}


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_that_would_never_end_is_refused_by_every_reader(text: str, tmp_path: Path) -> None:
    path = RunDir(tmp_path).config
    path.write_text(text)
    for kind, read in (
        (ConfigError, lambda: load_config(path, check_data=False)),
        (ConfigError, lambda: load_section(path, Recipe)),
        (ConfigError, lambda: read_run(tmp_path)),
        (LaunchError, lambda: read_points(path)),
    ):
        with pytest.raises(kind, match=r"holds|longer than") as refused:
            read()
        assert len(str(refused.value)) < 1000


def test_a_file_of_very_many_values_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("grid: [" + "1," * 500_000 + "]")
    with pytest.raises(yaml.YAMLError, match="more than 10,000 values"):
        read_yaml(tmp_path / "many.yaml")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a [1, 2]\nb: {c: *a, d: *a}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": [1, 2], "b": {"c": [1, 2], "d": [1, 2]}}


def test_a_grid_of_too_many_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("grid:\n" + "".join(f"  k{i}: [1, 2, 3, 4]\n" for i in range(20)))
    with pytest.raises(LaunchError, match="means 1,099,511,627,776 runs; at most 10,000"):
        read_points(tmp_path / "grid.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes that headers declare


def jpeg_of(width: int, height: int) -> bytes:
    """A small file whose header says that it is large."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    small = content.getvalue()
    frame = small.index(b"\xff\xc0")
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


def png_of(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (16, 16)).save(content, "PNG")
    small = content.getvalue()
    head = small[12:16] + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + head + struct.pack(">I", __import__("zlib").crc32(head)) + small[33:]


LARGE = {"jpg": jpeg_of(60_000, 60_000), "png": png_of(100_000, 100_000), "ppm": b"P6 100000 100000 255\n" + b"\0" * 99}


@pytest.mark.parametrize("suffix", LARGE)
def test_a_header_that_declares_too_many_pixels_is_refused_at_every_door(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / f"0.{suffix}").write_bytes(LARGE[suffix])
    packed = write_tar(tmp_path / "packed.tar", {f"a/0.{suffix}": LARGE[suffix]})
    out = np.empty((1, 1, 8, 8, 3), np.uint8)
    for source in (folder, packed):
        images = open_images(str(source), "auto")  # of training, embed, neighbours and finetune
        for read in (
            lambda images=images: images.fill(np.array([0]), lambda h, w: np.zeros((1, 1, 5), np.int32), out),
            lambda source=source: open_source(source).read(0),
            lambda source=source: prepare(source, tmp_path / "out.beton", num_workers=1),
        ):
            with pytest.raises(DataError, match=r"are more than 536870912: say --max-pixels .* SIMCLR_MAX_PIXELS="):
                read()


def test_the_limit_can_be_set_for_all_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "in", 3)
    prepare(tmp_path / "in", tmp_path / "in.beton", num_workers=1)
    monkeypatch.setenv("SIMCLR_MAX_PIXELS", "3071")
    for read in (lambda: open_source(tmp_path / "in").read(0), lambda: open_beton(tmp_path / "in.beton")):
        with pytest.raises(DataError, match=r"are more than 3071.* set SIMCLR_MAX_PIXELS=\d+"):
            read()
    assert open_source(tmp_path / "in", SourceOptions(max_pixels=10_000)).read(0).shape == (48, 64, 3)
    monkeypatch.setenv("SIMCLR_MAX_PIXELS", "10000")
    open_beton(tmp_path / "in.beton").close()
    for wrong in ("0", "-1", "many", "1e6"):
        monkeypatch.setenv("SIMCLR_MAX_PIXELS", wrong)
        with pytest.raises(DataError, match=f"SIMCLR_MAX_PIXELS is '{wrong}'; expected a number"):
            open_source(tmp_path / "in").read(0)


def test_a_record_of_another_size_than_its_table_says_is_not_decoded(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    edit = Editor(whole.read_bytes())
    sample = jpeg_sample(edit)
    path = tmp_path / "edited.beton"
    begin = int(edit.metadata["f0"]["data_ptr"][sample])
    room = int(edit.table["size"][edit.table["ptr"] == begin][0])
    height, width = (int(edit.metadata["f0"][name][sample]) for name in ("height", "width"))
    assert BetonSource(whole).read(sample).shape == (height, width, 3)
    frame = edit.content[begin : begin + room].tobytes().index(b"\xff\xc0")
    for declared in ((13_000, 13_000), (height + 1, width), (width, height + 16)):
        edit.content[begin + frame + 5 :][:4] = np.frombuffer(struct.pack(">HH", *declared), np.uint8)
        path.write_bytes(edit.content.tobytes())
        with pytest.raises(DataError, match=f"sample {sample}: its JPEG data are"):
            BetonSource(path).read(sample)


def test_a_beton_file_that_declares_more_than_it_holds_is_refused(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "edited.beton"

    def image(edit: Editor, **values: int) -> None:
        for name, value in values.items():
            edit.metadata["f0"][name][jpeg_sample(edit)] = value

    for change, what in (
        (lambda edit: image(edit, width=65535, height=65535), "are more than 536870912"),
        (lambda edit: edit.metadata["f1"].__setitem__(0, 1 << 40), "has label 1099511627776"),
        (lambda edit: edit.metadata["f1"].__setitem__(0, 1 << 21), "has label 2097152"),
        (lambda edit: edit.header["num_samples"].__setitem__(0, 1 << 40), "truncated"),
        (lambda edit: edit.header["num_samples"].__setitem__(0, (1 << 64) - 1), "truncated"),
        (lambda edit: edit.header["num_fields"].__setitem__(0, 65535), "truncated"),
        (lambda edit: edit.header["alloc_table_ptr"].__setitem__(0, 1 << 63), "truncated"),
        (lambda edit: edit.table["size"].__setitem__(NUM_SAMPLES - 1, 1 << 62), "points outside"),
        (lambda edit: image(edit, data_ptr=1 << 62), "is not in the allocation table"),
    ):
        edit = Editor(whole.read_bytes())
        change(edit)
        path.write_bytes(edit.content.tobytes())
        with pytest.raises(DataError, match=what):
            open_beton(path)
    assert raw_sample(Editor(whole.read_bytes())) >= 0


def test_tiff_tiles_and_tables_are_no_larger_than_their_image(tmp_path: Path) -> None:
    samples = np.zeros((1000, 1, 1), np.uint16)
    wide = bytearray(tiff_bytes(samples, tile=16))
    path = tmp_path / "0.tif"
    place = wide.index(struct.pack("<HHI", 322, 4, 1)) + 8
    wide[place : place + 4] = struct.pack("<I", 65536)
    path.write_bytes(wide)
    with pytest.raises(DataError, match=r"0\.tif"):
        open_source(tmp_path).read(0)
    # 2,000 tables of tags, all with one list of a million offsets.
    numbers = struct.pack("<I", 8 + 4_000_000) + b"\0" * 4_000_000
    tables = b"".join(
        struct.pack("<HHHIII", 1, 273, 4, 1_000_000, 8, 8 + 4_000_000 + 18 * (i + 1)) for i in range(2000)
    )
    path.write_bytes(b"II*\0" + numbers + tables)
    with pytest.raises(DataError, match=r"0\.tif"):
        open_source(tmp_path).read(0)


def test_no_program_is_started_for_an_image(tmp_path: Path) -> None:
    """Pillow gives what begins like PostScript to Ghostscript, whatever the file is called."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name, content in (
        ("0.jpg", page),
        ("1.png", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(page)) + b"\0" * 18 + page),
    ):
        (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path)
    for i in range(2):
        with pytest.raises(DataError, match="no image that Pillow knows"):
            source.read(i)


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def test_compressed_archives_expand_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_MOST_EXPANDED", 1 << 20)
    for mode in ("gz", "xz", "bz2"):
        path = write_tar(tmp_path / f"bomb.tar.{mode}", {"a/0.png": b"\0" * (4 << 20)}, f"w:{mode}")
        with pytest.raises(DataError, match="expands to more than 1,048,576 bytes, 100 times its size; if that is"):
            open_source(path)
    random = np.random.default_rng(0).bytes(2 << 20)
    content = (Path(tmp_path / "a.png"), Image.new("RGB", (4, 4)).save(tmp_path / "a.png"))[0].read_bytes()
    path = write_tar(tmp_path / "usual.tar.gz", {"a/0.png": content, "a/1.png": random}, "w:gz")
    assert len(open_source(path).labels) == 2


def test_links_inside_an_archive_give_no_more_than_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level names the archive inside it ten times: 10**7 archives of one."""
    content = write_tar(tmp_path / "0.tar", {"a/0.png": b"", "a/1.png": b""}).read_bytes()
    for level in range(1, 8):
        path = tmp_path / f"{level}.tar"
        with tarfile.open(path, "w") as archive:
            add_member(archive, "t0.tar", content)
            for i in range(1, 10):
                add_member(archive, f"t{i}.tar", type=tarfile.LNKTYPE, linkname="t0.tar")
        content = path.read_bytes()
    with pytest.raises(DataError, match="links name the same archives inside it again and again; unpack it"):
        open_source(path)
    monkeypatch.setattr(members, "_MOST_BY_LINKS", 10_000)
    with tarfile.open(tmp_path / "square.tar", "w") as archive:
        for i in range(200):
            add_member(archive, f"a/{i}.png")
            add_member(archive, f"link{i}", type=tarfile.SYMTYPE, linkname="a")
    with pytest.raises(DataError, match="its links to folders give more than 10,000 files; unpack it"):
        open_source(tmp_path / "square.tar")


def test_headers_that_never_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 512
    path.write_bytes((long.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 2000 + b"\0" * 1024)
    with pytest.raises(DataError, match="is not a complete tar archive"):
        open_source(path)
    back = bytearray(tarfile.TarInfo("a/0.png").tobuf(tarfile.GNU_FORMAT))
    back[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512: the next header is this one
    back[148:156] = b" " * 8
    back[148:156] = f"{sum(back):06o}\0 ".encode()
    path.write_bytes(bytes(back) + b"\0" * 10240)
    with pytest.raises(DataError, match="has a size of -512"):
        open_source(path)
    with tarfile.open(path, "w") as archive:
        add_member(archive, "a/0.png")
        add_member(archive, "x/" * 30_000 + "1.png")
    source = open_source(path)
    assert len(source.labels) == 1
    assert source.account.left_out[0].reason == "more than 64 folders deep"


def test_embeddings_that_expand_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("h.npy", b"\0" * (32 << 20))
    with pytest.raises(DataError, match="expands to more than 100 times its size"):
        load_embeddings(path)


def test_lists_and_labels_are_refused_in_words(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 2)
    for content in (b"name,label\n" + b"x" * 200_000 + b",1\n", b'name,label\n"' + b"y" * 200_000):
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(DataError, match=r"labels\.csv, line \d+: "):
            open_source(tmp_path / "in", SourceOptions(labels=str(tmp_path / "labels.csv")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_source(tmp_path / "in").labels) == 2


def test_a_name_without_end_is_not_shown_without_end(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 2)
    name = "z" * 100_000
    (tmp_path / "labels.csv").write_text(f"{name}\nx\n")
    with pytest.raises(DataError) as error:
        open_source(tmp_path / "in", SourceOptions(labels=str(tmp_path / "labels.csv")))
    said = str(error.value)
    assert len(said) < 11_000
    assert said.startswith(f"{tmp_path / 'labels.csv'}: begins with `zzz")
    assert said.endswith("zzz`; expected the header `name,label`, or columns called so")
    assert "letters are left out" in said
    assert str(ConfigError([name])).count("z") < 11_000
    assert str(DataError("x" * 10_000)) == "x" * 10_000
