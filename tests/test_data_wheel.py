"""The self-contained wheel of ffcv: reads an epoch with this system's OpenCV and TurboJPEG out of sight.

Slow; needs what building ffcv needs, and the right to make a mount namespace:

    pytest -m slow tests/test_data_wheel.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.decode.ffcv_import import unavailable
from tests.images import make_folder

REPOSITORY = Path(__file__).resolve().parent.parent

HIDE = """
shopt -s nullglob
for library in /usr/lib/*/libopencv_* /usr/lib/*/libturbojpeg* /usr/lib/*/libtbb*; do
    mount --bind /dev/null "$(readlink -f "$library")" || exit 77
done
exec "$@"
"""

READ = """
import hashlib, itertools, sys
from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.data.decode.ffcv_import import codec
from simclr_dist.parallel.distributed import World

content = hashlib.sha256()
settings = DataConfig(train=sys.argv[1], image_size=32, num_threads=1, loader="ffcv")
options = {"seed": 0, "global_batch_size": 8, "world": World(), "device": "cpu"}
with build_loader(settings, AugmentConfig(), **options) as loader:
    for batch in itertools.islice(loader.batches(0), loader.order.steps_per_epoch):
        content.update(batch.views.numpy().tobytes())
print(codec()._name, content.hexdigest())
"""


def run(command: list[str], *, path: str, timeout_s: int = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.skipif(
    not shutil.which("pkg-config") or not shutil.which("unshare"), reason="needs pkg-config and unshare"
)
def test_wheel_reads_an_epoch_without_the_systems_libraries(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a mount namespace")
    make_folder(tmp_path / "in", 40)
    prepare(tmp_path / "in", tmp_path / "out.beton", mode="jpg", num_workers=1)
    built = run(
        ["bash", str(REPOSITORY / "tools/build_ffcv_wheel.sh"), str(tmp_path / "wheel")], path="", timeout_s=500
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.startswith("ffcv-1.0.2-cp311-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")

    read = [sys.executable, "-c", READ, str(tmp_path / "out.beton")]
    hidden = ["unshare", "-m", "bash", "-c", HIDE, "hide"]
    installed = run(read, path=str(REPOSITORY))
    without = run([*hidden, *read], path=str(REPOSITORY))
    bundled = run([*hidden, *read], path=f"{tmp_path / 'unpacked'}:{REPOSITORY}")
    assert installed.returncode == 0, installed.stderr
    assert without.returncode != 0 or "_libffcv.abi3.so" in without.stdout  # so that hiding hides
    assert bundled.returncode == 0, bundled.stderr
    library, content = bundled.stdout.split()
    assert library == str(tmp_path / "unpacked/ffcv/_libffcv.abi3.so")
    assert content == installed.stdout.split()[1]
