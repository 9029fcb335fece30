"""What becomes of one image: its pixels, or an error with its name that says what is wrong and what to type.

Run: pytest tests/test_decoding.py
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from simclr_dist.data.account import Account, OnDamage, SourceOptions
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.sources import decoding, tiff, turbojpeg
from simclr_dist.data.sources.content import FileBytes
from simclr_dist.data.sources.decoding import decode
from simclr_dist.data.sources.images import FileImages
from simclr_dist.data.sources.open import open_source
from simclr_dist.data.sources.sample_values import Decoding
from simclr_dist.errors import DataError
from tests.images import SIZES, make_image
from tests.tiff_files import tiff_bytes

HEIGHT, WIDTH = 24, 30
RGB = make_image(0, HEIGHT, WIDTH)
GREY = RGB[..., :1]
FOUR_BANDS = np.dstack([RGB, make_image(3, HEIGHT, WIDTH)[..., 0] // 2 + 60])


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(values: np.ndarray) -> bytes:
    """PNG of uint16 [H, W, S], which Pillow writes for grey only."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, num_samples = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[num_samples]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def pixels_of(content: bytes, **options) -> np.ndarray:
    return decode(io.BytesIO(content), Decoding(**options)).pixels


def as_files(root: Path, contents: list[bytes], **options) -> FileImages:
    paths = [root / f"{i}.img" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    entries = [(str(path), FileBytes(str(path))) for path in paths]
    labels = np.full(len(paths), -1, np.int64)
    return FileImages((), labels, entries, Account("", "", len(paths)), decoding=Decoding(**options))


class TestPixels:
    """JPEG goes around Pillow's decoder, so its pixels are compared with Pillow's."""

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
    def test_jpeg_has_the_pixels_of_pillow(self, subsampling: str, progressive: bool) -> None:
        for i, (height, width) in enumerate([*SIZES, (1, 1), (1, 40)]):
            image = make_image(i, height, width)
            for shown in (image, image[..., 0]):
                content = encoded(shown, "JPEG", quality=40 + 7 * i, subsampling=subsampling, progressive=progressive)
                found = decode(io.BytesIO(content))
                assert np.array_equal(found.pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
                assert found.damage is None

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation_of_exif(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(RGB, kind, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert np.array_equal(pixels_of(content), np.asarray(expected))

    def test_without_libturbojpeg_pixels_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = encoded(RGB, "JPEG")
        before = pixels_of(content)
        monkeypatch.setattr(turbojpeg, "_library", lambda: None)
        assert np.array_equal(pixels_of(content), before)
        assert "apt install" in str(turbojpeg.unavailable())


class TestTiff:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
    def test_samples_are_read_as_they_were_written(self, dtype: type) -> None:
        values = np.random.default_rng(0).integers(0, 120, (20, 37, 5)).astype(dtype) * dtype(
            1 if dtype(0).itemsize < 2 else 99
        )
        predictors = (1, 3) if np.dtype(dtype).kind == "f" else (1, 2)
        kinds = product("<>", (False, True), (False, True), (None, 16), predictors)
        for byte_order, big, planar, tile, predictor in kinds:
            layout = {"byte_order": byte_order, "big": big, "planar": planar, "tile": tile, "predictor": predictor}
            content = tiff_bytes(values, deflate=predictor != 1, **layout)
            (page,) = tiff.pages(io.BytesIO(content))
            assert np.array_equal(tiff.read_samples(content, page), values), layout

    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    def test_pillows_compressions(self, compression: str) -> None:
        values = (GREY.astype(np.uint16) << 8)[..., 0]
        assert np.array_equal(pixels_of(encoded(values, "TIFF", compression=compression)), np.repeat(GREY, 3, 2))

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_orientation(self, orientation: int) -> None:
        turned = pixels_of(tiff_bytes(RGB.astype(np.uint16) << 8, photometric=2, orientation=orientation))
        assert np.array_equal(turned, np.rot90(RGB, {1: 0, 3: 2, 6: -1, 8: 1}[orientation]))

    def test_white_may_be_zero(self) -> None:
        content = tiff_bytes((255 - GREY.astype(np.uint16)) * 257, photometric=0)
        assert np.array_equal(pixels_of(content), np.repeat(GREY, 3, 2))

    def test_metadata_that_pillow_cannot_bear_costs_no_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object, **__: object) -> None:
            raise struct.error("required argument is not an integer")

        content = encoded(RGB, "TIFF", description="x")
        load_end = decoding.Image.Image.load
        calls = []

        def fails_once(image: Image.Image) -> object:
            calls.append(image)
            return broken() if len(calls) == 1 else load_end(image)

        monkeypatch.setattr(decoding.Image.Image, "load", fails_once)
        assert np.array_equal(pixels_of(content), RGB)


# What is not 8-bit grey or RGB: the file, and what the refusal must hold.
DEEP = {
    "uint16 with 12 bits": (encoded((GREY[..., 0].astype(np.uint16) * 16), "PNG"), "uint16", "--range 0 4095"),
    "uint16 with 8 bits": (encoded(GREY[..., 0].astype(np.uint16), "PNG"), "uint16", "--range 0 255"),
    "48-bit RGB with 12 bits": (png_of_16_bits(RGB.astype(np.uint16) * 16), "uint16", "--range 0 4095"),
    "TIFF of 48-bit RGB with 10 bits": (
        tiff_bytes(RGB.astype(np.uint16) * 4, photometric=2),
        "uint16",
        "--range 0 1023",
    ),
    "int16": (tiff_bytes(GREY.astype(np.int16) * 16 - 2000), "int16", "--range -"),
    "uint32": (tiff_bytes(GREY.astype(np.uint32) * 1000), "uint32", "--range 0 262143"),
    "int8": (tiff_bytes((GREY.astype(np.int16) - 128).astype(np.int8)), "int8", "--range -"),
    "float32": (tiff_bytes(GREY.astype(np.float32) / 255), "float32", "--range 0 1"),
    "float64": (tiff_bytes(GREY.astype(np.float64) * 3 - 200), "float64", "--range 172 565"),
}
BANDS = {
    "5 bands": tiff_bytes(np.dstack([RGB[..., ::-1], RGB[..., :2]])),
    "5 planes": tiff_bytes(np.dstack([RGB[..., ::-1], RGB[..., :2]]), planar=True),
    "13 bands": tiff_bytes(np.dstack([RGB[..., ::-1]] + [GREY] * 10), deflate=True, tile=16),
    "near infrared without a name": tiff_bytes(np.dstack([RGB[..., ::-1], GREY]), photometric=2, extra=(0,)),
    "near infrared as alpha in TIFF": tiff_bytes(FOUR_BANDS[..., [2, 1, 0, 3]], photometric=2, extra=(2,)),
    "near infrared as alpha in PNG": encoded(FOUR_BANDS[..., [2, 1, 0, 3]], "PNG"),
    "near infrared as alpha in WebP": encoded(FOUR_BANDS[..., [2, 1, 0, 3]], "WEBP", lossless=True, exact=True),
}


class TestValuesAndBands:
    @pytest.mark.parametrize("name", DEEP)
    def test_values_without_a_known_range_are_refused_with_what_to_type(self, name: str, tmp_path: Path) -> None:
        content, dtype, option = DEEP[name]
        with pytest.raises(DataError) as caught:
            as_files(tmp_path, [content]).read(0)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / "0.img"))
        assert f"{dtype}, {HEIGHT} x {WIDTH} x " in text
        assert "values from " in text
        assert option in text

    @pytest.mark.parametrize("name", DEEP)
    def test_a_range_maps_them(self, name: str) -> None:
        scale, shift = {
            "uint16 with 12 bits": (16, 0),
            "48-bit RGB with 12 bits": (16, 0),
            "TIFF of 48-bit RGB with 10 bits": (4, 0),
            "int16": (16, -2000),
            "uint32": (1000, 0),
            "int8": (1, -128),
            "float32": (1 / 255, 0),
            "float64": (3, -200),
        }.get(name, (1, 0))
        expected = RGB if "RGB" in name else np.repeat(GREY, 3, 2)
        pixels = pixels_of(DEEP[name][0], value_range=(shift, 255 * scale + shift))
        assert np.array_equal(pixels, expected)

    def test_a_range_cuts_what_lies_outside(self) -> None:
        values = np.array([[-5.0, 0, 1, 2, 9, np.nan, np.inf, -np.inf]], np.float32)[..., None]
        assert pixels_of(tiff_bytes(values), value_range=(0, 2))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
        with pytest.raises(DataError, match="two different values"):
            Decoding(value_range=(3, 3))

    @pytest.mark.parametrize("name", BANDS)
    def test_bands_without_colours_are_refused_with_what_to_type(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"0\.img: uint8, {HEIGHT} x {WIDTH} x \d+, .*--bands"):
            as_files(tmp_path, [BANDS[name]]).read(0)

    @pytest.mark.parametrize("name", BANDS)
    def test_bands_are_taken_as_asked(self, name: str) -> None:
        assert np.array_equal(pixels_of(BANDS[name], bands=(3, 2, 1)), RGB)
        with pytest.raises(DataError, match=r"there are no --bands 1 2 14, only 1 to \d+"):
            pixels_of(BANDS[name], bands=(1, 2, 14))

    def test_bands_and_range_together(self) -> None:
        content = tiff_bytes(np.dstack([GREY.astype(np.uint16)] * 10 + [RGB.astype(np.uint16) * 16]))
        with pytest.raises(DataError, match=r"uint16, 24 x 30 x 13, .*--bands I J K, each from 1 to 13; and --range"):
            pixels_of(content)
        assert np.array_equal(pixels_of(content, bands=(11, 12, 13), value_range=(0, 4080)), RGB)

    def test_bands_of_plain_images(self) -> None:
        assert np.array_equal(pixels_of(encoded(RGB, "PNG"), bands=(3, 2, 1)), RGB[..., ::-1])
        assert np.array_equal(pixels_of(encoded(GREY[..., 0], "BMP"), bands=(1, 1, 1)), np.repeat(GREY, 3, 2))
        palette = Image.fromarray(RGB).quantize(16)
        turned = np.asarray(palette.convert("RGB"))[..., ::-1]
        for content in (encoded(palette, "GIF"), encoded(palette, "TIFF")):
            assert np.array_equal(pixels_of(content, bands=(3, 2, 1)), turned)
        for kind in ("JPEG", "PNG", "TIFF"):
            with pytest.raises(DataError, match="there are no --bands 4 3 2, only 1 to 3"):
                pixels_of(encoded(RGB, kind), bands=(4, 3, 2))

    @pytest.mark.parametrize("kind", ["grey PNG", "RGB PNG", "grey TIFF", "RGB TIFF", "PGM", "12-bit PGM"])
    def test_16_bits_that_are_used_keep_the_upper_byte(self, kind: str) -> None:
        values = (RGB if "RGB" in kind else GREY).astype(np.uint16) * 256 + 99
        content = {
            "PNG": lambda: png_of_16_bits(values),
            "TIFF": lambda: tiff_bytes(values, photometric=2 if "RGB" in kind else 1),
            "PGM": lambda: b"P5 30 24 65535\n" + values.astype(">u2").tobytes(),
        }[kind.split()[-1]]()
        if kind == "12-bit PGM":  # the file says its largest value
            content = b"P5 30 24 4095\n" + (values >> 4).astype(">u2").tobytes()
        assert np.array_equal(pixels_of(content), np.broadcast_to(RGB if "RGB" in kind else GREY, RGB.shape))

    @pytest.mark.parametrize("kind", ["solid", "cut out", "soft edge", "one opacity", "16 bits"])
    def test_transparency_lies_on_white(self, kind: str) -> None:
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        alpha = {
            "solid": np.full((HEIGHT, WIDTH), 255),
            "cut out": np.where(x > 12, 255, 0),
            "soft edge": np.clip((x - 10) * 40, 0, 255),
            "one opacity": np.full((HEIGHT, WIDTH), 128),
            "16 bits": np.where(y > 12, 255, 0),
        }[kind].astype(np.uint8)
        rgba = np.dstack([RGB, alpha])
        content = png_of_16_bits(rgba.astype(np.uint16) * 257) if kind == "16 bits" else encoded(rgba, "PNG")
        share = alpha[..., None] / 255
        assert abs(pixels_of(content) - (RGB * share + 255 * (1 - share))).max() <= 1


class TestPages:
    """Several pages in a TIFF: channels of a microscope, or simply more images."""

    PAGES = (GREY, 255 - GREY, GREY // 2)

    def test_the_first_page_is_taken_and_it_is_said(self) -> None:
        found = decode(io.BytesIO(tiff_bytes(*self.PAGES)))
        assert np.array_equal(found.pixels, np.repeat(GREY, 3, 2))
        assert (found.note, found.damage) == ("only the first of its 3 pages is taken", None)
        two = encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(RGB)])
        assert decode(io.BytesIO(two)).note == "only the first of its 2 pages is taken"

    @pytest.mark.parametrize("on_damage", ["warn", "skip", "stop"])
    def test_taking_the_first_page_is_no_damage(self, on_damage: OnDamage, tmp_path: Path) -> None:
        (tmp_path / "in" / "a").mkdir(parents=True)
        for i in range(2):
            (tmp_path / "in" / "a" / f"{i}.tif").write_bytes(tiff_bytes(*self.PAGES[i:]))
        options = SourceOptions(on_damage=on_damage)
        info = prepare(tmp_path / "in", tmp_path / "out.beton", options=options, num_workers=1, strict=True)
        assert (info.num_samples, info.damaged) == (2, ())
        (note,) = info.account.notes
        assert note.count == 2
        assert note.names[0].endswith("0.tif: only the first of its 3 pages is taken")
        assert open_source(tmp_path / "in", options).read(0).shape == RGB.shape

    def test_bands_are_pages_when_pages_are_grey(self) -> None:
        found = decode(io.BytesIO(tiff_bytes(*self.PAGES)), Decoding(bands=(3, 1, 2)))
        assert np.array_equal(found.pixels, np.concatenate([self.PAGES[i] for i in (2, 0, 1)], axis=2))
        assert found.note is None


