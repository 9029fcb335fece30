"""Images of 1 to 16 channels and 8 or 16 bits are kept as they are, from a file to the encoder."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

import simclr_dist
from simclr_dist.config import AugmentConfig, Config, DataConfig, ModelConfig
from simclr_dist.data.account import SourceOptions
from simclr_dist.data.batch import Batch
from simclr_dist.data.beton.prepare import PreparedInfo, prepare
from simclr_dist.data.beton.reader import open_beton
from simclr_dist.data.decode import channel_crops
from simclr_dist.data.decode.ffcv_import import import_ffcv, unavailable
from simclr_dist.data.loading import channel_images
from simclr_dist.data.loading.channel_images import ChannelImages
from simclr_dist.data.loading.inspect import inspect_beton
from simclr_dist.data.loading.ready_views import load_views
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.data.sources import turbojpeg
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds import kind_of
from simclr_dist.network import weights
from simclr_dist.network.first_layer import whiten
from simclr_dist.network.simclr import build_model
from simclr_dist.network.weight_files import Weights
from simclr_dist.parallel.distributed import World
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.training.preflight import settled
from simclr_dist.views import implementations
from simclr_dist.views.augment import Augment, normalize
from simclr_dist.views.parameters import Column, draw_parameters
from simclr_dist.views.presets import resolve_augmentation, without_colours
from tests.tiff_files import tiff_bytes

KEEP = SourceOptions(channels="keep")
FORMATS = [(channels, bits) for channels in (1, 2, 4, 13) for bits in (8, 16)]
every_format = pytest.mark.parametrize(("channels", "bits"), FORMATS)
generator = np.random.default_rng(0)


def samples(channels: int, bits: int, height: int = 24, width: int = 30) -> NDArray:
    """Every value may occur: what is cut to 8 bits, shifted or clipped, is seen."""
    return generator.integers(0, 1 << bits, (height, width, channels), dtype=np.uint8 if bits == 8 else np.uint16)


def npy_bytes(array: NDArray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def png_bytes(array: NDArray) -> bytes:
    """16-bit PNG, grey [H, W] or RGB [H, W, 3]: Pillow does not write the second."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = array.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if array.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., PreparedInfo]:
    """Prepares files, given by their names in a folder."""

    def make(files: dict[str, bytes], options: SourceOptions = KEEP, name: str = "out", **more) -> PreparedInfo:
        folder = tmp_path / name
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        return prepare(folder, tmp_path / f"{name}.beton", options=options, num_workers=1, **more)

    return make


def stored(path: Path) -> list[NDArray]:
    """Every image of a file, whole, by what the format itself says."""
    with open_beton(path) as beton:
        kept = beton.kept
        assert kept is not None
        dtype = np.dtype("<u2") if kept.bits == 16 else np.dtype("u1")
        found = []
        for offset, size, _, height, width in beton.records(np.arange(beton.num_samples)).tolist():
            content = path.read_bytes()[offset : offset + size]
            found.append(np.frombuffer(content, dtype).reshape(height, width, kept.channels))
        return found


