"""Still ffcv: its Loader reads our files and runs our crops, and we read what its DatasetWriter writes.

ffcv's own objects run in a process of their own: its import and its threads are not those of the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.decode.ffcv_import import unavailable
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from tests.images import make_folder, make_image

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

PREAMBLE = """
import sys, threading
import numpy as np, torch
from simclr_dist.data.decode.ffcv_import import import_ffcv
ffcv = import_ffcv()
"""


def run(script: str, *arguments: str | Path) -> str:
    completed = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "NUMBA_THREADING_LAYER": "omp"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout.strip()


def test_ffcvs_loader_runs_our_crops_over_two_epochs(tmp_path: Path) -> None:
    """Two Loaders of two epochs each: ffcv declares and generates anew, and alters numba's types on the way."""
    make_folder(tmp_path / "in", 26)
    prepare(tmp_path / "in", tmp_path / "out.beton", num_workers=1)
    script = """
        from ffcv.loader import Loader, OrderOption
        from simclr_dist.config import AugmentConfig, DataConfig
        from simclr_dist.data.loading.view_loader import build_loader
        from simclr_dist.data.loading.ffcv_operation import SampleIds, TwoCrops
        from simclr_dist.parallel.distributed import World

        ours = {}
        settings = DataConfig(train=sys.argv[1], image_size=24, num_threads=1)
        options = dict(seed=4, global_batch_size=2, world=World(), device="cpu")
        with build_loader(settings, AugmentConfig(), **options) as loader:
            for _, batch in zip(range(26), loader.batches(0)):
                for k, i in enumerate(batch.sample_ids.tolist()):
                    ours[batch.epoch, i] = batch.views[:, k].clone()

        for _ in range(2):
            crops = TwoCrops(sys.argv[1], size=24, seed=4)
            stock = Loader(sys.argv[1], batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                           pipelines={"image": [SampleIds(), crops]})
            for crops.epoch in range(2):
                seen = 0
                for views, labels in stock:
                    for k in range(len(views)):
                        assert torch.equal(views[k], ours[crops.epoch, seen]), (crops.epoch, seen)
                        seen += 1
                assert seen == 26
        print("same bytes")
    """
    assert run(script, tmp_path / "out.beton") == "same bytes"


def test_ffcvs_loader_reads_our_files(tmp_path: Path) -> None:
    """Through the system's cache and page by page."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "b").mkdir()
    from PIL import Image

    for i in range(20):
        Image.fromarray(make_image(i, 40, 56)).save(tmp_path / "in" / "ab"[i % 2] / f"{i:02d}.png")
    prepare(tmp_path / "in", tmp_path / "out.beton", mode="raw", num_workers=1)
    script = """
        from ffcv.loader import Loader, OrderOption
        for os_cache in (False, True):
            loader = Loader(sys.argv[1], batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache)
            images, labels = zip(*((i.clone(), l.clone()) for i, l in loader))
            np.savez(f"{sys.argv[2]}/{os_cache}.npz", images=torch.cat(images), labels=torch.cat(labels).squeeze(1))
    """
    run(script, tmp_path / "out.beton", tmp_path)
    expected = [make_image(i, 40, 56) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    for os_cache in (False, True):
        read = np.load(tmp_path / f"{os_cache}.npz")
        assert np.array_equal(read["images"], np.stack(expected))
        assert read["labels"].tolist() == [0] * 10 + [1] * 10


def test_we_read_what_ffcvs_writer_writes(tmp_path: Path) -> None:
    """Several workers, fields in another order and by other names, raw and JPEG mixed."""
    script = """
        from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
        from ffcv.writer import DatasetWriter
        from tests.images import SIZES, make_image

        class Indexed:
            def __len__(self):
                return 30
            def __getitem__(self, i):
                return i / 7, {"number": int(i)}, make_image(i, *SIZES[i % len(SIZES)]), int(i % 4)

        if __name__ == "__main__":
            for mode in ("raw", "jpg"):
                fields = {"weight": FloatField(), "notes": JSONField(),
                          "photo": RGBImageField(write_mode=mode), "kind": IntField()}
                writer = DatasetWriter(f"{sys.argv[1]}/{mode}.beton", fields, num_workers=2)
                writer.from_indexed_dataset(Indexed(), chunksize=3)
    """
    run(script, tmp_path)
    from tests.images import SIZES

    for mode in ("raw", "jpg"):
        path = tmp_path / f"{mode}.beton"
        info = describe(str(path))
        assert info.num_samples == 30
        assert info.labels.tolist() == [i % 4 for i in range(30)]
        assert info.class_names == ("0", "1", "2", "3")
        source = BetonSource(path)
        from simclr_dist.data.loading.inspect import inspect_beton

        assert inspect_beton(path, verify=True).damaged == {}
        for i in range(30):
            difference = abs(source.read(i).astype(int) - make_image(i, *SIZES[i % len(SIZES)]))
            assert difference.max() == 0 if mode == "raw" else difference.mean() < 12
