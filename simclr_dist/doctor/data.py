"""Findings about the libraries that data loading needs, and about the data of a configuration."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.config import IMAGES, SHARD_SUFFIX
from simclr_dist.data.beton.fit import remark_on_views
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.data.decode.ffcv_import import codec, import_ffcv
from simclr_dist.doctor.finding import Finding
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.kinds import kind_of
from simclr_dist.source_text import is_url, lines, missing

if TYPE_CHECKING:
    from simclr_dist.config import DataConfig, EvaluationConfig
    from simclr_dist.data.account import Account, SourceOptions


def examine_data_path() -> list[Finding]:
    """The loader's libraries, the folder of their compiled code, and the CPUs that they may use. Changes nothing."""
    findings = [
        _installed(
            "numba", "numba", "pip install numba; without it colour is slow and .beton files are read with Pillow"
        ),
        _installed("setuptools", "setuptools", "pip install setuptools; ffcv imports distutils, newer Pythons lack it"),
        _installed(
            "cv2", "opencv-python-headless", "pip install opencv-python-headless (opencv-python would need libGL)"
        ),
    ]
    try:
        codec()
        findings.append(Finding("ok", "JPEG codec", "ffcv's library loads"))
    except DataError as error:
        findings.append(Finding("warning", "JPEG codec", str(error), "until then .beton files are read with Pillow"))
    else:
        try:
            import_ffcv()
            findings.append(Finding("ok", "ffcv", f"{importlib.metadata.version('ffcv')} imports"))
        except (DataError, importlib.metadata.PackageNotFoundError) as error:
            findings.append(Finding("warning", "ffcv", str(error), "training works; ffcv's own Loader does not"))
    return [*findings, _cache_folder(), _processors()]


def examine_data(data: DataConfig, global_batch_size: int, labelled: str | None = None) -> Iterator[Finding]:
    """Whether the data of a configuration exist, are enough, and fit into memory. labelled: evaluation.train."""
    kind = kind_of(data)
    if data.loader == "ffcv":
        try:
            codec()
        except DataError as error:
            yield Finding("problem", "data.loader", f"ffcv, but {error}", "or set data.loader: auto")
    num_bytes = 0
    for what, source in (("data.train", data.train), ("data.test", data.test), ("evaluation.train", labelled)):
        if source is None:
            continue
        if data.kind == IMAGES and source != "synthetic" and (gone := missing(source)) is not None:
            yield Finding("problem", what, f"{gone} does not exist", f"simclr-dist prepare SOURCE {gone}")
            continue
        try:
            info = kind.describe(source)
        except DataError as error:
            yield Finding("problem", what, str(error))
            continue
        size = kind.size_on_disk(source)
        num_bytes += size
        found = f"{source}: {info.num_samples:,} {kind.noun}s in {len(info.class_names)} classes, {size / 1e6:,.1f} MB"
        few = what == "data.train" and info.num_samples < global_batch_size
        advice = f"fewer than one global batch: lower train.global_batch_size ({global_batch_size})" if few else ""
        yield Finding("problem" if few else "ok", what, found, advice)
        if info.account is not None:
            yield from _account(what, info.account)
        if what == "data.train" and not few:
            yield from _store(data, info.num_samples, global_batch_size)
        if what == "data.train" and (remark := remark_on_views(source, data.image_size)):
            yield Finding("warning", what, remark)
    memory = _available_memory()
    if memory and num_bytes > memory:
        yield Finding(
            "warning",
            "page cache",
            f"{num_bytes / 2**30:.1f} GiB of {kind.noun}s, {memory / 2**30:.1f} GiB of memory",
            "every epoch reads from the disk: use a local NVMe disk, or `simclr-dist prepare … --for-views …`",
        )


def _store(data: DataConfig, num_samples: int, global_batch_size: int) -> Iterator[Finding]:
    """What lies behind URLs, and whether its cache is large enough."""
    if not any(is_url(place, SHARD_SUFFIX) for place in lines(data.train)):
        return
    from simclr_dist.data.loading.fetch_ahead import sentence_of_store
    from simclr_dist.data.loading.view_loader import order_of

    try:
        sentence = sentence_of_store(data, order_of(data, num_samples, global_batch_size, 0))
        yield Finding("problem" if "more than data.cache_size" in sentence else "ok", "data.cache_dir", sentence)
    except DataError as error:
        yield Finding("problem", "data.cache_dir", str(error))


def examine_source(source: str, options: SourceOptions) -> Iterator[Finding]:
    """The account that `prepare` with the same options would give, without decoding an image."""
    from simclr_dist.data.beton.classes_from import with_class_names
    from simclr_dist.data.loading.open_images import describe
    from simclr_dist.data.sources.open import open_source

    try:
        is_beton = names_beton(source)
        account = describe(source).account if is_beton else open_source(source, with_class_names(options)).account
    except DataError as error:
        yield Finding("problem", "data", str(error))
        return
    if account is None:
        yield Finding("ok", "data", f"{source} does not say what it was made from")
    else:
        yield from _account("data", account)


def _account(what: str, account: Account) -> Iterator[Finding]:
    for line in account.lines():
        yield Finding("warning" if line.startswith("left out") else "ok", what, line)


def examine_labels(data: DataConfig, evaluation: EvaluationConfig) -> Iterator[Finding]:
    """Whether the labels of the images fit the evaluations that are switched on."""
    from simclr_dist.kinds.evaluation_labels import check_evaluation_labels

    try:
        for remark in check_evaluation_labels(data, evaluation):
            yield Finding("warning", "labels", remark)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("problem", "labels", problem)
    except DataError as error:
        yield Finding("problem", "labels", str(error))


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _installed(module: str, package: str, how: str) -> Finding:
    try:
        there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # sys.modules holds something that is no module
        there = False
    if not there:
        return Finding("warning", package, "not installed", how)
    try:
        return Finding("ok", package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding("ok", package, f"module {module} is there")


def _cache_folder() -> Finding:
    """numba keeps machine code in NUMBA_CACHE_DIR, else beside the module, else in the user's cache folder."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).parents[1] / "data" / "decode" / "__pycache__"
    places = (
        [Path(named)] if named else [beside, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "numba"]
    )
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return Finding("ok", "compiled code", f"is kept in {place}")
        except OSError:
            continue
    advice = "every process compiles for ten seconds: set NUMBA_CACHE_DIR to a folder on a local disk"
    return Finding("warning", "compiled code", f"cannot be kept: {', '.join(map(str, places))}", advice)


def _processors() -> Finding:
    allowed, there, quota = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota()
    found = f"{allowed} of {there} may be used"
    if quota is not None and quota < allowed:
        advice = (
            f"the container's share is smaller than its affinity: set data.num_threads, OMP_NUM_THREADS={quota:.0f}"
        )
        return Finding("warning", "CPUs", f"{found}, for {quota:g} CPUs' time", advice)
    if allowed > 1 or there == 1:
        return Finding("ok", "CPUs", found)
    return Finding(
        "warning", "CPUs", found, "this process is bound to one CPU; ask SLURM for --cpus-per-task=4 or more a GPU"
    )


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """How many CPUs' time this container may use; None: unlimited (cgroup v2)."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