class TestDamage:
    def damaged(self) -> dict[str, bytes]:
        whole = encoded(make_image(0, 150, 200), "JPEG", quality=90)
        middle = len(whole) // 2
        return {
            "a marker within": whole[:middle] + b"\xff\xd4" + whole[middle:],
            "bytes removed": whole[:middle] + whole[middle + 200 :],
            "bytes overwritten": whole[:middle] + b"\xff" * 64 + whole[middle + 64 :],
            "bytes twice": whole[:middle] + whole[middle - 300 :],
        }

    def test_what_the_decoder_warns_of_is_damage(self, tmp_path: Path) -> None:
        contents = self.damaged()
        images = as_files(tmp_path, list(contents.values()))
        for i, name in enumerate(contents):
            found = images.decoded(i)
            assert found.pixels.shape == (150, 200, 3), name
            assert "Corrupt JPEG data" in str(found.damage), name
            assert np.array_equal(images.read(i), found.pixels)

    def test_most_random_bytes_are_noticed(self) -> None:
        """Not all: many strings of bits are Huffman codes of something."""
        rng = np.random.default_rng(0)
        whole = encoded(make_image(0, 150, 200), "JPEG", quality=90)
        num_noticed = 0
        for at in rng.integers(len(whole) // 4, len(whole) - 100, 40):
            changed = whole[:at] + rng.bytes(64) + whole[at + 64 :]
            try:
                num_noticed += decode(io.BytesIO(changed)).damage is not None
            except DataError:
                num_noticed += 1
        assert num_noticed >= 24

    @pytest.mark.parametrize("there", [True, False])
    def test_prepare_says_when_damage_cannot_be_noticed(
        self, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in" / "a").mkdir(parents=True)
        (tmp_path / "in" / "a" / "0.jpg").write_bytes(encoded(RGB, "JPEG"))
        if not there:
            monkeypatch.setattr(turbojpeg, "_library", lambda: None)
        warned = prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1).warnings
        assert [text.startswith("damage within JPEG files is not noticed: ") for text in warned] == [True] * (not there)

    def test_damage_is_noticed_when_bands_are_chosen(self) -> None:
        for content in self.damaged().values():
            assert decode(io.BytesIO(content), Decoding(bands=(3, 2, 1))).damage is not None

    @pytest.mark.parametrize("on_damage", ["skip", "stop"])
    def test_read_refuses_damage_unless_it_may_only_warn(self, on_damage: str, tmp_path: Path) -> None:
        images = as_files(tmp_path, list(self.damaged().values()), on_damage=on_damage)
        for i in range(len(images.labels)):
            with pytest.raises(DataError, match=rf"{i}\.img: Corrupt JPEG data"):
                images.read(i)

    def test_whole_files_are_not_damaged(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        contents = [
            encoded(RGB, "JPEG", exif=exif) + b"bytes behind the end",
            encoded(RGB, "JPEG", progressive=True),
            encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
            encoded(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
            encoded(RGB, "GIF", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
            encoded(RGB, "TIFF"),
        ]
        images = as_files(tmp_path, contents)
        assert [images.decoded(i).damage for i in range(len(contents))] == [None] * len(contents)


class TestFaultsOfOneImage:
    def test_exif_that_cannot_be_written_again_keeps_image_and_rotation(self) -> None:
        """Tag 282 as a signed fraction: Pillow reads it, and fails when it writes EXIF without the orientation."""
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHLL", 0x112, 3, 1, 6)
        exif += struct.pack("<HHLL", 282, 10, 1, 38) + bytes(4) + struct.pack("<ll", -72, 1)
        for kind in ("JPEG", "PNG", "WEBP"):
            content = encoded(RGB, kind, exif=exif)
            plain = pixels_of(encoded(RGB, kind))
            assert np.array_equal(pixels_of(content), np.rot90(plain, -1)), kind

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0garbage!", b"Exif\0\0MM\0*\xff\xff\xff\xff", b""])
    def test_broken_exif_costs_at_most_the_rotation(self, exif: bytes) -> None:
        plain = encoded(RGB, "JPEG")
        content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        assert np.array_equal(pixels_of(content), pixels_of(plain))

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            RecursionError("maximum recursion depth exceeded"),
            struct.error("required argument is not an integer"),
            TypeError("an integer is required"),
            OverflowError("Python int too large"),
            AttributeError("no attribute"),
            RuntimeError("broken"),
            AssertionError(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_whatever_is_raised_names_the_image(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raises(*_: object) -> None:
            raise error

        images = as_files(tmp_path, [encoded(RGB, "PNG")])
        monkeypatch.setattr(decoding, "_to_rgb", raises)
        what = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
        with pytest.raises(DataError, match=rf"0\.img: cannot be decoded: {what}"):
            images.read(0)

    def test_ctrl_c_is_no_fault_of_an_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(decoding, "_to_rgb", interrupted)
        with pytest.raises(KeyboardInterrupt):
            as_files(tmp_path, [encoded(RGB, "PNG")]).read(0)

    def test_what_lies_there_instead_of_an_image_is_said(self, tmp_path: Path) -> None:
        contents = {
            "the file is empty": b"",
            r"begins with b'<html>": b"<html>not found</html>",
            "it is a numpy array, which numpy.load reads": b"\x93NUMPY\x01\0",
            "it is DICOM, which pydicom reads": bytes(128) + b"DICM",
            "it is JPEG XL: pip install pillow-jxl-plugin, or convert it first": b"\xff\x0a jxl",
            "truncated": encoded(RGB, "JPEG")[:-100],
        }
        images = as_files(tmp_path, list(contents.values()))
        for i, text in enumerate(contents):
            with pytest.raises(DataError) as caught:
                images.read(i)
            assert str(caught.value).startswith(f"{tmp_path}/{i}.img: cannot be decoded: ")
            assert text in str(caught.value)

    def test_a_file_that_went_away_is_named(self, tmp_path: Path) -> None:
        images = as_files(tmp_path, [encoded(RGB, "PNG")])
        (tmp_path / "0.img").unlink()
        with pytest.raises(DataError, match=r"0\.img: cannot be read: No such file or directory"):
            images.read(0)


class TestLimit:
    """Pillow warns of more than 89 million pixels, without a name, and refuses twice as many."""

    @pytest.fixture
    def small_limit_of_pillow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)

    @pytest.mark.usefixtures("small_limit_of_pillow")
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF"])
    def test_pillows_limit_neither_warns_nor_refuses(self, kind: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pixels_of(encoded(RGB, kind)).shape == RGB.shape
        assert Image.MAX_IMAGE_PIXELS == 500

    @pytest.mark.usefixtures("small_limit_of_pillow")
    def test_threads_leave_pillows_limit_as_it_was(self) -> None:
        content = encoded(RGB, "PNG")
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(pixels_of, [content] * 200))) == 200
        assert Image.MAX_IMAGE_PIXELS == 500

    @pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "13 bands"])
    def test_our_limit_refuses_before_anything_is_decoded(self, name: str, tmp_path: Path) -> None:
        content = BANDS[name] if name in BANDS else encoded(RGB, name)
        with pytest.raises(DataError, match=r"0\.img: \d+ x \d+ pixels.* are more than 700: say --max-pixels \d+"):
            as_files(tmp_path, [content], max_pixels=700).read(0)


def seeds() -> list[bytes]:
    """One small image in each of 12 forms of 8 formats."""
    exif = Image.Exif()
    exif[0x0112], exif[282] = 6, 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    small = RGB[:12, :14]
    rgba = np.dstack([small, np.where(small[..., 0] > 120, 255, 0).astype(np.uint8)])
    many = np.dstack([small] * 2).astype(np.uint16) << 8
    return [
        encoded(small, "JPEG", exif=exif),
        encoded(small, "JPEG", progressive=True),
        encoded(small, "PNG", exif=exif),
        encoded(rgba, "PNG"),
        png_of_16_bits(small.astype(np.uint16) * 257),
        encoded(small, "GIF"),
        encoded(small, "BMP"),
        encoded(small, "TIFF", exif=exif),
        tiff_bytes(many, planar=True),
        encoded(small, "WEBP", exif=exif),
        encoded(small, "PPM"),
        encoded(small, "TGA"),
    ]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, overwritten in a stretch, or changed in single bytes, half of these in the header."""
    changed = bytearray(content)
    kind = rng.integers(5)
    at = int(rng.integers(len(changed)))
    if kind == 0:
        return bytes(changed[:at])
    if kind == 1:
        changed[at : at + int(rng.integers(64))] = rng.bytes(int(rng.integers(64)))
    else:
        end = min(len(changed), 300) if kind == 2 else len(changed)
        for place in rng.integers(end, size=rng.integers(1, 8)):
            changed[place] = rng.integers(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("num_files", [2_000, pytest.param(24_000, marks=pytest.mark.slow)])
def test_mutated_files_give_pixels_or_an_error_with_their_own_name(num_files: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(num_files)
    forms = seeds()
    contents = [mutated(forms[i % len(forms)], rng) for i in range(num_files)]
    path = tmp_path / "all"
    path.write_bytes(b"".join(contents))
    offsets = np.cumsum([0, *map(len, contents)]).tolist()
    entries = [(f"number {i}", FileBytes(str(path), offsets[i], len(content))) for i, content in enumerate(contents)]
    limit = Decoding(max_pixels=10**6)
    images = FileImages((), np.full(num_files, -1), entries, Account("", "", num_files), decoding=limit)
    num_read = 0
    for i in range(num_files):
        try:
            pixels = images.decoded(i).pixels
        except DataError as error:
            wrongly_named = not str(error).startswith(f"number {i}: ")
        else:
            wrongly_named = False
            num_read += 1
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
        assert not wrongly_named
    assert 0.1 < num_read / num_files < 0.9  # both ends have been tried