class TestPrepare:
    @every_format
    def test_samples_are_stored_as_they_are_with_their_statistics(self, made, channels: int, bits: int) -> None:
        images = [samples(channels, bits, 20 + i, 30 - i) for i in range(3)]
        images[1][..., 0] //= 7
        info = made({f"c{i % 2}/{i}.npy": npy_bytes(image) for i, image in enumerate(images)})
        in_order = [images[i] for i in (0, 2, 1)]  # classes come one after another
        assert all(np.array_equal(a, b) for a, b in zip(stored(info.path), in_order, strict=True))
        together = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.float64)
        largest = (1 << bits) - 1
        assert info.kept is not None
        np.testing.assert_allclose(info.kept.mean, together.mean(0) / largest, rtol=1e-7)
        np.testing.assert_allclose(info.kept.std, together.std(0) / largest, rtol=1e-6)
        assert (info.kept.channels, info.kept.bits, info.kept.rgb) == (channels, bits, False)
        found = inspect_beton(info.path, verify=True)
        assert found.kept == info.kept
        assert found.damaged == {}
        assert found.changed is False

    def test_the_same_bytes_for_any_number_of_workers(self, tmp_path: Path) -> None:
        for i in range(80):
            (tmp_path / "in" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / f"c{i % 2}" / f"{i}.npy").write_bytes(npy_bytes(samples(2, 16, 20, 20)))
        for workers in (1, 2):
            prepare(tmp_path / "in", tmp_path / f"{workers}.beton", options=KEEP, num_workers=workers)
        assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()

    def test_ffcv_itself_reads_the_samples(self, made) -> None:
        if unavailable():
            pytest.skip("needs ffcv")
        import_ffcv()
        reader = importlib.import_module("ffcv.reader")
        images = [samples(2, 16), samples(2, 16, 17, 19)]
        info = made({f"a/{i}.npy": npy_bytes(image) for i, image in enumerate(images)})
        found = reader.Reader(str(info.path), {})
        assert found.field_names == ["image", "label", "height", "width"]
        content = info.path.read_bytes()
        for row, image in zip(found.metadata, images, strict=True):
            pixels, _, height, width = row
            at, size = int(pixels["ptr"]), int(pixels["size"])
            assert (height, width) == image.shape[:2]
            assert content[at : at + size] == image.tobytes()
            assert found.page_size % (2 << 20) == 0

    def test_the_same_bytes_as_other_channels_are_other_data(self, made) -> None:
        image = samples(2, 16)
        of_16 = made({"a/0.npy": npy_bytes(image)}, name="of_16")
        of_8 = made({"a/0.npy": npy_bytes(image.view(np.uint8))}, name="of_8")
        assert stored(of_16.path)[0].tobytes() == stored(of_8.path)[0].tobytes()
        assert of_16.fingerprint != of_8.fingerprint

    def test_max_side_averages_over_areas(self, made) -> None:
        image = samples(3, 16, 40, 60)
        info = made({"a/0.npy": npy_bytes(image)}, max_side=30)
        expected = image.astype(np.float64).reshape(20, 2, 30, 2, 3).mean((1, 3))
        assert np.abs(stored(info.path)[0] - expected).max() <= 1

    @pytest.mark.parametrize("more", [{"mode": "jpg"}, {"quality": 80}])
    def test_jpegs_options_are_refused(self, made, more: dict) -> None:
        with pytest.raises(DataError, match="--mode and --quality"):
            made({"a/0.npy": npy_bytes(samples(2, 16))}, **more)

    def test_images_that_differ_are_one_error_with_the_first_of_each(self, made) -> None:
        files = {
            "a/0.npy": npy_bytes(samples(2, 16)),
            "a/1.npy": npy_bytes(samples(2, 16)),
            "b/0.npy": npy_bytes(samples(3, 8)),
            "b/1.npy": npy_bytes(samples(4, 8)),
        }
        with pytest.raises(DataError, match=r"a/0.npy has 2 channels of 16 bits, .*b/0.npy has 3 channels of 8 bits;"):
            made(files, on_error="skip")

    def test_a_channel_that_holds_nothing_is_a_warning_and_no_division_by_zero(self, made) -> None:
        image = samples(3, 16)
        image[..., 1] = 7
        info = made({"a/0.npy": npy_bytes(image)})
        assert "channel 2 is 7 in every pixel of every image" in info.warnings
        assert info.kept is not None
        assert info.kept.std[1] == 1

    def test_damage_within_jpeg_is_noticed(self, made) -> None:
        if turbojpeg.unavailable():
            pytest.skip("needs libturbojpeg")
        out = io.BytesIO()
        Image.fromarray(samples(3, 8, 64, 64)).save(out, "JPEG")
        content = bytearray(out.getvalue())
        content[-400:-300] = bytes(100)
        info = made({"a/0.jpg": bytes(content), "a/1.jpg": out.getvalue()})
        assert [message.partition(": ")[0][-7:] for message in info.damaged] == ["a/0.jpg"]
        skipping = dataclasses.replace(KEEP, on_damage="skip")
        info = made({"a/0.jpg": bytes(content), "a/1.jpg": out.getvalue()}, skipping, name="skip")
        assert info.num_samples == 1

    def test_a_damaged_format_is_refused(self, made) -> None:
        info = made({"a/0.npy": npy_bytes(samples(2, 16))})
        content = info.path.read_bytes()
        info.path.write_bytes(content.replace(b'"channels": 2', b'"channels": 4'))
        with pytest.raises(DataError, match=r"out\.beton: damaged"):
            open_beton(info.path)


