"""How splits and classes are read from paths: what is clear is said, and two possible readings are a question."""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.classes_from import with_class_names
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import sidecar_path
from simclr_dist.data.sources.images import ImageSource
from simclr_dist.data.sources.layout import kind_of_split
from simclr_dist.data.sources.open import open_source
from simclr_dist.errors import DataError


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return root


def images_and_classes(source: ImageSource) -> dict[str, str | None]:
    """Class by the image's path."""
    labels = source.labels.tolist()
    paths = [source.name(i).removeprefix(f"{source.account.source}/") for i in range(len(labels))]
    return {path: source.class_names[label] if label >= 0 else None for path, label in zip(paths, labels, strict=True)}


def answers(error: DataError) -> list[list[str]]:
    """The arguments of the commands that a question offers, behind `simclr-dist prepare`."""
    commands = re.findall(r"^  simclr-dist prepare (.*)$", str(error), re.MULTILINE)
    return [shlex.split(command) for command in commands]


def options_of(arguments: list[str]) -> tuple[str, SourceOptions]:
    source, out, *options = arguments
    assert out == "OUT.beton"
    given = dict(zip(options[::2], options[1::2], strict=True))
    depth = given.get("--class-depth")
    return source, SourceOptions(
        split=given.get("--split"),
        layout=given.get("--layout", "auto"),  # type: ignore[arg-type]
        class_depth=int(depth) if depth else None,
    )


class TestQuestions:
    @pytest.mark.parametrize(
        ("names", "offered"),
        [
            (["Training/a/1.png", "Testing/a/1.png"], ["--split Testing", "--split Training", "--layout classes"]),
            (["train/a/1.png", "test/a/1.png", "stray.png"], ["--split test", "--split train", "--layout classes"]),
            (["train/a/1.png", "test/a/1.png", "extra/1.png"], ["--split test", "--split train", "--layout classes"]),
            (["TRAIN2017/1.png", "val_256/1.png"], ["--split TRAIN2017", "--split val_256", "--layout classes"]),
            (["trainA/1.png", "testB/1.png", "x/1.png"], ["--split testB", "--split trainA", "--layout classes"]),
            (["dog/1.png", "my_dev/1.png"], ["--split my_dev", "--layout classes"]),
            (["ILSVRC2012_img_val/1.png", "b/1.png"], ["--split ILSVRC2012_img_val", "--layout classes"]),
            (["a/train/1.png", "a/test/1.png", "b/train/1.png"], ["--split test", "--split train", "--layout classes"]),
            (["a/1.png", "b/Validation/1.png"], ["--split Validation", "--layout classes"]),
        ],
    )
    def test_what_resembles_a_split_is_never_a_class_unasked(
        self, names: list[str], offered: list[str], tmp_path: Path
    ) -> None:
        root = make_tree(tmp_path / "in", *names)
        with pytest.raises(DataError) as caught:
            open_source(root)
        assert [" ".join(answer) for answer in answers(caught.value)] == [
            f"{root} OUT.beton {line}" for line in offered
        ]
        for answer in answers(caught.value):
            source, options = options_of(answer)
            assert open_source(source, options).account.taken >= 1

    @pytest.mark.parametrize(
        "names",
        [
            ["images/1.png", "masks/1.png"],
            ["JPEGImages/1.png", "SegmentationClass/1.png"],
            ["img/1.png", "gt/1.png", "c/1.png"],
            ["images/1.png", "images/2.png"],
            ["tumor/p1/1.png", "tumor/p2/1.png"],
            ["set/a/1.png", "set/b/1.png", "set/c/d/1.png"],
            ["a/images/1.png", "a/masks/1.png", "b/images/1.png"],
            ["my_train/1.png", "my_train/2.png"],
        ],
    )
    def test_every_answer_of_a_question_is_accepted(self, names: list[str], tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in a b", *names)
        with pytest.raises(DataError) as caught:
            open_source(root)
        offered = answers(caught.value)
        assert len(offered) >= 2
        for answer in offered:
            if "--files" not in answer:
                source, options = options_of(answer)
                assert open_source(source, options).account.taken >= 1

    def test_a_split_asked_for_stays_in_the_commands(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "train/n1/1.png", "val/images/1.png", "test/images/1.png")
        with pytest.raises(DataError) as caught:
            open_source(root, "val")
        for answer in answers(caught.value):
            source, options = options_of(answer)
            assert options.split == "val"
            assert list(images_and_classes(open_source(source, options))) == ["val/images/1.png"]

    def test_other_options_stay_in_the_commands(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "train/a/b/1.png", "test/a/b/1.png")
        with pytest.raises(DataError) as caught:
            open_source(root, SourceOptions(class_depth=2))
        assert answers(caught.value)[1] == [str(root), "OUT.beton", "--class-depth", "2", "--split", "train"]

    def test_archives_ask_as_folders_do(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "train/a/1.png", "test/a/1.png", "extra/1.png")
        with tarfile.open(tmp_path / "in.tar", "w") as archive:
            archive.add(root, "in")
        with pytest.raises(DataError, match="--split train"):
            open_source(tmp_path / "in.tar")
        assert list(images_and_classes(open_source(tmp_path / "in.tar", "train"))) == ["in/train/a/1.png"]

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("train", "train"), ("Training", "train"), ("train2017", "train"), ("trainA", "train"),
            ("my_train", "train"), ("TEST", "test"), ("testset", "test"), ("val", "val"), ("valid", "val"),
            ("Validation-1", "val"), ("dev", "dev"), ("eval", "eval"), ("unlabelled", "unlabeled"),
            ("trainval", "trainval"), ("trains", None), ("valley", None), ("testament", None), ("device", None),
            ("evalanche", None),
        ],
    )  # fmt: skip
    def test_names_of_splits(self, name: str, kind: str | None) -> None:
        assert kind_of_split(name) == kind


