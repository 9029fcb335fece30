"""JPEG files that `prepare` stores as they came: the same pixels for every decoder, and nothing but what these need.

Run: pytest tests/test_kept_jpeg.py
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.cli import main
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.beton.kept_jpeg import Steps, keep, plain_steps
from simclr_dist.data.beton.prepare import PreparedInfo, prepare
from simclr_dist.data.beton.reader import JPEG, open_beton, sidecar_path
from simclr_dist.data.beton.writer import PagedWriter, Record
from simclr_dist.data.decode.crops import center_crops
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.data.sources import turbojpeg
from simclr_dist.data.sources.jpeg_file import read_jpeg_file
from tests.images import make_image
from tests.test_data_ffcv import run

HEIGHT, WIDTH = 123, 167  # no multiples of a block
PIXELS = make_image(0, HEIGHT, WIDTH)
needs_ffcv = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def jpeg(pixels: np.ndarray = PIXELS, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 80, **options})
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe" + bytes([0, 100, 0, 0, 0, 0, transform]))


def numbered(content: bytes, numbers: bytes) -> bytes:
    """With other numbers for the components than 1, 2, 3, in the frame and in the scan."""
    changed = bytearray(content)
    for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
        start = content.index(marker) + first
        changed[start : start + 3 * step : step] = numbers
    return bytes(changed)


def without_start(content: bytes) -> bytes:
    """Without SOI and the JFIF segment."""
    return content[20:]


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    found[0x010E] = "at the secret place"
    return found


KEPT = {
    "plain": jpeg(),
    "of the same quality": jpeg(quality=90),
    "very coarse": jpeg(quality=5),
    "its own Huffman tables": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=3),
    "restarts in every row": jpeg(restart_marker_rows=1),
    "upright EXIF": jpeg(exif=exif(1)),
    "EXIF that makes no sense": jpeg(exif=exif(9)),
    "a comment": jpeg(comment=b"at the secret place"),
    "a colour profile": jpeg(icc_profile=b"at the secret place" * 9000),
    "bytes behind the end": jpeg() + b"at the secret place" + jpeg(),
    "no JFIF": b"\xff\xd8" + without_start(jpeg()),
    "Adobe's YCbCr": b"\xff\xd8" + adobe(1) + without_start(jpeg()),
    "JFIF and Adobe's RGB": b"\xff\xd8" + adobe(0) + jpeg()[2:],
    "components 0, 1, 2": numbered(jpeg(), b"\0\1\2"),
    "components R, G, B": numbered(jpeg(), b"RGB"),
    "colours coarser than brightness": jpeg(quality=50, qtables=[[30] * 64, [90] * 64]),
    "a pixel more than blocks": jpeg(make_image(1, 97, 129)),
}

ENCODED = {
    "finer": jpeg(quality=95),
    "finer colours": jpeg(quality=50, qtables=[[90] * 64, [1] * 64]),
    "one finer step": jpeg(quality=50, qtables=[[90] * 63 + [1], [90] * 64]),
    "4:4:4": jpeg(subsampling="4:4:4"),
    "4:2:2": jpeg(subsampling="4:2:2"),
    "progressive": jpeg(progressive=True),
    "extended": jpeg().replace(b"\xff\xc0", b"\xff\xc1", 1),
    "a comment behind the scan": jpeg()[:-2] + segment(0xFE, b"at the secret place") + b"\xff\xd9",
    "grey": jpeg(PIXELS[..., 0]),
    "turned": jpeg(exif=exif(6)),
    "mirrored": jpeg(exif=exif(2)),
    "Adobe's RGB": b"\xff\xd8" + adobe(0) + without_start(jpeg()),
    "R, G, B without JFIF": numbered(b"\xff\xd8" + without_start(jpeg()), b"RGB"),
    "damaged": jpeg()[:2000] + b"\xff\xd4" + jpeg()[2000:],
}


def prepared(tmp_path: Path, contents: list[bytes], **options) -> PreparedInfo:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for i, content in enumerate(contents):
        (folder / f"{i:02d}.jpg").write_bytes(content)
    return prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1, on_error="skip", **options)


def records(path: Path) -> list[bytes]:
    content = path.read_bytes()
    with open_beton(path) as beton:
        rows = zip(beton.images["data_ptr"].tolist(), beton.record_bytes.tolist(), strict=True)
        return [content[offset : offset + size] for offset, size in rows]


def steps_of(content: bytes) -> Steps:
    file = read_jpeg_file(content)
    steps = None if file is None else plain_steps(file)
    assert steps is not None
    return steps


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_kept_files_have_the_pixels_of_their_source(tmp_path: Path) -> None:
    info = prepared(tmp_path, list(KEPT.values()))
    assert info.num_kept_jpeg == len(KEPT)
    stored = records(tmp_path / "out.beton")
    source = BetonSource(tmp_path / "out.beton")
    for i, ((name, content), record) in enumerate(zip(KEPT.items(), stored, strict=True)):
        assert np.array_equal(pixels_of(record), pixels_of(content)), name
        assert np.array_equal(source.read(i), pixels_of(content)), name
        assert b"secret" not in record, name
        assert len(record) <= len(content) + 20, name
        assert record.count(b"\xff\xd9") == 1, name


def write_as_they_are(path: Path, contents: list[bytes]) -> None:
    with path.open("wb") as file:
        writer = PagedWriter(file, len(contents))
        for content in contents:
            writer.add(Record(content, JPEG, *pixels_of(content).shape[:2], 0))
        writer.finish()


@needs_ffcv
def test_kept_files_and_their_sources_are_the_same_to_our_kernel(tmp_path: Path) -> None:
    from simclr_dist.data.loading.ffcv_images import BetonImages

    prepared(tmp_path, list(KEPT.values()))
    write_as_they_are(tmp_path / "source.beton", list(KEPT.values()))
    ids, size, seen = np.arange(len(KEPT)), 90, []
    for name in ("out", "source"):
        images = BetonImages(tmp_path / f"{name}.beton")
        assert images.damaged(ids) == {}
        out = np.empty((1, len(ids), size, size, 3), np.uint8)
        images.fill(ids, lambda heights, widths: center_crops(heights, widths, size)[None], out)
        seen.append(out)
        images.close()
    assert np.array_equal(*seen)


@needs_ffcv
def test_kept_files_and_their_sources_are_the_same_to_stock_ffcv(tmp_path: Path) -> None:
    prepared(tmp_path, list(KEPT.values()))
    write_as_they_are(tmp_path / "source.beton", list(KEPT.values()))
    script = """
        from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        seen = []
        for path in sys.argv[1:]:
            loader = Loader(path, batch_size=3, num_workers=1, order=OrderOption.SEQUENTIAL,
                            pipelines={"image": [CenterCropRGBImageDecoder((64, 64), ratio=0.7)]})
            seen.append(np.concatenate([images.copy() for images, _ in loader]))
        print(len(seen[0]), np.array_equal(*seen), seen[0].std() > 20)
    """
    assert run(script, tmp_path / "out.beton", tmp_path / "source.beton") == f"{len(KEPT)} True True"


@pytest.mark.parametrize("name", ENCODED)
def test_all_others_are_encoded_again(name: str, tmp_path: Path) -> None:
    assert prepared(tmp_path, [ENCODED[name]]).num_kept_jpeg == 0
    (record,) = records(tmp_path / "out.beton")
    assert steps_of(record) == steps_of(jpeg(quality=90))


def test_a_file_without_its_end_is_left_out(tmp_path: Path) -> None:
    info = prepared(tmp_path, [KEPT["plain"][:-2], KEPT["plain"]])
    assert (info.num_samples, info.num_kept_jpeg, len(info.skipped)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"quality": 80}, 1),
        ({"quality": 81}, 1),
        ({"quality": 79}, 0),
        ({"max_side": WIDTH}, 1),
        ({"max_side": WIDTH - 1}, 0),
        ({"mode": "raw"}, 0),
        ({"mode": "jpg"}, 1),
        ({"options": SourceOptions(bands=(3, 2, 1))}, 0),
    ],
)
def test_options_that_change_pixels_or_quality(options: dict, kept: int, tmp_path: Path) -> None:
    assert prepared(tmp_path, [KEPT["plain"]], **options).num_kept_jpeg == kept


def test_small_files_are_raw_unless_jpeg_is_asked_for(tmp_path: Path) -> None:
    small = jpeg(make_image(0, 32, 32))
    assert prepared(tmp_path / "auto", [small]).num_kept_jpeg == 0
    assert prepared(tmp_path / "jpg", [small], mode="jpg").num_kept_jpeg == 1


def test_without_libturbojpeg_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow does not say whether a file is damaged."""
    monkeypatch.setattr(turbojpeg, "_library", lambda: None)
    assert prepared(tmp_path, [KEPT["plain"]]).num_kept_jpeg == 0