class TestFiles:
    """What is read as how many channels, or asked about."""

    @pytest.mark.parametrize(
        ("name", "content", "rgb"),
        [
            ("interleaved.tif", tiff_bytes(samples(5, 16)), False),
            ("planes.tif", tiff_bytes(samples(13, 16), planar=True, deflate=True, predictor=2), False),
            ("big_endian.tif", tiff_bytes(samples(2, 16), byte_order=">"), False),
            ("tiles.tif", tiff_bytes(samples(2, 16), tile=16, big=True), False),
            ("rgb.tif", tiff_bytes(samples(3, 16), photometric=2), True),
            ("rgbn.tif", tiff_bytes(samples(4, 8), photometric=2, extra=(2,)), False),
        ],
    )
    def test_tiffs(self, made, name: str, content: bytes, rgb: bool) -> None:
        info = made({f"a/{name}": content})
        (found,) = stored(info.path)
        # The values again from the bytes of the file, by another program's eyes where it has them.
        assert info.kept is not None
        assert info.kept.rgb is rgb
        assert found.shape[:2] == (24, 30)

    def test_values_of_a_tiff(self, made) -> None:
        image = samples(2, 16)
        for i, options in enumerate(({}, {"planar": True}, {"byte_order": ">"}, {"tile": 16}, {"orientation": 3})):
            (found,) = stored(made({"a/0.tif": tiff_bytes(image, **options)}, name=f"t{i}").path)
            expected = image[::-1, ::-1] if "orientation" in options else image
            np.testing.assert_array_equal(found, expected)

    def test_white_is_zero(self, made) -> None:
        image = samples(1, 16)
        (found,) = stored(made({"a/0.tif": tiff_bytes(image, photometric=0)}).path)
        np.testing.assert_array_equal(found, 65535 - image)

    def test_png_of_16_bits(self, made) -> None:
        grey, colour = samples(1, 16)[..., 0], samples(3, 16)
        info = made({"a/0.png": png_bytes(grey)}, name="grey")
        np.testing.assert_array_equal(stored(info.path)[0][..., 0], grey)
        info = made({"a/0.png": png_bytes(colour)}, name="colour")
        np.testing.assert_array_equal(stored(info.path)[0], colour)
        assert info.kept is not None
        assert info.kept.rgb

    def test_usual_images_keep_their_channels(self, made) -> None:
        for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("CMYK", 3)):
            out = io.BytesIO()
            Image.new(mode, (9, 8), 5).save(out, "TIFF" if mode == "CMYK" else "PNG")
            info = made({f"a/0.{'tif' if mode == 'CMYK' else 'png'}": out.getvalue()}, name=mode)
            assert info.kept is not None
            assert (info.kept.channels, info.kept.bits) == (channels, 8), mode

    @pytest.mark.parametrize(
        ("array", "options", "expected"),
        [
            ((24, 30), {}, (24, 30, 1)),
            ((24, 30, 5), {}, (24, 30, 5)),
            ((5, 24, 30), {}, (24, 30, 5)),
            ((5, 24, 6), {"axes": "hwc"}, (5, 24, 6)),
            ((5, 24, 6), {"axes": "chw"}, (24, 6, 5)),
        ],
    )
    def test_axes_of_arrays(self, made, array: tuple, options: dict, expected: tuple) -> None:
        image = generator.integers(0, 65536, array, dtype=np.uint16)
        (found,) = stored(made({"a/0.npy": npy_bytes(image)}, dataclasses.replace(KEEP, **options)).path)
        assert found.shape == expected
        channels_first = len(array) == 3 and expected != array
        np.testing.assert_array_equal(
            found.reshape(expected), np.moveaxis(image, 0, 2) if channels_first else image.reshape(expected)
        )

    def test_fortrans_order(self, made) -> None:
        image = samples(2, 16)
        (found,) = stored(made({"a/0.npy": npy_bytes(np.asfortranarray(image))}).path)
        np.testing.assert_array_equal(found, image)

    @pytest.mark.parametrize(
        ("name", "content", "options", "message"),
        [
            ("0.npy", npy_bytes(samples(5, 8, 6, 24).transpose(0, 1, 2)), {}, "6 x 24 x 5: which axis .*--axes hwc"),
            ("0.npy", npy_bytes(samples(30, 8)), {}, "24 x 30 x 30: which axis .*--axes"),
            ("0.npy", npy_bytes(samples(30, 8)), {"axes": "hwc"}, "at most 16 channels .* --channels 1,2,3"),
            ("0.npy", npy_bytes(samples(2, 16).astype(np.int64)), {}, "int64, .* become 0 and 65535.* --range"),
            ("0.npy", npy_bytes(samples(2, 16).astype(np.float32)), {}, "float32, .* --range LOW HIGH"),
            ("0.npy", npy_bytes(np.array([{}, {}])), {}, "holds object"),
            ("0.npy", npy_bytes(samples(2, 16))[:-1], {}, "is not what its shape"),
            ("0.npy", npy_bytes(samples(2, 16)[None]), {}, r"expected \[H, W\]"),
            ("0.npy", npy_bytes(np.zeros((1, 1), bool)), {}, "holds bool"),
            ("0.tif", tiff_bytes(samples(1, 16), samples(1, 16)), {}, "2 pages: .* --pages channels or --pages images"),
            ("0.tif", tiff_bytes(samples(1, 16), samples(1, 8)), {"pages": "channels"}, "2 pages are not alike"),
            ("0.npy", npy_bytes(samples(2, 16)), {"channels": (1, 3)}, "there are no --channels 1,3, only 1 to 2"),
            ("0.npy", npy_bytes(samples(3, 16)), {"bands": (1, 2, 3)}, "--channels 1,2,3 keeps those"),
        ],
    )
    def test_what_is_not_clear_is_asked(self, made, name: str, content: bytes, options: dict, message: str) -> None:
        with pytest.raises(DataError, match=f"(?s){message}"):
            made({f"a/{name}": content}, dataclasses.replace(KEEP, **options))

    def test_pages_are_channels_or_images(self, made) -> None:
        pages = [samples(1, 16) for _ in range(3)]
        files = {"a/0.tif": tiff_bytes(*pages), "b/1.tif": tiff_bytes(pages[0])}
        as_images = made(files, dataclasses.replace(KEEP, pages="images"), name="images")
        assert [image.tobytes() for image in stored(as_images.path)] == [p.tobytes() for p in (*pages, pages[0])]
        assert as_images.class_counts == (3, 1)
        assert as_images.account.taken == 4
        assert "each page of a TIFF is an image" in as_images.account.layout
        del files["b/1.tif"]
        as_channels = made(
            {"a/0.tif": tiff_bytes(*pages)}, dataclasses.replace(KEEP, pages="channels"), name="channels"
        )
        np.testing.assert_array_equal(stored(as_channels.path)[0], np.concatenate(pages, axis=2))

    def test_chosen_channels(self, made) -> None:
        image = samples(13, 16)
        (found,) = stored(made({"a/0.npy": npy_bytes(image)}, SourceOptions(channels=(8, 4, 3))).path)
        np.testing.assert_array_equal(found, image[..., [7, 3, 2]])

    def test_a_range_becomes_16_bits(self, made) -> None:
        image = np.array([[-1024, 0, 3071, 4000]], np.int16)
        options = dataclasses.replace(KEEP, value_range=(-1024.0, 3071.0))
        (found,) = stored(made({"a/0.npy": npy_bytes(image)}, options).path)
        assert found.ravel().tolist() == [0, round(1024 / 4095 * 65535), 65535, 65535]

    def test_without_keep_arrays_are_named_and_pages_are_refused(self, made) -> None:
        out = io.BytesIO()
        Image.new("RGB", (9, 8)).save(out, "PNG")
        info = made({"a/0.png": out.getvalue(), "a/1.npy": npy_bytes(samples(2, 8))}, SourceOptions())
        assert info.kept is None
        assert [group.reason for group in info.account.left_out] == ["an array, which --channels keep takes (.npy)"]
        with pytest.raises(DataError, match="--pages images: is for --channels keep"):
            made({"a/0.png": out.getvalue()}, SourceOptions(pages="images"), name="more")