class TestReadings:
    @pytest.mark.parametrize(
        ("names", "options", "expected", "said"),
        [
            (
                ["a/1.png", "b/x/1.png"],
                {},
                {"a/1.png": "a", "b/x/1.png": "b"},
                "2 classes, the outermost folders (a, b)",
            ),
            (
                ["1.png", "2.png"],
                {},
                {"1.png": None, "2.png": None},
                "no classes, because the images lie in no folders",
            ),
            (["train/a/1.png"], {}, {"train/a/1.png": "a"}, "split train; 1 class, the outermost folder (a)"),
            (
                ["Training/a/1.png", "Testing/b/1.png"],
                {"split": "train"},
                {"Training/a/1.png": "a"},
                "split Training (not asked for: Testing); 1 class",
            ),
            (
                ["set/train/a/1.png", "set/val/b/1.png"],
                {"split": "val"},
                {"set/val/b/1.png": "b"},
                "inside set: split val",
            ),
            (
                ["a/train/1.png", "a/test/2.png", "b/train/1.png"],
                {"split": "train"},
                {"a/train/1.png": "a", "b/train/1.png": "b"},
                "split train (not asked for: test); 2 classes",
            ),
            (
                ["tumor/p1/1.png"],
                {"layout": "classes"},
                {"tumor/p1/1.png": "tumor"},
                "folders inside them are no classes",
            ),
            (["tumor/p1/1.png"], {"class_depth": 2}, {"tumor/p1/1.png": "p1"}, "1 class, the folder at depth 2 (p1)"),
            (["a/x/1.png", "b/x/1.png"], {"class_depth": 2}, {"a/x/1.png": "x", "b/x/1.png": "x"}, "same name are one"),
            (["train/1.png", "b/1.png"], {"layout": "classes"}, {"b/1.png": "b", "train/1.png": "train"}, "2 classes"),
            (
                ["train/1.png", "b/1.png"],
                {"layout": "flat"},
                {"b/1.png": None, "train/1.png": None},
                "folders are no classes",
            ),
        ],
    )
    def test_a_reading_is_said(
        self, names: list[str], options: dict, expected: dict[str, str | None], said: str, tmp_path: Path
    ) -> None:
        source = open_source(make_tree(tmp_path / "in", *names), SourceOptions(**options))
        assert images_and_classes(source) == expected
        assert said in source.account.layout

    def test_what_lies_outside_of_a_split_is_counted_and_other_splits_are_not(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "train/a/1.png", "test/a/1.png", "extra/1.png", "stray.png")
        (root / "train" / "a" / "notes.txt").write_text("x")
        (root / "test" / "a" / "notes.txt").write_text("x")
        account = open_source(root, "train").account
        assert {group.reason: group.names for group in account.left_out} == {
            "outside of the split train": ("extra/1.png", "stray.png"),
            "not an image (.txt)": ("train/a/notes.txt",),
        }

    def test_an_image_beside_class_folders_is_noted(self, tmp_path: Path) -> None:
        source = open_source(make_tree(tmp_path / "in", "a/1.png", "b/1.png", "stray.png"))
        assert source.labels.tolist() == [0, 1, -1]
        assert [group.names for group in source.account.notes] == [("stray.png",)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "val"}, "has the splits test, train; there is no `val`"),
            ({"layout": "classes", "split": "train", "class_depth": 3}, "no image has a class folder at depth 3"),
            ({"split": "TRAIN", "files": "nowhere.txt"}, r"nowhere\.txt: cannot be read"),
            ({"split": "train", "classes_from": "nowhere.beton"}, r"nowhere\.beton: No such file"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, options: dict, message: str, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "train/a/1.png", "test/a/1.png")
        with pytest.raises(DataError, match=message):
            open_source(root, with_class_names(SourceOptions(**options)))

    def test_a_split_that_may_be_two_folders_is_asked_for_by_name(self, tmp_path: Path) -> None:
        root = make_tree(tmp_path / "in", "trainA/1.png", "trainB/1.png")
        with pytest.raises(DataError, match="may be any of trainA, trainB"):
            open_source(root, "train")
        assert list(images_and_classes(open_source(root, "trainB"))) == ["trainB/1.png"]


