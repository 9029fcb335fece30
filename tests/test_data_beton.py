"""Opening .beton files: every kind of damage is told at once, in one line that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import ALLOCATION, DESCRIPTOR, HEADER, metadata_type, open_beton, sidecar_path
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError
from tests.images import make_folder

NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    make_folder(root / "images", NUM_SAMPLES)
    prepare(root / "images", root / "whole.beton", mode="smart", num_workers=1)
    return root / "whole.beton"


class Editor:
    """A file's tables as arrays that can be written to."""

    def __init__(self, content: bytes) -> None:
        self.content = np.frombuffer(content, np.uint8).copy()
        self.header = self.content[: HEADER.itemsize].view(HEADER)
        self.fields = self.content[HEADER.itemsize :][: 2 * DESCRIPTOR.itemsize].view(DESCRIPTOR)
        row = metadata_type([2, 1])
        start = HEADER.itemsize + 2 * DESCRIPTOR.itemsize
        self.metadata = self.content[start : start + NUM_SAMPLES * row.itemsize].view(row)
        self.table_start = int(self.header["alloc_table_ptr"][0])
        self.table = self.content[self.table_start :].view(ALLOCATION)


def raw_sample(edit: Editor) -> int:
    return int(np.flatnonzero(edit.metadata["f0"]["mode"] == 1)[0])


def jpeg_sample(edit: Editor) -> int:
    return int(np.flatnonzero(edit.metadata["f0"]["mode"] == 0)[0])


DAMAGES = {
    # what somebody did to the file: (how, what they read)
    "empty": (lambda e: b"", "not a .beton file (0 bytes)"),
    "ten bytes": (lambda e: bytes(10), "not a .beton file (10 bytes)"),
    "text": (lambda e: b"hello, this is text " * 99, "not a .beton file of version 2"),
    "cut in the header's fields": (lambda e: e.content[:500].tobytes(), "truncated: 500 bytes"),
    "cut in the metadata": (lambda e: e.content[:2200].tobytes(), "truncated: 2200 bytes"),
    "cut in half": (lambda e: e.content[: len(e.content) // 2].tobytes(), "truncated: "),
    "cut within the table": (lambda e: e.content[: e.table_start + 5 * 24].tobytes(), "allocation table has 120 bytes"),
    "cut within a row of the table": (lambda e: e.content[:-7].tobytes(), "allocation table has 281 bytes"),
    "table cut off": (lambda e: e.content[: e.table_start].tobytes(), "allocation table has 0 bytes"),
    "never finished": (lambda e: e.header["alloc_table_ptr"].fill(0), "unfinished: its writer was interrupted"),
    "bytes behind the table": (lambda e: e.content.tobytes() + bytes(24), "allocation table has 312 bytes"),
    "metadata all zero": (lambda e: e.metadata.view(np.uint8).fill(0), "sample 0 is not in the allocation table"),
    "no samples": (lambda e: e.header["num_samples"].fill(0), "holds no samples"),
    "no fields": (lambda e: e.header["num_fields"].fill(0), "holds no samples"),
    "far too many samples": (lambda e: e.header["num_samples"].fill(2**60), "truncated"),
    "record beyond the data": (lambda e: e.table["size"][3:4].fill(2**40), "points outside of the data"),
    "record beyond 2^64": (lambda e: e.table["size"][3:4].fill(2**64 - 1), "points outside of the data"),
    "record within the header": (lambda e: e.table["ptr"][:1].fill(0), "points outside of the data"),
    "records overlap": (lambda e: e.table["size"][:-1].__iadd__(1), "records overlap"),
    "sample points nowhere": (
        lambda e: e.metadata["f0"]["data_ptr"].__setitem__(4, 12345),
        "sample 4 is not in the allocation table",
    ),
    "unknown mode": (lambda e: e.metadata["f0"]["mode"].__setitem__(2, 7), "damaged: sample 2"),
    "no height": (lambda e: e.metadata["f0"]["height"].__setitem__(2, 0), "damaged: sample 2"),
    "raw of another size": (lambda e: e.metadata["f0"]["width"].__setitem__(raw_sample(e), 999), "999 x"),
    "an unknown kind of field": (lambda e: e.fields["type_id"].__setitem__(1, 255), "field `label` has type 255"),
    "no image field": (lambda e: e.fields["type_id"].__setitem__(0, 1), "has no image field"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(damage: str, whole: Path, tmp_path: Path) -> None:
    edit = Editor(whole.read_bytes())
    how, message = DAMAGES[damage]
    changed = how(edit)
    bad = tmp_path / "bad.beton"
    bad.write_bytes(changed if isinstance(changed, bytes) else edit.content.tobytes())
    with pytest.raises(DataError) as caught:
        describe(str(bad))
    text = str(caught.value)
    assert text.startswith(f"{bad}: ")
    assert message in text
    assert "\n" not in text


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory; make it with `simclr-dist prepare"):
        open_beton(tmp_path / "missing.beton")
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(DataError, match="is a folder, not a"):
        open_beton(tmp_path / "folder.beton")


def test_editor_itself_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """So that the tests above fail for the reason they name."""
    same = tmp_path / "same.beton"
    same.write_bytes(Editor(whole.read_bytes()).content.tobytes())
    assert describe(str(same)).fingerprint == describe(str(whole)).fingerprint


def test_records_say_where_images_lie(whole: Path) -> None:
    edit = Editor(whole.read_bytes())
    with open_beton(whole) as beton:
        records = beton.records(np.array([jpeg_sample(edit), raw_sample(edit)]))
    for (offset, size, mode, height, width), expected_mode in zip(records.tolist(), (0, 1), strict=True):
        assert mode == expected_mode
        content = edit.content[offset : offset + size]
        assert size == 3 * height * width if mode else content[:2].tobytes() == b"\xff\xd8"


def test_class_names_come_from_the_sidecar(whole: Path, tmp_path: Path) -> None:
    assert describe(str(whole)).class_names == ("class0", "class1", "class2")
    alone = tmp_path / "alone.beton"
    alone.write_bytes(whole.read_bytes())
    assert describe(str(alone)).class_names == ("0", "1", "2")
    sidecar_path(alone).write_text("{ not JSON")
    with pytest.raises(DataError, match=r"alone\.beton\.json: cannot be read"):
        describe(str(alone))


def test_opening_reads_tables_not_images(whole: Path) -> None:
    """Tables stay in the page cache, shared by all processes of a node."""
    with open_beton(whole) as beton:
        assert isinstance(beton.images, np.memmap)