class TestCrops:
    @every_format
    def test_crops_and_flips_against_numpy(self, channels: int, bits: int) -> None:
        kernel = pytest.importorskip("simclr_dist.data.decode.channel_kernel")
        image, S = samples(channels, bits, 40, 50), 16
        crops = np.array([[3, 5, 16, 16, 0], [7, 30, 16, 16, 1], [0, 0, 40, 50, 1], [4, 9, 7, 5, 0]], np.int32)
        out = np.empty((2, len(crops), S, S, channels), image.dtype)
        channel_crops.crop_and_resize(image, crops, out[0])
        kernel.crop_and_resize(image, crops, out[1])
        np.testing.assert_array_equal(out[0], out[1])
        np.testing.assert_array_equal(out[0, 0], image[3:19, 5:21])
        np.testing.assert_array_equal(out[0, 1], image[7:23, 30:46][:, ::-1])
        areas, lines = averaged(image, S)[:, ::-1], interpolated(image[4:11, 9:14], S)
        steps = max(1, (1 << bits) >> 14) * 2  # weights are multiples of 2^-14
        assert np.abs(out[0, 2] - areas).max() <= steps
        assert np.abs(out[0, 3] - lines).max() <= steps

    @every_format
    def test_views_are_the_same_over_threads_ranks_and_steps(self, made, channels: int, bits: int) -> None:
        files = {f"c{i % 2}/{i}.npy": npy_bytes(samples(channels, bits, 20 + i, 30)) for i in range(8)}
        path = str(made(files).path)

        def views(rank: int, size: int, threads: int, step: int) -> torch.Tensor:
            data = DataConfig(train=path, image_size=12, num_threads=threads)
            world = World(rank, size)
            loader = build_loader(data, AugmentConfig(), seed=1, global_batch_size=4, world=world, device="cpu")
            with loader:
                return next(iter(loader.batches(step))).views.clone()

        whole = views(0, 1, 1, 3)
        assert whole.dtype == (torch.uint8 if bits == 8 else torch.uint16)
        assert whole.shape == (2, 4, 12, 12, channels)
        assert torch.equal(views(0, 1, min(2, len(os.sched_getaffinity(0))), 3), whole)
        assert torch.equal(torch.cat([views(rank, 2, 1, 3) for rank in range(2)], dim=1), whole)

    def test_without_numba_the_same_values(self, made, monkeypatch: pytest.MonkeyPatch) -> None:
        path = made({f"a/{i}.npy": npy_bytes(samples(2, 16)) for i in range(2)}).path
        crop = np.array([[[2, 3, 17, 20, 1], [0, 0, 24, 24, 0]]], np.int32)
        found = []
        for way in (channel_images._crop_and_resize(), channel_crops.crop_and_resize):
            monkeypatch.setattr(channel_images, "_crop_and_resize", lambda way=way: way)
            images = ChannelImages(path)
            found.append(np.empty((1, 2, 12, 12, 2), np.uint16))
            images.fill(np.arange(2), lambda heights, widths: crop, found[-1])
            images.close()
        np.testing.assert_array_equal(*found)

    def test_three_channels_are_cut_as_rgb_is(self, tmp_path: Path) -> None:
        if unavailable():
            pytest.skip("needs ffcv")
        (tmp_path / "in" / "a").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(samples(3, 8, 40, 44)).save(tmp_path / "in" / "a" / f"{i}.png")
        found = []
        for name, options in (("rgb", SourceOptions()), ("kept", KEEP)):
            path = str(prepare(tmp_path / "in", tmp_path / f"{name}.beton", options=options, num_workers=1).path)
            data = DataConfig(train=path, image_size=16)
            world = World()
            with build_loader(data, AugmentConfig(), seed=1, global_batch_size=4, world=world, device="cpu") as loader:
                found.append(next(iter(loader.batches(0))).views.int())
        assert (found[0] - found[1]).abs().max() <= 1


