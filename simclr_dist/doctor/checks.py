"""What training needs of an installation, a machine and a configuration, each tried out. Nothing is changed.

Whatever is broken becomes a finding, never a traceback: torch is tried in a process of its own, and importing this
module needs the standard library only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from simclr_dist.doctor.environment import SET_BY_LAUNCHERS, examine_environment, treated
from simclr_dist.doctor.finding import Finding, Level
from simclr_dist.parallel.environment import found_in_accelerate_config

REQUIRED = [
    "accelerate",
    "numpy",
    "pillow",
    "psutil",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "tensorboard",
    "torch",
    "torchvision",
]
PROBE_TIMEOUT_S = 180.0


def examine(
    config: str | None = None,
    overrides: Sequence[str] = (),
    source_arguments: argparse.Namespace | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """All findings, in the order of the table, each as soon as it is known.

    config: a YAML file; anything else is a source of images, which `source_arguments` say how to read. tell: is called
    with what is tried next, where that takes seconds.
    """
    if config is not None and not config.endswith((".yaml", ".yml")):
        yield from guarded(config, lambda: _examine_source(config, source_arguments))
        return
    probe: dict[str, Any] = {}
    inherited = dict(os.environ)  # libraries change it when they are imported
    yield from guarded("Python", examine_python)
    tell("torch is being tried, in a process of its own")
    yield from guarded("torch", lambda: examine_torch(probe))
    tell("the loader's libraries are being imported")
    yield from guarded("data path", _examine_data_path)
    yield from guarded("limits", examine_limits)
    if config is None:
        yield from guarded("runs_dir", lambda: examine_folder("runs_dir", Path("runs"), 0))
    else:
        yield from guarded(config, lambda: examine_config(config, overrides, probe, tell))
    yield from guarded("environment", lambda: examine_environment(inherited))


def guarded(what: str, examine_part: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of `examine_part`, and one about the failure itself if it fails."""
    try:
        yield from examine_part()
    except Exception as error:
        yield Finding("problem", what, f"could not be examined: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# This installation


def examine_python() -> Iterator[Finding]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding(
        "problem" if old else "ok", "Python", f"{version}, {sys.executable}", "use 3.11 or newer" if old else ""
    )
    found, missing = [], []
    for name in REQUIRED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        advice = f"{sys.executable} -m pip install {' '.join(missing)}"
        yield Finding("problem", "packages", f"not installed: {', '.join(missing)}", advice)
    else:
        yield Finding("ok", "packages", ", ".join(found))


def examine_torch(probe: dict[str, Any]) -> Iterator[Finding]:
    """Fills `probe` with what `torch_probe` found."""
    tried, end = _run_probe(probe)
    if end:
        advice = "reinstall it: the wheel may not fit this CPU, driver or C library" if tried != "gpus" else ""
        yield Finding("problem", tried, end, advice)
    torch = probe.get("torch", {})
    if "error" in torch:
        yield Finding("problem", "torch", torch["error"], f"{sys.executable} -m pip install --force-reinstall torch")
        return
    if torch:
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU only"
        yield Finding("ok", "torch", f"{torch['version']}, {build}; {torch['threads']} threads")
        if not torch["distributed"]:
            yield Finding("problem", "torch", "built without torch.distributed", "install a wheel of pytorch.org")
    remedies = {
        "torchvision": "its version must belong to torch's: pip install --upgrade torch torchvision",
        "accelerate": "pip install --upgrade accelerate",
        "gloo": "is the host's own name in /etc/hosts? or set GLOO_SOCKET_IFNAME=lo",
        "nccl": "run with NCCL_DEBUG=INFO; in a container: --shm-size=8g, and drivers as new as torch's CUDA",
    }
    for name, remedy in remedies.items():
        value = probe.get(name)
        if value is not None:
            bad = "error" in value
            found = value["error"] if bad else f"{value['version']} works".strip()
            yield Finding("problem" if bad else "ok", name, found, remedy if bad else "")
    if config := probe.get("accelerate", {}).get("config"):
        yield Finding("ok", "accelerate", f"`accelerate launch` without options follows {config}")
        yield from examine_accelerate_config(Path(config))
    if "gpus" in probe:
        yield from _examine_gpus(probe["gpus"], torch)
    if "openmp" in probe:
        several = len(probe["openmp"]) > 1 and any("iomp" in name for name in probe["openmp"])
        yield Finding(
            "warning" if several else "ok",
            "threading",
            f"OpenMP: {', '.join(probe['openmp']) or 'none'}; the loader has threads of its own; processes are spawned",
            "two kinds of OpenMP in one process can hang or be slow: install torch and numba from one source"
            if several
            else "",
        )


def examine_accelerate_config(path: Path) -> Iterator[Finding]:
    """What of a file made by `accelerate config` a training refuses or ignores."""
    from simclr_dist.config.bounded_yaml import read_yaml

    values = read_yaml(path)
    for entry in found_in_accelerate_config(values if isinstance(values, dict) else {}):
        if entry.counts:
            level, advice = treated(entry)
            yield Finding(level, f"accelerate: {entry.name}", entry.value, f"{advice}, by `accelerate config`")


def _examine_gpus(gpus: Any, torch: dict[str, Any]) -> Iterator[Finding]:
    if isinstance(gpus, dict):
        advice = "compare nvidia-smi's driver with torch's CUDA; is another program holding the GPU?"
        yield Finding("problem", "GPUs", gpus["error"], advice)
        return
    for index, gpu in enumerate(gpus):
        short = gpu["free_gib"] < 0.8 * gpu["total_gib"]
        found = f"{gpu['name']}, {gpu['free_gib']:.1f} of {gpu['total_gib']:.1f} GiB free"
        yield Finding(
            "warning" if short else "ok",
            f"GPU {index}",
            found,
            "somebody else uses it: see nvidia-smi" if short else "",
        )
    if gpus:
        return
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if present and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("warning", "GPUs", f"{present}, hidden", "unset CUDA_VISIBLE_DEVICES")
    elif present:
        advice = (
            "install a CUDA build of torch" if not torch.get("cuda") else f"its driver must know CUDA {torch['cuda']}"
        )
        yield Finding("problem", "GPUs", f"{present} in this machine, none usable by torch", advice)
    else:
        yield Finding("ok", "GPUs", "none; training runs on the CPU (`python -m launcher local CONFIG --nproc N`)")


def _run_probe(probe: dict[str, Any]) -> tuple[str, str]:
    """(what was being tried, how it ended) if the probe did not come to its end; ("", "") if it did."""
    script = Path(__file__).with_name("torch_probe.py")
    # -P: this folder's modules must not stand in for packages of the same name.
    command = [sys.executable, "-P", str(script)]
    try:
        done = subprocess.run(
            command, env=without_launchers(), capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
        output, code, error = done.stdout, done.returncode, done.stderr.decode(errors="replace")
        end = "" if code == 0 else f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
        end = f"{end}: {error.strip().splitlines()[-1]}" if end and error.strip() else end
    except subprocess.TimeoutExpired as expired:
        output, end = expired.stdout or b"", f"hangs: no answer in {PROBE_TIMEOUT_S:.0f} s"
    tried = "torch"
    for line in output.decode(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        tried = value.pop("trying", tried)
        probe.update(value)
    return (tried, end) if end else ("", "")


def without_launchers() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not SET_BY_LAUNCHERS.fullmatch(name)}


def _examine_source(source: str, arguments: argparse.Namespace | None) -> Iterable[Finding]:
    from simclr_dist.data.account import SourceOptions
    from simclr_dist.doctor.data import examine_source

    return examine_source(source, SourceOptions.from_arguments(arguments) if arguments else SourceOptions())


def _examine_data_path() -> Iterable[Finding]:
    from simclr_dist.doctor.data import examine_data_path

    return examine_data_path()


# ---------------------------------------------------------------------------------------------------------------------
# This machine, and this training


def examine_limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < 1024
    yield Finding("warning" if few else "ok", "open files", f"{files} allowed", "ulimit -n 4096" if few else "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        gib = shutil.disk_usage(shared).total / 2**30
        advice = "NCCL between GPUs of a machine needs more: docker run --shm-size=8g" if gib < 0.5 else ""
        yield Finding("warning" if gib < 0.5 else "ok", "/dev/shm", f"{gib:.1f} GiB", advice)
    yield from examine_folder("temporary files", Path(tempfile.gettempdir()), 0)


def examine_folder(what: str, folder: Path, needed_bytes: int) -> Iterator[Finding]:
    """Can a file be written, synced and renamed there, as a checkpoint must be, and is there room?"""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as inside:
            file = Path(inside) / "a"
            with file.open("wb") as opened:
                opened.write(b"x")
                opened.flush()
                os.fsync(opened.fileno())
            file.rename(file.with_name("b"))
        free = shutil.disk_usage(place).free
    except OSError as error:
        yield Finding("problem", what, f"{folder}: {error.strerror or error}", "choose another: runs_dir=…")
        return
    short = free < max(needed_bytes, 2**28)
    found = f"{folder}: write, sync and rename work; {free / 2**30:.1f} GiB free"
    if needed_bytes:
        found += f", {needed_bytes / 2**30:.2f} needed for checkpoints"
    level: Level = "problem" if free < needed_bytes else "warning" if short else "ok"
    yield Finding(
        level, what, found, "make room, keep fewer (checkpoint.keep), or choose another runs_dir" if short else ""
    )


def examine_precision(setting: str, gpus: list[dict[str, Any]]) -> Iterator[Finding]:
    has_bf16 = all(gpu["bf16"] for gpu in gpus)
    if setting == "bf16" and not has_bf16:
        yield Finding("warning", "precision", "bf16, which a GPU here only emulates", "train.precision=fp16 or fp32")
    if setting == "fp16" and not gpus:
        yield Finding("warning", "precision", "fp16, which is slow on a CPU", "train.precision=fp32 or bf16")
    if setting != "auto":
        return
    if gpus:
        found = "auto: bf16" if has_bf16 else "auto: fp32, because a GPU here only emulates bf16"
        yield Finding("ok", "precision", found, "" if has_bf16 else "train.precision=fp16 would be faster")
        return
    from simclr_dist.network.precision import cpu_has_bf16

    measured = "auto: fp32 or bf16, whichever two seconds of measurement find faster when the run begins"
    emulated = "auto: fp32, because this CPU only emulates bf16"
    yield Finding("ok", "precision", measured if cpu_has_bf16() else emulated)


def examine_config(
    path: str, overrides: Sequence[str], probe: dict[str, Any], tell: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
    from simclr_dist.config import load_config
    from simclr_dist.errors import ConfigError, DataError

    try:
        config = load_config(path, overrides, check_data=False)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("problem", "configuration", problem)
        return
    yield Finding("ok", "configuration", f"{path}: {config.name}")
    from simclr_dist.kinds import is_built_in, kind_of

    try:
        config = config.with_data(kind_of(config.data).settled())
    except (ConfigError, DataError) as error:
        yield Finding("problem", "data.train", str(error))
        return

    from simclr_dist.doctor.data import examine_data, examine_labels

    yield from guarded(
        "data", lambda: examine_data(config.data, config.train.global_batch_size, config.evaluation.train)
    )
    yield from guarded("labels", lambda: examine_labels(config.data, config.evaluation))
    if "version" in probe.get("torch", {}):
        from simclr_dist.doctor.network import examine_random_layers

        yield from guarded("random layers", lambda: examine_random_layers(config.model, kind_of(config.data).inputs))
    gpus = probe.get("gpus")
    if isinstance(gpus, list):
        yield from guarded("precision", lambda: examine_precision(config.train.precision, gpus))

    yield from guarded("runs_dir", lambda: examine_folder("runs_dir", config.run_dir, 0))
    if not is_built_in(config.data.kind):
        own = f"not looked at: only your script knows data.kind={config.data.kind}; the training's start does it"
        yield Finding("ok", "before step 0", own)
    elif "version" in probe.get("torch", {}):
        tell("the network is being tried with one sample")
        yield from guarded("before step 0", lambda: examine_start([path, *overrides]))


def examine_start(command: Sequence[str]) -> Iterator[Finding]:
    """What a start of the training `command` (CONFIG key=value …) would check before its first step."""
    module = [sys.executable, "-m", "simclr_dist.training.preflight", *command]
    done = subprocess.run(module, env=without_launchers(), capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    for line in done.stdout.decode(errors="replace").splitlines():
        found = json.loads(line)
        level: Level = "problem" if "problem" in found else "warning" if found.get("remark") else "ok"
        text = found.get("problem") or found.get("remark") or found.get("fact")
        yield Finding(level, found["what"], text or "fit for a training")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        yield Finding("problem", "before step 0", f"ended with code {done.returncode}: {''.join(last)}")