def test_the_number_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepared(tmp_path, [KEPT["plain"], KEPT["restarts"], ENCODED["4:4:4"]])
    assert json.loads(sidecar_path(tmp_path / "out.beton").read_text())["num_kept_jpeg"] == 2
    assert describe(str(tmp_path / "out.beton")).num_samples == 3
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out.beton")])
    assert "3 (3 JPEG, 2 of them as they came; 0 raw)" in capsys.readouterr().out


def test_statistics_count_kept_files(tmp_path: Path) -> None:
    prepared(tmp_path, [KEPT["plain"]])
    sidecar = json.loads(sidecar_path(tmp_path / "out.beton").read_text())
    counted = pixels_of(KEPT["plain"])[::16, ::16].reshape(-1, 3) / 255
    np.testing.assert_allclose(sidecar["mean"], counted.mean(0), atol=0.004)  # where colours are halved, but for a blur
    np.testing.assert_allclose(sidecar["std"], counted.std(0), atol=0.004)


def test_unusual_headers_are_not_kept() -> None:
    content = jpeg()
    in_part = content.replace(b"\x00\x3f\x00", b"\x00\x05\x00", 1)  # a scan of some coefficients
    assert in_part != content
    file = read_jpeg_file(in_part)
    assert file is not None
    assert plain_steps(file) is None
    with_16_bits = content[:20] + segment(0xDB, b"\x10" + bytes(64)) + content[20:]
    assert read_jpeg_file(with_16_bits) is None