def averaged(image: NDArray, size: int) -> NDArray:
    """Over areas, by cumulative sums in float64: nothing of ours."""
    for axis in (0, 1):
        n = image.shape[axis]
        sums = np.concatenate([np.zeros_like(image.take([0], axis), float), image.cumsum(axis, dtype=float)], axis)
        edges = np.arange(size + 1) * n / size
        whole = np.minimum(edges.astype(int), n - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        part = (edges - whole).reshape(shape)
        at = sums.take(whole, axis) * (1 - part) + sums.take(whole + 1, axis) * part
        image = np.diff(at, axis=axis) * size / n
    return image


def interpolated(image: NDArray, size: int) -> NDArray:
    """Linearly between the centres of pixels, by numpy.interp."""
    for axis in (0, 1):
        n = image.shape[axis]
        places = (np.arange(size) + 0.5) * n / size - 0.5
        image = np.apply_along_axis(lambda line, n=n, p=places: np.interp(p, np.arange(n), line), axis, image)
    return image


def of(channels: int, bits: int, rgb: bool = False) -> PixelFormat:
    numbers = np.linspace(0.1, 0.6, channels)
    return PixelFormat(channels, bits, rgb, tuple(numbers.tolist()), tuple((numbers / 2 + 0.1).tolist()))


def batch_of(pixels: PixelFormat, B: int = 6, S: int = 20) -> Batch:
    views = generator.integers(0, pixels.largest + 1, (2, B, S, S, pixels.channels))
    ids = torch.arange(B)
    return Batch(torch.from_numpy(views.astype(np.uint8 if pixels.bits == 8 else np.uint16)), ids, ids, 0)


WAYS = [pytest.param("numba", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('numba')")), "torch"]


class TestColours:
    @pytest.mark.parametrize("way", WAYS)
    @every_format
    def test_each_channel_is_changed_by_itself(self, channels: int, bits: int, way: str) -> None:
        pixels, config = of(channels, bits), AugmentConfig(preset="asymmetric", blur_p=0.5)
        batch = batch_of(pixels)
        found = Augment(config, 3, 20, way, pixels)(batch)
        augmentation, _ = without_colours(resolve_augmentation(config))
        p = draw_parameters(augmentation, 3, 0, np.arange(6), 2, pixels)
        assert not p.grayscale.any()
        assert not p.solarize.any()
        assert p.jitter.any()
        assert p.blur.any()
        assert len(np.unique(p.of_channels)) == p.of_channels.size
        for k, view in enumerate(batch.views.flatten(0, 1).numpy()):
            x = view.astype(np.float64) / pixels.largest
            for operation in p.order[k] if p.jitter[k] else ():
                for c in range(channels):
                    if operation == Column.BRIGHTNESS:
                        x[..., c] = np.clip(x[..., c] * p.of_channels[k, 0, c], 0, 1)
                    if operation == Column.CONTRAST:
                        factor = p.of_channels[k, 1, c]
                        x[..., c] = np.clip(factor * x[..., c] + (1 - factor) * x[..., c].mean(), 0, 1)
            planes = torch.from_numpy(x).permute(2, 0, 1)
            if p.blur[k]:
                planes = gaussian_blur(planes, [3, 3], [float(p.sigma[k])] * 2)
            expected = (planes - torch.tensor(pixels.mean)[:, None, None]) / torch.tensor(pixels.std)[:, None, None]
            torch.testing.assert_close(found.flatten(0, 1)[k].double(), expected.double(), atol=2e-5, rtol=0)

    @pytest.mark.parametrize("way", WAYS)
    def test_rgb_of_16_bits_is_coloured_as_that_of_8(self, way: str) -> None:
        batch = batch_of(of(3, 8, rgb=True))
        deep = Batch((batch.views.int() * 257).to(torch.uint16), batch.sample_ids, batch.labels, 0)
        config = AugmentConfig(preset="asymmetric")
        in_8 = Augment(config, 0, 20, way)(batch)
        in_16 = Augment(config, 0, 20, way, dataclasses.replace(RGB, bits=16))(deep)
        # Both begin from the same values between 0 and 1, but for their last bit, which hue may enlarge.
        assert (in_8 - in_16).abs().max() < 1e-3

    def test_triton_is_refused_with_the_reason(self) -> None:
        reason = implementations.obstacle("triton", torch.device("cuda"), 32, of(2, 16))
        assert reason is not None
        assert "8-bit RGB" in reason
        assert "2 channels of 16 bits" in reason

    def test_normalisation_is_that_of_the_augmentation(self) -> None:
        pixels = of(4, 16)
        batch = batch_of(pixels)
        plain = Augment(AugmentConfig(preset="none"), 0, 20, "torch", pixels)(batch)
        torch.testing.assert_close(normalize(batch.views[0], pixels), plain[0], atol=1e-6, rtol=1e-6)


@pytest.fixture
def two(made) -> Path:
    files = {f"c{i % 2}/{i}.tif": tiff_bytes(samples(2, 16, 16, 16) // (1 + i % 2)) for i in range(32)}
    return made(files, name="two").path


def config_of(data: dict, model: dict | None = None, **more) -> Config:
    settings = {
        "name": "two",
        "data": {"image_size": 16, **data},
        "model": {"encoder": "resnet_small", "width": 8, "stem": "cifar", "head_out_dim": 16, **(model or {})},
        "optim": {"optimizer": "sgd", "base_lr": 0.1, "warmup_epochs": 0.0},
        "train": {"global_batch_size": 16, "epochs": 2, "precision": "fp32"},
        **more,
    }
    return Config.model_validate(settings)


class TestSettings:
    def test_the_file_says_what_is_left_open(self, two: Path) -> None:
        found = settled(config_of({"train": str(two)}))
        with open_beton(two) as beton:
            assert found.data.pixel_format == beton.kept
        assert found.model.channels == 2
        assert settled(found) == found

    def test_what_is_said_wins_where_it_can(self, two: Path) -> None:
        found = settled(config_of({"train": str(two), "mean": [0.1, 0.2]}))
        assert found.data.mean == (0.1, 0.2)
        assert found.data.std is not None

    @pytest.mark.parametrize(
        ("data", "more", "message"),
        [
            ({"channels": 3}, {}, "data.channels: 3, but the images of .* are 2 channels of 16 bits; leave it out"),
            ({"bits": 8}, {}, "data.bits: 8, but"),
            ({"rgb": True}, {}, "data.rgb: red, green and blue are three"),
            ({"std": [0.1]}, {}, "data.std: 1 numbers, but"),
            ({}, {"model": {"channels": 4}}, "model.channels: 4, but"),
            ({}, {"augment": {"grayscale_p": 0.2}}, "augment.grayscale_p: means nothing for 2 channels of 16 bits"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, two: Path, data: dict, more: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            settled(config_of({"train": str(two), **data}, **more))

    def test_other_data_than_the_encoder_takes_are_refused_by_name(self, two: Path, made) -> None:
        four = made({"a/0.npy": npy_bytes(samples(4, 8))}, name="four").path
        kind = kind_of(settled(config_of({"train": str(two)})).data)
        with pytest.raises(
            DataError, match=r"four\.beton: its images are 4 channels of 8 bits, and .* 2 channels of 16"
        ):
            kind.describe(str(four))
        with pytest.raises(DataError, match=r"two\.beton: its images are 2 channels of 16 bits, and .* RGB of 8 bits"):
            kind_of(DataConfig(train="synthetic", image_size=16)).describe(str(two))

    def test_a_plan_for_data_that_are_elsewhere_goes_by_the_settings(self) -> None:
        config = config_of({"train": "not/here.beton", "channels": 4, "bits": 16})
        assert settled(config) == config
        assert config.model.channels == 4

    def test_views_for_other_loops_have_the_channels_of_the_file(self, two: Path) -> None:
        with load_views(str(two), image_size=12, global_batch_size=4, preset="none") as views:
            found, ids = next(iter(views))
        assert found.shape == (2, 4, 2, 12, 12)
        with open_beton(two) as beton:
            pixels = beton.pixel_format
        data = DataConfig(train=str(two), image_size=12, **pixels.to_json())
        batch = next(iter(kind_of(data).evaluation_batches(str(two), ids.numpy(), 4)))
        assert batch[0].dtype == torch.uint16
        assert abs(float(found.mean())) < 0.5

    def test_rgb_stays_as_it_was(self) -> None:
        config = config_of({"train": "synthetic"})
        assert settled(config) == config
        assert config.data.pixel_format == RGB

    @every_format
    def test_pictures_have_three_channels(self, channels: int, bits: int) -> None:
        data = DataConfig(train="x", image_size=8, **of(channels, bits).to_json())
        kind = kind_of(data)
        batch = kind.example_batch(3)
        assert batch.views.dtype == (torch.uint8 if bits == 8 else torch.uint16)
        views = Augment(AugmentConfig(), 0, 8, "torch", data.pixel_format)(batch)
        assert views.shape == (2, 3, channels, 8, 8)
        assert kind.show_views(views).shape == (2, 3, 3, 8, 8)
        assert kind.inputs.example(2).shape == (2, channels, 8, 8)


class TestNetwork:
    @pytest.mark.parametrize("encoder", ["resnet_small", "resnet18", "vit_b_32"])
    def test_the_first_layer_fits(self, encoder: str) -> None:
        torch.manual_seed(0)
        model = build_model(ModelConfig(encoder=encoder, channels=13, image_size=32)).eval()
        assert torch.isfinite(model.encoder(torch.randn(2, 13, 32, 32))).all()

    def test_weights_of_rgb_are_shared_out_and_that_is_said(self) -> None:
        torch.manual_seed(0)
        of_rgb = build_model(ModelConfig(encoder="resnet18")).encoder.eval()
        of_four = build_model(ModelConfig(encoder="resnet18", channels=4)).encoder.eval()
        given = Weights("rgb.pth", "0" * 64, dict(of_rgb.state_dict()), "a file", mean=RGB.mean, std=RGB.std)
        found = weights.match(given, of_four)
        weights.load(of_four, found)
        grey = torch.randn(2, 1, 64, 64)
        torch.testing.assert_close(of_four(grey.expand(-1, 4, -1, -1)), of_rgb(grey.expand(-1, 3, -1, -1)))
        assert "3 input channels in the file, 4 here: each gets a share of their sum" in weights.sentence(given, found)
        pixels = of(4, 16)
        said = weights.fold_normalisation(given, found, of_four, pixels.mean, pixels.std)
        assert "expect 3 channels" in said

    def test_a_whitened_layer_whitens_any_channels(self) -> None:
        noise = generator.normal(0, 1, (64, 18, 18, 2))
        noise[..., 1] = 0.7 * noise[..., 0] + 0.1 * noise[..., 1]  # channels that resemble each other
        images = torch.from_numpy((noise * 800 + 5000).clip(0, 65535).astype(np.uint16))
        values = images.double() / 65535
        pixels = PixelFormat(
            2, 16, False, tuple(values.mean((0, 1, 2)).tolist()), tuple(values.std((0, 1, 2)).tolist())
        )
        convolution = torch.nn.Conv2d(2, 40, 3, stride=3, bias=False)
        num = whiten(convolution, images, pixels.std, pixels.largest)
        assert num == 36
        with torch.no_grad():
            answers = convolution(normalize(images, pixels))[:, :18].permute(0, 2, 3, 1).reshape(-1, 18)
        covariance = torch.cov(answers.T)
        assert (covariance - torch.diag(covariance.diag())).abs().max() < 0.05
        assert ((covariance.diag() > 0.8) & (covariance.diag() < 1.1)).all()


def test_a_training_that_goes_on_ends_with_the_same_bytes(two: Path, tmp_path: Path) -> None:
    def train(name: str, **more) -> bytes:
        settings = config_of({"train": str(two)}, {"first_layer": "whitened"}).model_dump(
            mode="json", exclude_unset=True
        )
        run = simclr_dist.pretrain(settings | {"name": name, "runs_dir": str(tmp_path)}, **more)
        (newest,) = sorted((run.path / "checkpoints").glob("step_*"))[-1:]
        return (newest / "model.safetensors").read_bytes()

    whole = train("whole")
    train("parts", train={"max_steps": 1})
    assert train("parts") == whole
