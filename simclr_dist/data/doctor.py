"""Is everything here that fast data loading needs?"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.data.errors import DataError
from simclr_dist.data.ffcv_import import codec, import_ffcv


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. advice: what to do when it is not ok, and what is lost meanwhile."""

    what: str
    ok: bool
    advice: str = ""


def examine_data_path() -> list[Finding]:
    """What `simclr-dist doctor` reports of the data path. Changes nothing."""
    findings = [
        _have("numba", "pip install numba"),
        _have("setuptools", "pip install setuptools; ffcv imports distutils, which newer Pythons have only through it"),
        _have("cv2", "pip install opencv-python-headless; ffcv imports it, and opencv-python would need libGL"),
    ]
    try:
        codec()
        findings.append(Finding("ffcv's JPEG codec loads", True))
    except DataError as error:
        findings.append(Finding("ffcv's JPEG codec", False, f"{error}; without it .beton files are read with Pillow"))
    else:
        try:
            import_ffcv()
            findings.append(Finding("ffcv itself imports", True))
        except DataError as error:
            findings.append(Finding("ffcv itself", False, f"{error}; training works, ffcv's own Loader does not"))
    findings += [_cache_folder(), _processors()]
    return findings


def _have(module: str, how: str) -> Finding:
    there = importlib.util.find_spec(module) is not None
    return Finding(f"{module} is installed" if there else module, there, "" if there else f"not installed: {how}")


def _cache_folder() -> Finding:
    """numba keeps machine code in NUMBA_CACHE_DIR, else beside the module, else in the user's cache folder."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).parent / "__pycache__"
    places = (
        [Path(named)] if named else [beside, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "numba"]
    )
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return Finding(f"compiled code is kept in {place}", True)
        except OSError:
            continue
    advice = "every process compiles for seconds: set NUMBA_CACHE_DIR to a folder on a local disk"
    return Finding(f"a folder for compiled code ({', '.join(map(str, places))})", False, advice)


def _processors() -> Finding:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if allowed > 1 or there == 1:
        return Finding(f"{allowed} of {there} CPUs may be used", True)
    return Finding(
        f"1 of {there} CPUs", False, "this process is bound to one CPU; ask SLURM for --cpus-per-task=4 or more a GPU"
    )