class TestUntrustedFiles:
    """Whatever the bytes are, the segments are read in a time that grows with their number, and no further."""

    def taken_apart(self, content: bytes) -> bytes | None:
        file = read_jpeg_file(content)
        return None if file is None else keep(file, steps_of(jpeg(quality=100)))

    @pytest.mark.parametrize("name", ["plain", "restarts", "upright EXIF", "Adobe's YCbCr", "a colour profile"])
    def test_every_cut_ends_well(self, name: str) -> None:
        content = KEPT[name]
        header = content.index(b"\xff\xda") + 14
        for end in (*range(min(header, 3000)), *range(header, len(content), 97)):
            assert self.taken_apart(content[:end]) is None

    def test_every_changed_byte_of_the_header_ends_well(self) -> None:
        content, num_compared = KEPT["plain"], 0
        for at in range(content.index(b"\xff\xda") + 14):
            for value in (0, 1, 0x7F, 0xFF, content[at] ^ 1):
                changed = content[:at] + bytes([value]) + content[at + 1 :]
                kept, file = self.taken_apart(changed), read_jpeg_file(changed)
                if kept is None or file is None or file.width * file.height > 10**6:
                    continue
                before, after = (turbojpeg.decode_jpeg(c, file.width, file.height) for c in (changed, kept))
                if isinstance(before, np.ndarray):  # what is damaged is not kept
                    num_compared += 1
                    assert np.array_equal(before, after)
        assert num_compared > 100

    @pytest.mark.parametrize(
        "content",
        [
            jpeg()[:-2] + b"\xff" * 2_000_000,
            jpeg()[:-2] + b"\xff" * 2_000_000 + b"\0" + b"\xff\xd9",
            jpeg()[:-2] + b"\xff\0" * 1_000_000,
            b"\xff\xd8" + segment(0xFE, b"") * 500_000,
            b"\xff\xd8" + segment(0xDB, b"") * 500_000,
            b"\xff\xd8" + segment(0xDB, bytes(65)) * 30_000,
            b"\xff\xd8" + b"\xff\xfe\0\0" * 500_000,
            b"\xff" * 2_000_000,
        ],
        ids=range(8),
    )
    def test_two_megabytes_take_less_than_five_seconds(self, content: bytes) -> None:
        begin = time.process_time()
        self.taken_apart(content)
        assert time.process_time() - begin < 5
