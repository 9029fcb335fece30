"""Archives, WebDatasets, parquet and tables: each is read as the folder of the same images, or says what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from PIL import Image

from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.sources import compressed, parquet
from simclr_dist.data.sources.images import ImageSource
from simclr_dist.data.sources.open import open_source, size_on_disk
from simclr_dist.data.sources.shards import braces
from simclr_dist.doctor.data import examine_source
from simclr_dist.errors import DataError
from simclr_dist.source_text import missing
from tests.images import make_folder, make_image

NUM_IMAGES = 40


def png(i: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(i, 24, 32)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "in"
    make_folder(root, NUM_IMAGES, ".jpg")
    return root


@pytest.fixture(scope="module")
def bytes_of_folder(folder: Path) -> bytes:
    return beton_of(folder, folder.parent / "folder.beton")


def beton_of(source: str | Path, out: Path, **options: Any) -> bytes:
    prepare(source, out, num_workers=1, **options)
    return out.read_bytes()


def files_of(folder: Path) -> list[tuple[str, str, bytes]]:
    """(name, class, content), in the order of a folder."""
    return [(str(p.relative_to(folder)), p.parent.name, p.read_bytes()) for p in sorted(folder.rglob("*.jpg"))]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def hugging_face(**features: dict) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


IMAGE = {"_type": "Image"}
CLASSES = {"_type": "ClassLabel", "names": ["class0", "class1", "class2"]}


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, rows: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def hf_columns(files: list[tuple[str, str, bytes]]) -> dict[str, Any]:
    images = [{"bytes": content, "path": Path(name).name} for name, _, content in files]
    return {"image": images, "label": [int(label[-1]) for _, label, _ in files]}


def names(source: ImageSource) -> list[str]:
    return [source.name(i) for i in range(len(source.labels))]


def classes(source: ImageSource) -> list[str | None]:
    return [None if label < 0 else source.class_names[label] for label in source.labels.tolist()]


def left_out(source: ImageSource) -> dict[str, int]:
    return {group.reason: group.count for group in source.account.left_out}


# ---------------------------------------------------------------------------------------------------------------------
# The same file from each


def as_zip(folder: Path, at: Path) -> str:
    return str(write_zip(at / "in.zip", [(name, content) for name, _, content in files_of(folder)]))


def as_stored_zip(folder: Path, at: Path) -> str:
    files = [(f"top/{name}", content) for name, _, content in files_of(folder)]
    return str(write_zip(at / "in.zip", reversed(files), zipfile.ZIP_STORED))


def as_zst(folder: Path, at: Path) -> str:
    plain = write_tar(at / "plain", [(name, content) for name, _, content in files_of(folder)]).read_bytes()
    half = len(plain) // 2  # two frames, as tools write that compress with several threads
    (at / "in.tar.zst").write_bytes(zstd.compress(plain[:half]) + zstd.compress(plain[half:]))
    return str(at / "in.tar.zst")


def as_webdataset(folder: Path, at: Path) -> str:
    members = []
    for i, (_, label, content) in enumerate(files_of(folder)):
        members += [(f"{i:06d}.jpg", content), (f"{i:06d}.cls", label.encode()), (f"{i:06d}.json", b'{"id": 3}')]
    return str(write_tar(at / "000000.tar", members))


def as_shards(folder: Path, at: Path) -> str:
    files = files_of(folder)
    for shard in range(4):
        members = []
        for i in range(shard * 10, shard * 10 + 10):
            members += [(f"{i:06d}.jpg", files[i][2]), (f"{i:06d}.cls", files[i][1].encode())]
        write_tar(at / f"set-{shard:03d}.tar", members)
    return str(at / "set-{000..003}.tar")


def as_folder_of_shards(folder: Path, at: Path) -> str:
    (at / "x").mkdir()
    as_shards(folder, at / "x")
    (at / "x" / "README.md").write_text("what this is")
    return str(at / "x")


def as_zipped_shards(folder: Path, at: Path) -> str:
    files = files_of(folder)
    for shard in range(2):
        part = files[shard * 20 : shard * 20 + 20]
        write_zip(at / f"{shard}.zip", [(name, content) for name, _, content in part])
    return str(at / "*.zip")


def as_parquet(folder: Path, at: Path) -> str:
    return str(write_parquet(at / "x.parquet", hf_columns(files_of(folder)), hugging_face(image=IMAGE, label=CLASSES)))


def as_plain_parquet(folder: Path, at: Path) -> str:
    files = files_of(folder)
    columns = {"img": [content for *_, content in files], "class_name": [label for _, label, _ in files]}
    return str(write_parquet(at / "x.parquet", columns, rows=1000))


def as_hub_folder(folder: Path, at: Path) -> str:
    files, metadata = files_of(folder), hugging_face(image=IMAGE, label=CLASSES)
    for part in range(2):
        path = at / "set" / "data" / f"train-{part:05d}-of-00002.parquet"
        write_parquet(path, hf_columns(files[part * 20 : part * 20 + 20]), metadata)
    (at / "set" / "README.md").write_text("a data set")
    return str(at / "set")


def as_csv(folder: Path, at: Path) -> str:
    shutil.copytree(folder, at / "images")
    rows = [f"images/{name},{label}" for name, label, _ in files_of(folder)]
    (at / "list.csv").write_text("path,label\n" + "\n".join(reversed(rows)) + "\n")
    return str(at / "list.csv")


def as_tsv(folder: Path, at: Path) -> str:
    rows = [f"{label}\t{folder / name}\t7" for name, label, _ in files_of(folder)]
    (at / "list.tsv").write_text("label\tfilename\tsize\n" + "\n".join(rows))
    return str(at / "list.tsv")


KINDS = [
    *(as_zip, as_stored_zip, as_zst, as_webdataset, as_shards, as_folder_of_shards, as_zipped_shards),
    *(as_parquet, as_plain_parquet, as_hub_folder, as_csv, as_tsv),
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__[3:])
def test_each_gives_the_file_of_its_folder(
    make: Callable[[Path, Path], str], folder: Path, bytes_of_folder: bytes, tmp_path: Path
) -> None:
    source = make(folder, tmp_path)
    info = prepare(source, tmp_path / "out.beton", num_workers=1)
    assert info.class_names == ("class0", "class1", "class2")
    assert info.account.source == source
    assert info.account.taken == NUM_IMAGES
    assert (tmp_path / "out.beton").read_bytes() == bytes_of_folder
    opened = open_source(source)
    assert len(set(names(opened))) == NUM_IMAGES
    assert len(opened.fingerprint) == len(opened.content_fingerprint) == 32
    assert size_on_disk(source) > 0


@pytest.mark.parametrize("make", [as_zip, as_parquet, as_shards], ids=lambda make: make.__name__[3:])
def test_the_same_with_workers_and_with_a_part_of_the_images(make: Callable[[Path, Path], str], tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 70, ".jpg")
    at = tmp_path / "at"
    at.mkdir()
    source = make(tmp_path / "in", at)
    prepare(source, tmp_path / "a.beton", num_workers=2)
    assert (tmp_path / "a.beton").read_bytes() == beton_of(source, tmp_path / "b.beton")
    listed = [name.removeprefix(open_source(source).root) for name in names(open_source(source))][5:9]  # type: ignore[attr-defined]
    (tmp_path / "list").write_text("\n".join(listed))
    part = open_source(source, SourceOptions(files=str(tmp_path / "list")))
    whole = open_source(source)
    assert [part.read(i).tobytes() for i in range(4)] == [whole.read(i).tobytes() for i in range(5, 9)]
    assert part.labels.tolist() == whole.labels[5:9].tolist()


@pytest.mark.parametrize("make", [as_shards, as_hub_folder, as_zip, as_csv], ids=lambda make: make.__name__[3:])
def test_trainings_evaluations_and_the_doctor_read_the_same(
    make: Callable[[Path, Path], str], folder: Path, tmp_path: Path
) -> None:
    source = make(folder, tmp_path)
    assert missing(source) is None  # as a configuration asks
    info, of_folder = describe(source), describe(str(folder))
    assert info.labels.tolist() == of_folder.labels.tolist()
    assert info.class_names == of_folder.class_names
    (views, labels, _), (of_files, _, _) = (next(load_images(s, 32, batch_size=9)) for s in (source, str(folder)))
    assert views.equal(of_files)
    assert labels.tolist() == of_folder.labels[:9].tolist()
    findings = list(examine_source(source, SourceOptions()))
    assert "taken: 40 images" in [finding.found for finding in findings]
    assert not any(finding.level == "problem" for finding in findings)


# ---------------------------------------------------------------------------------------------------------------------
# Cut off, damaged, made to harm


def cut_places(size: int, seed: int) -> list[int]:
    return sorted({random.Random(seed).randrange(size) for _ in range(36)} | {0, 1, size // 2, size - 1})


@pytest.mark.parametrize("make", [as_zip, as_zst, as_parquet], ids=lambda make: make.__name__[3:])
def test_what_is_cut_off_is_refused_wherever_it_was_cut(
    make: Callable[[Path, Path], str], folder: Path, tmp_path: Path
) -> None:
    path = Path(make(folder, tmp_path))
    whole = path.read_bytes()
    for at in cut_places(len(whole), seed=3):
        path.write_bytes(whole[:at])
        with pytest.raises(DataError, match=rf"{path.name}: .*"):
            open_source(path)
    path.write_bytes(whole)
    assert len(open_source(path).labels) == NUM_IMAGES


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress, bz2.compress, zstd.compress])
def test_a_compressed_tar_that_lacks_only_its_last_byte_is_refused(packed: Callable, tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "plain", [("a/0.png", png())]).read_bytes()
    path = tmp_path / "in.tar"
    path.write_bytes(packed(plain)[:-1])
    with pytest.raises(DataError, match=r"in\.tar: cannot be decompressed, it is cut off or damaged"):
        open_source(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_inside_a_zip_is_of_the_image_that_it_hits(method: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", [(f"a/{i}.png", png(i)) for i in range(3)], method)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        second = archive.infolist()[1]
    middle = second.header_offset + 30 + len(second.filename) + second.compress_size // 2
    content[middle] ^= 0x55
    path.write_bytes(content)
    source = open_source(path)
    assert source.read(0).shape == source.read(2).shape == (24, 32, 3)
    with pytest.raises(DataError, match=r"in\.zip/a/1\.png: its bytes in the zip archive are damaged"):
        source.read(1)


def test_members_of_a_zip_are_taken_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:

        def add(name: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> None:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)

        add("a/0.png", png(0))
        add("../../b/1.png", png(1))
        add("/c/2.png", png(2))
        add("c/soft.png", b"../a/0.png", stat.S_IFLNK)
        add("c/gone.png", b"/etc/passwd", stat.S_IFLNK)
        add("linked", b"a", stat.S_IFLNK)
        add("c/pipe.png", b"", stat.S_IFIFO)
        add("__MACOSX/a/._0.png")
        add("c/inner.zip")
        add("empty/", b"", stat.S_IFDIR)
    content = bytearray(path.read_bytes())
    source = open_source(path)
    assert [name.removeprefix(f"{path}/") for name in names(source)] == [
        "a/0.png", "b/1.png", "c/2.png", "c/soft.png", "linked/0.png",
    ]  # fmt: skip
    assert np.array_equal(source.read(0), source.read(3))
    assert left_out(source) == {
        "link to nothing inside the archive": 1,
        "not an ordinary file": 1,
        "hidden folder, or one that a program made for itself": 1,
        "an archive, which is not unpacked (.zip)": 1,
        "folder without images": 1,
    }
    assert not list(tmp_path.parent.glob("b"))
    first = content.index(b"PK\1\2")
    content[first + 8] |= 1  # encrypted
    second = content.index(b"PK\1\2", first + 4)
    content[second + 10] = 99  # a method that nobody knows
    path.write_bytes(content)
    found = left_out(open_source(path))
    assert found["encrypted"] == found["compressed in a way that is not read here (99)"] == 1


@pytest.mark.parametrize(
    ("name", "system", "expected"),
    [
        ("cat\\1.png", 0, "cat/1.png"),
        ("cat\\1.png", 3, "cat\\1.png"),
        ("käse/ö.png", 3, "käse/ö.png"),
        ("a/b.png", 0, "a/b.png"),
    ],
)
def test_names_in_a_zip_are_those_that_its_writer_meant(name: str, system: int, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("x" * len(name.encode()))
        info.create_system = system
        archive.writestr(info, png())
    # As macOS writes them: UTF-8 without the flag that says so.
    path.write_bytes(path.read_bytes().replace(b"x" * len(name.encode()), name.encode()))
    assert names(open_source(path)) == [f"{path}/{expected}"]


def test_archives_that_expand_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_MOST_EXPANDED", 1 << 20)
    zeros = b"\0" * (4 << 20)
    one = write_zip(tmp_path / "one.zip", [("a/0.png", zeros)])
    many = write_zip(tmp_path / "many.zip", [(f"a/{i}.png", zeros[: 1 << 18]) for i in range(30)])
    packed = tmp_path / "in.tar.zst"
    packed.write_bytes(zstd.compress(write_tar(tmp_path / "plain", [("a/0.png", zeros)]).read_bytes()))
    lying = tmp_path / "lying.zip"  # declares less than it holds
    lying.write_bytes(one.read_bytes().replace(struct.pack("<L", len(zeros)), struct.pack("<L", 99)))
    for path in (one, many, packed):
        with pytest.raises(DataError, match=rf"{path.name}: expands to more than 1,0[0-9,]+ bytes"):
            open_source(path)
    with pytest.raises(DataError, match=r"lying\.zip/a/0\.png: "):
        open_source(lying).read(0)


def test_a_zstd_frame_that_asks_for_gigabytes_of_memory_is_refused(tmp_path: Path) -> None:
    for log in (28, 31, 34, 40):
        window = bytes([(log - 10) << 3])
        (tmp_path / "in.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + window + bytes(20))
        with pytest.raises(DataError, match=r"in\.tar\.zst: cannot be decompressed"):
            open_source(tmp_path / "in.tar.zst")


def test_without_its_package_a_format_says_which_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.tar.zst").write_bytes(zstd.compress(b"x"))
    (tmp_path / "in.parquet").write_bytes(b"x")
    for module in ("backports.zstd", "compression.zstd", "pyarrow.parquet", "pyarrow"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=r"in\.tar\.zst: is compressed with zstd, .* pip install backports\.zstd"):
        open_source(tmp_path / "in.tar.zst")
    with pytest.raises(DataError, match=r"in\.parquet: parquet needs a package: pip install pyarrow"):
        open_source(tmp_path / "in.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# WebDatasets


def samples(*members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [(f"{i:03d}.{key}", content) for i, sample in enumerate(members) for key, content in sample.items()]


class TestWebDatasets:
    @pytest.mark.parametrize(
        ("sample", "options", "expected"),
        [
            ({"png": b"", "cls": b"7\n"}, {}, "7"),
            ({"png": b"", "cls": b"tabby cat"}, {}, "tabby cat"),
            ({"png": b"", "cls": b"7", "json": b'{"label": 1}', "txt": b"a cat"}, {}, "7"),
            ({"png": b"", "json": b'{"label": 7, "width": 3}'}, {}, "7"),
            ({"png": b"", "json": b'{"meta": {"name": "cat"}}'}, {"label_key": "json.meta.name"}, "cat"),
            ({"png": b"", "json": b'{"label": 7, "category": "cat"}'}, {"label_key": "json.category"}, "cat"),
            ({"png": b"", "txt": b"cat\n"}, {"label_key": "txt"}, "cat"),
            ({"png": b"", "species": b"cat"}, {"label_key": "species"}, "cat"),
            ({"png": b"", "cls": b"-1"}, {}, None),
            ({"png": b"", "cls": b"7"}, {"layout": "flat"}, None),
            ({"png": b"", "json": b'{"width": 3}'}, {}, None),
            ({"png": b"", "txt": b"a photo of a cat"}, {"layout": "flat"}, None),
        ],
    )
    def test_a_class_is_read_from_where_it_stands(
        self, sample: dict[str, bytes], options: dict, expected: str | None, tmp_path: Path
    ) -> None:
        members = samples(*[{key: content or png(i) for key, content in sample.items()} for i in range(2)])
        for path in (write_tar(tmp_path / "in.tar", members), write_zip(tmp_path / "in.zip", members)):
            assert classes(open_source(path, SourceOptions(**options))) == [expected] * 2

    @pytest.mark.parametrize(
        ("sample", "question"),
        [
            ({"png": b"", "txt": b"cat"}, r"\.txt beside the images(.|\n)*--label-key txt(.|\n)*--layout flat"),
            ({"png": b"", "json": b'{"label": 1, "class_name": "x"}'}, r"--label-key json\.label\n.*json\.class_name"),
            ({"png": b"", "json": b'{"label": 1}', "txt": b"x"}, r"--label-key json\.label\n.*--label-key txt"),
            (
                {"left.png": b"", "right.png": b"", "cls": b"1"},
                r"2 samples have several images(.|\n)*--image-key left\.png",
            ),
            ({"jpg": b"", "png": b"", "cls": b"1"}, r"several images \(jpg, png\), such as 000;(.|\n)*--image-key"),
        ],
    )
    def test_where_two_readings_are_possible_it_is_asked(
        self, sample: dict[str, bytes], question: str, tmp_path: Path
    ) -> None:
        members = samples(*[{key: content or png(i) for key, content in sample.items()} for i in range(2)])
        with pytest.raises(DataError, match=question):
            open_source(write_tar(tmp_path / "in.tar", members))

    def test_folders_and_cls_both_are_a_question(self, tmp_path: Path) -> None:
        files = [
            (f"{label}/{i}.{key}", c) for i, label in enumerate("ab") for key, c in (("png", png(i)), ("cls", b"7"))
        ]
        path = write_tar(tmp_path / "in.tar", files)
        with pytest.raises(DataError, match=r"--label-key cls\n.*--layout classes"):
            open_source(path)
        assert classes(open_source(path, SourceOptions(label_key="cls"))) == ["7", "7"]
        assert classes(open_source(path, SourceOptions(layout="classes"))) == ["a", "b"]

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("left.png", ["000.left.png"]),
            ("jpg", ["000.jpg"]),
            ("seg.png", ["000.seg.png"]),
            ("jpg,right.png", ["000.jpg", "000.right.png"]),
        ],
    )
    def test_the_image_is_the_member_that_was_asked_for(self, key: str, expected: list[str], tmp_path: Path) -> None:
        sample = {"left.png": png(0), "right.png": png(1), "seg.png": png(2), "jpg": png(3), "cls": b"1"}
        path = write_tar(tmp_path / "in.tar", samples(sample))
        source = open_source(path, SourceOptions(image_key=key))
        assert names(source) == [f"{path}/{name}" for name in expected]
        assert set(classes(source)) == {"1"}
        assert left_out(source) == {f"not the image asked for (--image-key {key})": 4 - len(expected)}
        with pytest.raises(DataError, match=r"no image has the key gif; there are jpg, left\.png"):
            open_source(path, SourceOptions(image_key="gif"))

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"x" * 300, b"a\nb"])
    def test_what_is_no_class_is_refused_by_name(self, content: bytes, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "in.tar", samples({"png": png(0), "cls": b"1"}, {"png": png(1), "cls": content}))
        if not content:
            assert classes(open_source(path)) == ["1", None]
            return
        with pytest.raises(DataError, match=r"in\.tar/001\.cls: .*--layout flat takes the images without classes"):
            open_source(path)

    @pytest.mark.parametrize("content", [b"{", b"[" * 100, b'{"label": [1, 2]}', b'{"label": 1.5}'])
    def test_json_that_says_no_class_is_refused_by_name(self, content: bytes, tmp_path: Path) -> None:
        sample = {"png": png(0), "json": b'{"label": 1}'}
        path = write_tar(tmp_path / "in.tar", samples(sample, sample | {"json": content}))
        with pytest.raises(DataError, match=r"in\.tar/001\.json: "):
            open_source(path)

    def test_samples_without_a_class_are_noted_and_numbers_are_in_their_order(self, tmp_path: Path) -> None:
        members = [{"png": png(i), "cls": str(i).encode()} for i in range(12)]
        path = write_tar(tmp_path / "in.tar", samples(*members, {"png": png(12)}))
        source = open_source(path)
        assert source.class_names == tuple(map(str, range(12)))
        assert source.labels.tolist() == [*range(12), -1]
        assert [(note.reason, note.names) for note in source.account.notes] == [
            ("no label under .cls, taken without one", ("012.png",))
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Many files


class TestShards:
    def test_splits_are_folders_or_begin_the_names(self, tmp_path: Path) -> None:
        for name, count in (("train-000", 3), ("train-001", 2), ("val-000", 1)):
            write_tar(tmp_path / f"{name}.tar", samples(*[{"png": png(i), "cls": b"1"} for i in range(count)]))
        with pytest.raises(DataError, match="has the splits train, val; say which with --split"):
            open_source(tmp_path)
        assert [len(open_source(tmp_path, split).labels) for split in ("train", "val")] == [5, 1]
        assert len(open_source(str(tmp_path / "train-*.tar")).labels) == 5
        with pytest.raises(DataError, match="has the splits train, val"):
            open_source(str(tmp_path / "{train,val}-000.tar"))

    def test_archives_of_one_class_each_are_a_question(self, tmp_path: Path) -> None:
        for name in ("n01", "n02"):
            write_tar(tmp_path / f"{name}.tar", [(f"{name}_{i}.png", png(i)) for i in range(2)])
        with pytest.raises(DataError, match=r"is each archive a class\?\n.*--layout classes\n.*--layout flat"):
            open_source(tmp_path)
        assert open_source(tmp_path, SourceOptions(layout="classes")).class_names == ("n01", "n02")
        assert classes(open_source(tmp_path, SourceOptions(layout="flat"))) == [None] * 4

    def test_class_folders_inside_archives_are_classes(self, tmp_path: Path) -> None:
        for i in range(2):
            write_zip(tmp_path / f"{i}.zip", [("cat/0.png", png(i)), ("dog/0.png", png(i + 2))])
        source = open_source(tmp_path)
        assert classes(source) == ["cat", "dog", "cat", "dog"]
        assert len(set(names(source))) == 4

    def test_what_cannot_be_one_data_set_is_refused(self, tmp_path: Path) -> None:
        for i in range(2):
            write_tar(tmp_path / f"{i}.tar", samples({"png": png(i), "cls": b"1"}))
        for pattern, message in {
            "{000..002}.tar": "3 of 3 files are missing: .*000.tar",
            "{0..2}.tar": r"1 of 3 files are missing: .*/2\.tar",
            "x*.tar": "no file is called so",
            "{0,1,9}.tar": r"1 of 3 files are missing: .*/9\.tar",
            "{0..1": "no such file|no file|missing",
            "{0}.tar": "neither a range",
            "{5..1}.tar": "is no range",
            "{0..99999999}.tar": "is no range",
            "{0..9999}{0..9999}.tar": "stands for more than",
        }.items():
            with pytest.raises(DataError, match=message):
                open_source(str(tmp_path / pattern))
        write_zip(tmp_path / "2.zip", [("a/0.png", png())])
        with pytest.raises(DataError, match="its files are 2 × tar, 1 × zip; name archives or parquet files of one"):
            open_source(tmp_path)
        assert len(open_source(str(tmp_path / "?.tar")).labels) == 2

    def test_braces(self) -> None:
        assert braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
        assert braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
        assert braces("plain") == ["plain"]

    def test_a_shard_that_is_cut_off_is_named(self, tmp_path: Path) -> None:
        for i in range(3):
            path = write_tar(tmp_path / f"{i}.tar", samples({"png": png(i), "cls": b"1"}))
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(DataError, match=r"/2\.tar: is not a complete tar archive"):
            open_source(tmp_path)

    def test_a_changed_shard_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("simclr_dist.data.sources.open._SETTLED_NS", -(1 << 62))
        write_tar(tmp_path / "0.tar", samples({"png": png(0), "cls": b"1"}))
        assert len(open_source(tmp_path).labels) == 1
        write_tar(tmp_path / "0.tar", samples({"png": png(0), "cls": b"1"}, {"png": png(1), "cls": b"2"}))
        assert len(open_source(tmp_path).labels) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


class TestParquet:
    def test_the_order_of_classes_is_the_files_own(self, tmp_path: Path) -> None:
        columns = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": [2, 0, -1]}
        names = {"_type": "ClassLabel", "names": ["zebra", "ant", "cow"]}
        source = open_source(write_parquet(tmp_path / "x.parquet", columns, hugging_face(image=IMAGE, label=names)))
        assert source.class_names == ("zebra", "ant", "cow")
        assert classes(source) == ["cow", "zebra", None]
        assert "images from the column image" in source.account.layout
        assert [(note.reason, note.count) for note in source.account.notes] == [("no label, taken without one", 1)]

    @pytest.mark.parametrize(
        ("columns", "features", "question"),
        [
            ({"a": [b""], "b": [b""]}, {}, r"columns a, b, which may hold images(.|\n)*--image-key a\n.*--image-key b"),
            (
                {"image": [{"bytes": b""}], "mask": [{"bytes": b""}]},
                {"image": IMAGE, "mask": IMAGE},
                "--image-key mask",
            ),
            ({"image": [b""], "label": [1], "category": [2]}, {}, r"--label-key label\n.*--label-key category"),
            (
                {"img": [b""], "fine_label": [1], "coarse_label": [0]},
                {"fine_label": CLASSES, "coarse_label": CLASSES},
                r"--label-key fine_label\n.*--label-key coarse_label\n.*--layout flat",
            ),
        ],
    )
    def test_several_columns_are_a_question(self, columns: dict, features: dict, question: str, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "x.parquet", columns, hugging_face(**features))
        with pytest.raises(DataError, match=question):
            open_source(path)

    def test_columns_by_name(self, tmp_path: Path) -> None:
        columns = {"a": [png(0)], "b": [{"bytes": png(1)}], "label": [1], "word": ["cat"], "caption": ["x"]}
        path = write_parquet(tmp_path / "x.parquet", columns)
        source = open_source(path, SourceOptions(image_key="b", label_key="word"))
        assert classes(source) == ["cat"]
        assert np.array_equal(source.read(0), make_image(1, 24, 32))
        assert "columns that are not read: a, caption, label" in source.account.layout
        assert classes(open_source(path, SourceOptions(image_key="a", layout="flat"))) == [None]
        for options, message in (
            ({"image_key": "label"}, "the column label holds no images"),
            ({"image_key": "nope"}, "the column nope is not there"),
            ({"image_key": "a", "label_key": "b"}, "the column b holds no labels"),
        ):
            with pytest.raises(DataError, match=message):
                open_source(path, SourceOptions(**options))

    def test_rows_without_an_image_are_counted(self, tmp_path: Path) -> None:
        images = [{"bytes": png(0)}, None, {"bytes": None}, {"bytes": png(3)}]
        source = open_source(write_parquet(tmp_path / "x.parquet", {"image": images, "label": [0, 1, 2, 3]}, rows=2))
        assert [name.rpartition("/")[2] for name in names(source)] == ["0", "3"]
        assert classes(source) == ["0", "3"]
        assert left_out(source) == {"no image in this row": 2}
        assert np.array_equal(source.read(1), make_image(3, 24, 32))

    def test_a_label_that_is_no_text_is_said(self, tmp_path: Path) -> None:
        raw = pa.py_buffer(b"cat\xff\xfe")
        labels = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 3, 5], np.int32)), raw])
        path = write_parquet(tmp_path / "x.parquet", {"image": [png(0), png(1)], "label": labels})
        with pytest.raises(DataError, match=r"x\.parquet.*can't decode byte 0xff"):
            open_source(path)

    def test_a_damaged_type_does_not_end_the_process(self, tmp_path: Path) -> None:
        """As pyarrow does when it is then asked for statistics."""
        path = write_parquet(tmp_path / "x.parquet", {"image": [png(i) for i in range(3)], "label": [0, 1, 2]})
        content = path.read_bytes()
        begin = content.rindex(b"\x15\x0c\x19\x35")  # of the images' part: its type, then a list of encodings
        path.write_bytes(content[: begin + 1] + b"\x7e" + content[begin + 2 :])
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).physical_type == "UNKNOWN"
        assert len(open_source(path).labels) == 3

    @pytest.mark.parametrize(
        ("columns", "metadata", "message"),
        [
            ({"label": [1]}, None, "no column holds images"),
            ({"image": [b""], "label": [3]}, hugging_face(label=CLASSES), "holds 3, and its list has 3 classes"),
            ({"image": [b""], "label": [0]}, {"huggingface": "{"}, "what it says about its columns"),
            (
                {"image": [b""], "label": [0]},
                hugging_face(label={"_type": "ClassLabel", "names": ["a", "a"]}),
                "have the same name",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, columns: dict, metadata: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"x\.parquet: .*{message}"):
            open_source(write_parquet(tmp_path / "x.parquet", columns, metadata))

    def test_files_of_other_columns_or_classes_are_refused(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "0.parquet", {"image": [png()], "label": [0]})
        for columns, metadata in (
            ({"image": [png()]}, None),
            ({"picture": [png()], "label": [0]}, None),
            ({"image": [png()], "label": [0]}, hugging_face(label=CLASSES)),
            ({"image": [{"bytes": png()}], "label": [0]}, None),
        ):
            write_parquet(tmp_path / "1.parquet", columns, metadata)
            with pytest.raises(DataError, match=r"1\.parquet: has other columns or classes than .*0\.parquet"):
                open_source(tmp_path)

    def test_damage_is_of_the_rows_that_it_hits(self, tmp_path: Path) -> None:
        images = [np.random.default_rng(i).bytes(5000) for i in range(8)]
        path = write_parquet(tmp_path / "x.parquet", {"image": images}, rows=2)
        content = bytearray(path.read_bytes())
        at = content.index(images[2][:100])
        content[at - 4 : at] = bytes(4)
        path.write_bytes(content)
        source = open_source(path)
        for row in (2, 3):
            with pytest.raises(DataError, match=rf"x\.parquet/{row}: "):
                source.read(row)
        with pytest.raises(DataError, match=r"x\.parquet/0: cannot be decoded"):  # noise is no image, but was read
            source.read(0)

    def test_rows_are_read_in_any_order_by_any_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from concurrent.futures import ThreadPoolExecutor

        monkeypatch.setattr(parquet, "_MOST_KEPT", 1000)  # so that nearly every row is decoded again
        files = [png(i) for i in range(50)]
        source = open_source(write_parquet(tmp_path / "x.parquet", {"image": files}, rows=23))
        order = random.Random(0).sample(range(50), 50) * 2
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(source.read, order))
        assert all(np.array_equal(pixels, make_image(i, 24, 32)) for i, pixels in zip(order, found, strict=True))

    def test_splits_of_a_downloaded_data_set(self, tmp_path: Path) -> None:
        metadata = hugging_face(image=IMAGE, label=CLASSES)
        for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("validation-00000-of-00001", 1)):
            columns = {"image": [{"bytes": png(i)} for i in range(count)], "label": [0] * count}
            write_parquet(tmp_path / "data" / f"{name}.parquet", columns, metadata)
        (tmp_path / "README.md").write_text("x")
        with pytest.raises(DataError, match="has the splits train, validation; say which with --split"):
            open_source(tmp_path)
        assert [len(open_source(tmp_path, split).labels) for split in ("train", "val", "validation")] == [5, 1, 1]
        assert left_out(open_source(tmp_path, "train")) == {"not an image (.md)": 1}

    def test_a_file_that_declares_endless_rows_is_refused(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "x.parquet", {"image": [None] * 300_000, "label": [1] * 300_000}, rows=300_000)
        with pytest.raises(DataError, match=r"x\.parquet: .*(declares 300,000 rows in|no column holds images)"):
            open_source(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class TestTables:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("a/1.png", "a-b/2.png", "train/3.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(png())
        return tmp_path

    def open(self, root: Path, content: str, name: str = "list.csv", **options: Any) -> ImageSource:
        (root / name).write_text(content)
        return open_source(root / name, SourceOptions(**options))

    @pytest.mark.parametrize(
        "content",
        [
            "path,label\na/1.png,x\ntrain/3.png,y\n",
            "file_name;class\n./a/1.png;x\ntrain/3.png;y\n",
            "category\timage\nx\ta/1.png\ny\ttrain/3.png\n",
            "\ufeffid,filename,label\r\n1,a/1.png,x\r\n2,train//3.png,y\r\n",
            'filename,label\n"a/1.png","x"\n"train/3.png"," y"\n',
        ],
    )
    def test_the_header_says_what_is_what(self, content: str, root: Path) -> None:
        source = self.open(root, content)
        assert names(source) == [f"{root}/a/1.png", f"{root}/train/3.png"]
        assert classes(source) == ["x", "y"]
        assert left_out(source) == {}

    def test_splits_classes_and_what_is_left_out(self, root: Path) -> None:
        (root / "notes.txt").write_text("x")
        table = "path,label,split\na/1.png,10,train\na-b/2.png,9,train\ntrain/3.png,10,test\nnotes.txt,9,train\n"
        with pytest.raises(DataError, match="has the splits test, train"):
            self.open(root, table)
        source = self.open(root, table, split="train")
        assert [name.removeprefix(f"{root}/") for name in names(source)] == ["a/1.png", "a-b/2.png"]
        assert source.class_names == ("9", "10")
        assert left_out(source) == {"not an image (.txt)": 1}
        again = self.open(root, "path,label\na/1.png,\na/1.png,\n")
        assert classes(again) == [None]
        assert left_out(again) == {"named again in the table (1 rows)": 1}

    def test_without_a_column_of_labels_folders_are_read_as_in_a_folder(self, root: Path) -> None:
        source = self.open(root, "path\na/1.png\na-b/2.png\n")
        assert classes(source) == ["a", "a-b"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a/1.png,x\n", r"its header has the columns `a/1\.png, x`; which has the files"),
            ("path,label\nb/1.png,x\na/1.png,x\n", r"1 of the 2 files that it names are not in .*: b/1\.png"),
            ("path,label\na/1.png,x\na/1.png,y\n", "line 3: a/1.png has the label `y`, and `x` above"),
            ("path,label\na/1.png\n", "line 2: has no label: a/1.png"),
            ("path,label\nhttps://x/1.png,x\n", "1 of its 1 images are URLs; fetch them first"),
            ("path,image,label\na/1.png,a/1.png,x\n", "has the columns path, image; say which with --image-key"),
            ("path,label,label\n", "two of its columns are called label"),
            ("path,split\na/1.png,train\na/1.png,test\n", "is in the split `test`, and in another above"),
        ],
    )
    def test_a_table_that_does_not_fit_is_refused(self, content: str, message: str, root: Path) -> None:
        with pytest.raises(DataError, match=rf"list\.csv.*{message}"):
            self.open(root, content)


def test_heic_is_read_where_its_plugin_is_installed(tmp_path: Path) -> None:
    plugin = pytest.importorskip("pillow_heif")
    heif = plugin.from_pillow(Image.fromarray(make_image(0, 64, 96)))
    for name in ("a/0.heic", "a/1.HEIF", "b/2.jpg", "b/3.hif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        heif.save(tmp_path / name, format="HEIF")
    source = open_source(tmp_path)
    assert [source.read(i).shape for i in range(4)] == [(64, 96, 3)] * 4
    assert abs(source.read(0).astype(int) - make_image(0, 64, 96)).mean() < 20


@pytest.mark.parametrize("suffix", [".heic", ".heif", ".hif", ".jxl"])
def test_a_format_without_its_plugin_is_counted_with_what_to_install(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simclr_dist.data.sources import listing

    monkeypatch.setattr(listing, "image_suffixes", lambda: frozenset({".png"}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png())
    (tmp_path / "a" / f"1{suffix}").write_bytes(b"x")
    (reason,) = left_out(open_source(tmp_path))
    assert reason == f"needs a package: pip install pillow-{'jxl-plugin' if suffix == '.jxl' else 'heif'} ({suffix})"
