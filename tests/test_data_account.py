"""Everything found at a source is taken, refused by name, or counted with a reason; for folders and archives alike."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.data.account import Account, LeftOut
from simclr_dist.data.sources.images import FileImages, ImageSource
from simclr_dist.data.sources.open import open_source, size_on_disk
from simclr_dist.errors import DataError
from tests.images import make_folder, make_image

Files = dict[str, bytes]


def encoded(format_name: str, number: int = 0, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(number, 24, 32)).convert(mode).save(buffer, format_name)
    return buffer.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")


def write_files(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path: Path, files: Files, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            add_member(archive, name, content)
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(params=["folder", "archive"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Files], Path]:
    """Writes files to a folder, or to an archive."""
    if request.param == "folder":
        return lambda files: write_files(tmp_path / "in", files)
    return lambda files: write_tar(tmp_path / "in.tar", files)


def names(source: ImageSource) -> list[str]:
    return [source.name(i).removeprefix(f"{source.account.source}/") for i in range(len(source.labels))]


def left_out(source: ImageSource) -> dict[str, tuple[str, ...]]:
    """Names by reason; every group is small enough here to be named whole."""
    account = source.account
    assert account.taken == len(source.labels)
    assert all(group.count == len(group.names) for group in account.left_out)
    return {group.reason: group.names for group in account.left_out}


class TestEveryFileIsTakenOrCounted:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("1.avif", encoded("AVIF")),
            ("1.jfif", JPEG),
            ("1.jp2", encoded("JPEG2000")),
            ("1.tga", encoded("TGA")),
            ("1.pbm", encoded("PPM", mode="1")),
            ("1.apng", PNG),
            ("1.PNG", PNG),
            ("1.mpo", JPEG),
            ("n0123_456", JPEG),
            ("img.0001", PNG),
        ],
    )
    def test_what_pillow_opens_is_taken_whatever_its_suffix(
        self, name: str, content: bytes, place: Callable[[Files], Path]
    ) -> None:
        source = open_source(place({"a/0.png": PNG, f"b/{name}": content}))
        assert names(source) == ["a/0.png", f"b/{name}"]
        assert left_out(source) == {}
        assert source.read(1).shape == (24, 32, 3)

    def test_other_files_are_counted_by_suffix(self, place: Callable[[Files], Path]) -> None:
        others = {
            "1.heic": b"",
            "2.npy": b"",
            "3.txt": b"",
            "4.PDF": b"",
            "LICENSE": b"MIT",
            "5.tar.gz": b"",
            "6.zip": b"",
        }
        source = open_source(place({"a/0.png": PNG} | {f"a/{name}": content for name, content in others.items()}))
        assert left_out(source) == {
            "a format that Pillow does not open (.heic)": ("a/1.heic",),
            "an array, which --channels keep takes (.npy)": ("a/2.npy",),
            "not an image (.txt)": ("a/3.txt",),
            "not an image (.pdf)": ("a/4.PDF",),
            "not an image (no suffix)": ("a/LICENSE",),
            "an archive, which is not unpacked (.tar.gz)": ("a/5.tar.gz",),
            "an archive, which is not unpacked (.zip)": ("a/6.zip",),
        }

    def test_files_and_folders_of_systems_and_tools_are_no_images_and_no_classes(
        self, place: Callable[[Files], Path]
    ) -> None:
        hidden = [".DS_Store", "a/._0.png", "a/Thumbs.db", "a/desktop.ini"]
        tools = [".ipynb_checkpoints", "@eaDir", "__MACOSX", "a/.snapshot"]
        inside = {f"{folder}/x/0.png": PNG for folder in tools}
        source = open_source(place({"a/0.png": PNG} | dict.fromkeys(hidden, b"x") | inside))
        assert source.class_names == ("a",)
        found = left_out(source)
        assert set(found.pop("hidden or system file")) == set(hidden)
        assert set(found.pop("hidden folder, or one that a program made for itself")) == set(tools)
        assert found == {}

    def test_a_class_without_an_image_is_named(self, place: Callable[[Files], Path]) -> None:
        source = open_source(place({"a/0.png": PNG, "b/0.npy": b"", "c/deep/0.txt": b"", "d/.hidden": b""}))
        assert source.class_names == ("a",)
        assert left_out(source)["folder without images"] == ("b", "c", "d")

    @pytest.mark.parametrize("mask", ["seg.png", "mask.tif", "depth.png", "label.bmp"])
    def test_masks_of_a_webdataset_are_no_images(self, mask: str, place: Callable[[Files], Path]) -> None:
        files = {f"{i:06d}.{kind}": content for i in (0, 1) for kind, content in (("jpg", JPEG), (mask, PNG))}
        labels = {f"{i:06d}.{kind}": b"3" for i in (0, 1) for kind in ("cls", "json")}
        source = open_source(place(files | labels))
        assert names(source) == ["000000.jpg", "000001.jpg"]
        assert left_out(source) == {
            f"belongs to the image of the same name, as in a webdataset (.{mask})": (
                f"000000.{mask}",
                f"000001.{mask}",
            ),
            "not an image (.cls)": ("000000.cls", "000001.cls"),
            "not an image (.json)": ("000000.json", "000001.json"),
        }

    def test_dots_in_names_alone_leave_nothing_out(self, place: Callable[[Files], Path]) -> None:
        kept = ["a/2020.01.02.png", "a/2020.png", "a/my.photo.png", "a/x.1.png", "a/x.png"]
        assert names(open_source(place(dict.fromkeys(kept, PNG)))) == kept

    def test_two_images_of_one_name_are_noted(self, place: Callable[[Files], Path]) -> None:
        account = open_source(place(dict.fromkeys(["a/x.jpg", "a/x.png", "b/x.jpg"], JPEG))).account
        assert account.taken == 3
        assert account.notes == (LeftOut("has the name of another image but for the suffix", 1, ("a/x.png",)),)

    @pytest.mark.parametrize("suffix", [".tar.gz", ".parquet", ".zip", ".tfrecord"])
    def test_a_source_without_images_says_what_it_holds(self, suffix: str, place: Callable[[Files], Path]) -> None:
        with pytest.raises(DataError, match=rf"holds no images(.|\n)*3 × .*\({suffix}\): n0{suffix}"):
            open_source(place({f"n{i}{suffix}": b"" for i in range(3)}))

    def test_a_folder_of_archives_is_not_just_empty(self, tmp_path: Path) -> None:
        write_files(tmp_path / "in", {f"n{i}.tar": b"" for i in range(1000)})
        with pytest.raises(DataError, match=r"1,000 × an archive, which is not unpacked \(\.tar\): n0\.tar"):
            open_source(tmp_path / "in")


class TestFolders:
    def test_links(self, tmp_path: Path) -> None:
        root = write_files(tmp_path / "in", {"a/0.png": PNG})
        write_files(tmp_path / "real", {"0.png": PNG, "1.png": PNG})
        (root / "b").symlink_to(tmp_path / "real")
        (root / "c").symlink_to(tmp_path / "real")
        (root / "a" / "up").symlink_to(root)
        (root / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
        (root / "a" / "itself.png").symlink_to(root / "a" / "itself.png")
        (root / "a" / "1.png").symlink_to(tmp_path / "real" / "1.png")
        source = open_source(root)
        assert names(source) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/0.png", "c/1.png"]
        assert source.class_names == ("a", "b", "c")
        assert left_out(source) == {
            "link to a folder around it": ("a/up",),
            "link to nothing": ("a/gone.png", "a/itself.png"),
        }
        assert source.account.notes == (LeftOut("folder that is read under another name too", 1, ("c",)),)
        assert size_on_disk(str(root)) == 6 * len(PNG)

    def test_pipes_are_counted_not_read(self, tmp_path: Path) -> None:
        root = write_files(tmp_path / "in", {"a/0.png": PNG})
        os.mkfifo(root / "a" / "1.png")
        assert left_out(open_source(root)) == {"not a regular file": ("a/1.png",)}

    @pytest.mark.parametrize("denied", ["in", "in/b", "in/b/c", "in/a"])
    def test_a_folder_that_cannot_be_read_is_refused_by_name(
        self, denied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = write_files(tmp_path / "in", {"a/0.png": PNG, "b/0.png": PNG, "b/c/0.png": PNG})
        scandir = os.scandir

        def without_permission(path: str) -> object:
            if str(path) == str(tmp_path / denied):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", without_permission)
        with pytest.raises(DataError, match=f"^{tmp_path / denied}: cannot be read: Permission denied$"):
            open_source(root)

    @pytest.mark.parametrize("denied", ["in.tar", "in", "parent/in", "parent"])
    def test_a_source_that_cannot_be_read_is_refused_by_name(
        self, denied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stat = os.stat

        def without_permission(path: object, **options: object) -> os.stat_result:
            if isinstance(path, str | Path) and str(path) == str(tmp_path / denied):
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "stat", without_permission)
        with pytest.raises(DataError, match=f"^{tmp_path / denied}: cannot be read: Permission denied$"):
            open_source(tmp_path / denied)

    @pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"a\nb", b"\xe3\x81"])
    def test_names_are_bytes(self, name: bytes, place: Callable[[Files], Path]) -> None:
        text = os.fsdecode(name)
        source = open_source(place({f"{text}/{text}.png": PNG, f"{text}/{text}.doc": b""}))
        assert source.class_names == (text,)
        assert source.read(0).shape == (24, 32, 3)
        assert len(source.fingerprint) == len(source.content_fingerprint) == 32
        for line in source.account.lines():
            assert "\n" not in line
            line.encode()
        assert Account.from_json(json.loads(json.dumps(source.account.to_json()))).num_left_out == 1


class TestArchives:
    def test_links_are_read_as_their_files(self, tmp_path: Path) -> None:
        path = tmp_path / "links.tar"
        with tarfile.open(path, "w") as archive:
            add_member(archive, "top/a/0.png", PNG)
            add_member(archive, "top/a/1.png", JPEG)
            add_member(archive, "top/b/hard.png", type=tarfile.LNKTYPE, linkname="top/a/0.png")
            add_member(archive, "top/b/soft.png", type=tarfile.SYMTYPE, linkname="../a/1.png")
            add_member(archive, "top/b/twice.png", type=tarfile.SYMTYPE, linkname="hard.png")
            add_member(archive, "top/c", type=tarfile.SYMTYPE, linkname="a")
            add_member(archive, "top/d/through.png", type=tarfile.SYMTYPE, linkname="../c/0.png")
            add_member(archive, "top/a/gone.png", type=tarfile.SYMTYPE, linkname="nothing.png")
            add_member(archive, "top/a/outside.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add_member(archive, "top/a/above.png", type=tarfile.SYMTYPE, linkname="../../../x.png")
            add_member(archive, "top/a/circle.png", type=tarfile.SYMTYPE, linkname="circle.png")
            add_member(archive, "top/a/up", type=tarfile.SYMTYPE, linkname="..")
        source = open_source(path)
        png, jpeg = (np.asarray(Image.open(io.BytesIO(content))) for content in (PNG, JPEG))
        expected = {
            "top/a/0.png": png, "top/a/1.png": jpeg, "top/b/hard.png": png, "top/b/soft.png": jpeg,
            "top/b/twice.png": png, "top/c/0.png": png, "top/c/1.png": jpeg, "top/d/through.png": png,
        }  # fmt: skip
        assert names(source) == list(expected)
        assert all(np.array_equal(source.read(i), pixels) for i, pixels in enumerate(expected.values()))
        found = {reason: set(paths) for reason, paths in left_out(source).items()}
        assert found == {
            "link to nothing inside the archive": {
                f"top/a/{name}.png" for name in ("gone", "outside", "above", "circle")
            },
            "link to a folder around it": {"top/a/up"},
        }

    def test_an_archive_of_a_folder_with_links_gives_what_the_folder_gives(self, tmp_path: Path) -> None:
        root = write_files(tmp_path / "in", {f"a/{i}.png": encoded("PNG", i) for i in range(3)})
        (root / "b").mkdir()
        os.link(root / "a" / "0.png", root / "b" / "0.png")
        (root / "b" / "1.png").symlink_to("../a/1.png")
        (root / "c").symlink_to("a")
        with tarfile.open(tmp_path / "in.tar", "w") as archive:
            archive.add(root, "in")
        folder, packed = open_source(root), open_source(tmp_path / "in.tar")
        assert [f"in/{name}" for name in names(folder)] == names(packed)
        assert folder.labels.tolist() == packed.labels.tolist()
        assert all(np.array_equal(folder.read(i), packed.read(i)) for i in range(len(folder.labels)))

    def test_later_versions_devices_and_sparse_files_are_told(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "in.tar", {"a/0.png": PNG, "a/1.png": PNG})
        with tarfile.open(path, "a") as archive:
            add_member(archive, "a/0.png", JPEG)
            add_member(archive, "a/fifo.png", type=tarfile.FIFOTYPE)
            add_member(archive, "a/disk.png", type=tarfile.BLKTYPE)
            holes = {"GNU.sparse.size": "1000000", "GNU.sparse.numblocks": "1", "GNU.sparse.map": f"0,{len(PNG)}"}
            add_member(archive, "a/sparse.png", PNG, pax_headers=holes)
        source = open_source(path)
        assert np.array_equal(source.read(0), np.asarray(Image.open(io.BytesIO(JPEG))))
        assert left_out(source) == {
            "an earlier version of a file that the archive holds again": ("a/0.png",),
            "not an ordinary file": ("a/fifo.png", "a/disk.png", "a/sparse.png"),
        }

    def test_archives_inside_are_named(self, tmp_path: Path) -> None:
        inner, packed = (write_tar(tmp_path / f"i{mode[2:]}", {"0.png": PNG}, mode) for mode in ("w", "w:gz"))
        files = {"n1.tar": inner.read_bytes(), "n2.tar": inner.read_bytes(), "n3.tar.gz": packed.read_bytes()}
        source = open_source(write_tar(tmp_path / "in.tar", files))
        assert source.class_names == ("n1", "n2")
        assert source.account.notes == (
            LeftOut("archive inside the archive, read as a folder", 2, ("n1.tar", "n2.tar")),
        )
        assert left_out(source) == {"an archive, which is not unpacked (.tar.gz)": ("n3.tar.gz",)}

    def test_archives_inside_archives_have_a_limit(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", {"a/0.png": PNG, "b/0.png": PNG})
        for depth in range(1, 9):
            path = write_tar(tmp_path / f"{depth}.tar", {f"in{depth}.tar": path.read_bytes()})
        assert len(open_source(path).labels) == 2
        for depth in range(9, 60):
            path = write_tar(tmp_path / "more.tar", {"in.tar": path.read_bytes()})
            if depth in (9, 59):
                with pytest.raises(DataError, match="more than 8 archives lie one inside the other; unpack"):
                    open_source(path)

    def test_an_archive_inside_that_is_cut_off_is_refused_by_name(self, tmp_path: Path) -> None:
        inner = write_tar(tmp_path / "inner", {"0.png": PNG, "1.png": PNG}).read_bytes()
        for size in (0, 512, 1024, 1536, len(PNG) + 600, 3072):
            path = write_tar(tmp_path / "in.tar", {"n1.tar": inner[:size], "n2.tar": inner})
            with pytest.raises(DataError, match=r"in\.tar/n1: is not a complete tar archive"):
                open_source(path)

    def test_an_archive_cut_at_any_byte_is_refused(self, tmp_path: Path) -> None:
        whole = write_tar(tmp_path / "in.tar", {f"a/{i}.png": encoded("PNG", i) for i in range(6)})
        content = whole.read_bytes()
        end = content.rstrip(b"\0")
        dice = random.Random(0)
        cuts = {dice.randrange(len(content)) for _ in range(200)} | {
            len(end) + 1,
            512,
            1024,
            len(end) // 512 * 512 + 512,
        }
        for at in sorted(cuts):
            whole.write_bytes(content[:at])
            with pytest.raises(DataError, match=r"in\.tar: is not a complete tar archive"):
                open_source(whole)

    @pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2", "w"])
    def test_the_content_tells_the_compression_not_the_name(self, mode: str, tmp_path: Path) -> None:
        for name in ("in.tar", "in.tar.gz", "in.tar.bz2"):
            assert names(open_source(write_tar(tmp_path / name, {"a/0.png": PNG}, mode))) == ["a/0.png"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"PK\3\4 a zip", "is not a complete tar archive"),
            (b"<html>404</html>", "is not a complete tar archive"),
            (b"", "is not a complete tar archive"),
            (b"\x28\xb5\x2f\xfd zstd", "unpack it with `zstd -d`"),
            (b"\x1f\x8b\x08 gzip, cut off", "cannot be decompressed, it is cut off or damaged"),
        ],
    )
    def test_what_is_no_archive_is_refused(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "in.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"in\.tar: {message}|in\.tar: .*{message}"):
            open_source(tmp_path / "in.tar")

    def test_two_archives_joined_into_one_are_refused(self, tmp_path: Path) -> None:
        first, second = (write_tar(tmp_path / f"{i}.tar", {f"a/{i}.png": PNG}).read_bytes() for i in (1, 2))
        (tmp_path / "in.tar").write_bytes(first + second)
        with pytest.raises(DataError, match="more follows after its end"):
            open_source(tmp_path / "in.tar")


class TestAccount:
    account = Account("here", "2 classes", 10, (LeftOut("not an image (.txt)", 7, ("a", "b", "c", "d", "e")),))

    def test_it_adds_up(self) -> None:
        more = self.account.with_left_out("cannot be decoded", ["x.png", "y.png"])
        assert (more.taken, more.num_left_out) == (8, 9)
        assert more.with_left_out("nothing", []) == more
        assert more.with_note("first of several pages", ["z.tif"]).taken == 8

    def test_it_is_printed_and_stored(self) -> None:
        assert self.account.lines() == [
            "here: 2 classes",
            "taken: 10 images",
            "left out: 7 × not an image (.txt): a, b, c, d, e, …",
        ]
        assert Account.from_json(json.loads(json.dumps(self.account.to_json()))) == self.account


def test_a_folder_that_is_read_twice_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "in", 6)
    for path in (tmp_path / "in", *(tmp_path / "in").iterdir()):
        os.utime(path, (1, 1))  # what has just changed may change again unnoticed
    first = open_source(tmp_path / "in")
    assert open_source(tmp_path / "in") is first
    Image.fromarray(make_image(0, 9, 9)).save(tmp_path / "in" / "class1" / "more.png")
    assert open_source(tmp_path / "in").account.taken == 7


def test_a_compressed_archive_that_is_read_twice_is_decompressed_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in.tar.gz", {"a/0.png": PNG}, "w:gz")
    os.utime(path, (1, 1))
    first = open_source(path)
    assert open_source(path) is first
    write_tar(path, {"a/0.png": PNG, "a/1.png": PNG}, "w:gz")
    assert open_source(path).account.taken == 2


class TestContentFingerprint:
    def test_a_folder_is_the_same_wherever_it_lies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path / "in", 5)
        before = open_source(tmp_path / "in").content_fingerprint
        (tmp_path / "in").rename(tmp_path / "moved")
        assert open_source(tmp_path / "moved").content_fingerprint == before
        monkeypatch.chdir(tmp_path)
        assert open_source("moved").content_fingerprint == before
        monkeypatch.chdir(tmp_path / "moved")
        assert open_source(".").content_fingerprint == before
        shutil.copytree(tmp_path / "moved", tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
        assert open_source(tmp_path / "copy").content_fingerprint == before

    @pytest.mark.parametrize("kind", ["folder", "archive"])
    def test_files_are_read_once(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {f"{'ab'[i % 2]}/{i}.png": PNG[:-20] + bytes([i] * 20) for i in range(9)}
        make = {"folder": write_files, "archive": write_tar}[kind]
        source = make(tmp_path / ("in" if kind == "folder" else "in.tar"), files)
        reads = []
        real = FileImages._content
        monkeypatch.setattr(FileImages, "_content", lambda self, index: reads.append(index) or real(self, index))
        before = open_source(source).content_fingerprint
        assert open_source(source).content_fingerprint == before
        assert sorted(reads) == list(range(9))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # one that does not know them
        assert open_source(source).content_fingerprint == before
        assert len(reads) == 18

    def test_a_changed_byte_differs_although_name_size_and_time_do_not(self, tmp_path: Path) -> None:
        root = write_files(tmp_path / "in", {"a/0.png": PNG, "b/1.png": PNG})
        before = open_source(root).content_fingerprint
        copy = tmp_path / "copy"
        shutil.copytree(root, copy)
        changed = copy / "a" / "0.png"
        time_before = changed.stat().st_mtime_ns
        changed.write_bytes(PNG[:-20] + bytes(20))
        os.utime(changed, ns=(time_before, time_before))
        assert open_source(copy).content_fingerprint != before

    @pytest.mark.parametrize("change", ["bytes", "name", "class", "more", "fewer"])
    def test_a_changed_folder_differs(self, change: str, tmp_path: Path) -> None:
        root = write_files(tmp_path / "in", {"a/0.png": PNG, "b/1.png": PNG})
        before = open_source(root).content_fingerprint
        path = root / "a" / "0.png"
        if change == "bytes":
            path.write_bytes(PNG[:-20] + bytes(20))
        elif change == "fewer":
            path.unlink()
        elif change == "more":
            write_files(root, {"a/2.png": PNG})
        else:
            (root / "a" if change == "class" else path).rename(
                root / "c" if change == "class" else root / "a" / "9.png"
            )
        assert open_source(root).content_fingerprint != before

    def test_an_archive_counts_by_its_bytes(self, tmp_path: Path) -> None:
        files = {"a/0.png": PNG, "b/1.png": PNG}
        plain = write_tar(tmp_path / "1.tar", files)
        same = open_source(plain).content_fingerprint
        assert open_source(write_tar(tmp_path / "2.tar.gz", files, "w:gz")).content_fingerprint == same
        changed = {"a/0.png": PNG, "b/1.png": PNG[:-20] + bytes(20)}
        assert open_source(write_tar(tmp_path / "3.tar", changed)).content_fingerprint != same