class TestLists:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return make_tree(tmp_path / "in", "1.png", "2.png", "sub/3.png", "sub/é b.png")

    def test_labels_from_a_csv(self, root: Path, tmp_path: Path) -> None:
        table = tmp_path / "labels.csv"
        table.write_text('﻿name,label,split\r\n./1.png,dog,x\r\nsub/3.png,"cat, big",x\r\n"sub/é b.png",dog,x\r\n')
        source = open_source(root, SourceOptions(labels=str(table)))
        assert source.class_names == ("cat, big", "dog")
        assert images_and_classes(source) == {
            "1.png": "dog", "2.png": None, "sub/3.png": "cat, big", "sub/é b.png": "dog",
        }  # fmt: skip
        assert f"labels from {table}" in source.account.layout
        assert [(group.count, group.names) for group in source.account.notes] == [(1, ("2.png",))]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("file,animal\n1.png,a\n", "begins with `file,animal`; expected the header `name,label`"),
            ("file,path,class\n1.png,1.png,a\n", "has the columns file, path; say which with a header that begins"),
            ("file,label,class\n1.png,a,b\n", "has the columns label, class; say which with --label-key"),
            ("", "expected the header"),
            ("name,label\n1.png,a\n1.png,b\n", "line 3: 1.png has the label `b`, and `a` above"),
            ("name,label\n1.png\n", "line 2: has no label: 1.png"),
            (
                "name,label\n" + "".join(f"x{i},a\n" for i in range(7)),
                "7 of 7 names .*: x0, x1, x2, x3, x4, …; a name that",
            ),
        ],
    )
    def test_a_csv_that_does_not_fit_is_refused(self, content: str, message: str, root: Path, tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(DataError, match=rf"labels\.csv.*{message}"):
            open_source(root, SourceOptions(labels=str(tmp_path / "labels.csv")))

    def test_a_list_of_files(self, root: Path, tmp_path: Path) -> None:
        (root / "4.dat").write_bytes((root / "1.png").read_bytes())
        (tmp_path / "list").write_text("sub/é b.png\n\n./1.png\r\n4.dat\n1.png\n")
        source = open_source(root, SourceOptions(files=str(tmp_path / "list"), layout="flat"))
        assert list(images_and_classes(source)) == ["1.png", "4.dat", "sub/é b.png"]
        assert source.read(1).shape == (8, 8, 3)
        assert source.account.left_out == ()
        assert f"only images that {tmp_path / 'list'} names, of 5 files" in source.account.layout

    @pytest.mark.parametrize("names", [["no.png"], ["1.png", "sub"], ["/1.png"], ["sub/../1.png"], ["1.PNG", "2.png"]])
    def test_a_listed_name_that_is_not_there_is_refused(self, names: list[str], root: Path, tmp_path: Path) -> None:
        (tmp_path / "list").write_text("\n".join(names))
        with pytest.raises(DataError, match=f"list: 1 of {len(names)} names are not in {root}: "):
            open_source(root, SourceOptions(files=str(tmp_path / "list")))

    def test_labels_and_lists_for_archives(self, root: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "in.tar", "w") as archive:
            archive.add(root, "in")
        (tmp_path / "labels.csv").write_text("name,label\nin/1.png,b\nin/2.png,a\n")
        (tmp_path / "list").write_text("in/1.png\nin/2.png\n")
        options = SourceOptions(labels=str(tmp_path / "labels.csv"), files=str(tmp_path / "list"))
        assert images_and_classes(open_source(tmp_path / "in.tar", options)) == {"in/1.png": "b", "in/2.png": "a"}

    def test_classes_of_another_dataset(self, tmp_path: Path) -> None:
        train = make_tree(tmp_path / "train", "cow/1.png", "ant/1.png", "bee/1.png")
        test = make_tree(tmp_path / "test", "bee/1.png", "cow/1.png")
        of_folder = open_source(test, SourceOptions(classes_from=str(train)))
        in_another_order = SourceOptions(class_names=("cow", "ant", "bee"))
        prepare(train, tmp_path / "train.beton", options=in_another_order, num_workers=1)
        (tmp_path / "link.beton").symlink_to(tmp_path / "train.beton")
        options = with_class_names(SourceOptions(classes_from=str(tmp_path / "link.beton")))
        of_beton = open_source(test, options)
        assert (of_folder.class_names, of_folder.labels.tolist()) == (("ant", "bee", "cow"), [1, 2])
        assert (of_beton.class_names, of_beton.labels.tolist()) == (("cow", "ant", "bee"), [2, 0])
        make_tree(tmp_path / "other", "x/1.png", "y/1.png")
        other = tmp_path / "other.beton"
        prepare(tmp_path / "other", other, num_workers=1)
        shutil.copy(sidecar_path(tmp_path / "train.beton"), sidecar_path(other))
        with pytest.raises(DataError, match=r"classes have no names, because .*other\.beton\.json belongs to another"):
            prepare(test, tmp_path / "test.beton", options=SourceOptions(classes_from=str(other)), num_workers=1)
        sidecar_path(other).unlink()
        with pytest.raises(DataError, match=r"other\.beton\.json is missing"):
            with_class_names(SourceOptions(classes_from=str(other)))
        make_tree(test, "dog/1.png")
        with pytest.raises(DataError, match=f"1 of its classes are not among those of {train}: dog"):
            open_source(test, SourceOptions(classes_from=str(train)))
