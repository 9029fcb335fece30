"""`simclr-dist doctor [CONFIG]`: one table of what works here and what does not, each with its remedy.

Everything is tried out, nothing believed, and nothing changed. Whatever is broken becomes a line of the table, never a
traceback: torch is tried in a process of its own, and only the standard library is needed to start
(`python -m simclr_dist.doctor`, when even `simclr-dist` does not).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr_dist.doctor.finding import Finding, Level

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
MARKS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


def register(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what works here, what does not, and what to do about it",
        description="Tries out everything that training needs, and with CONFIG everything that this training needs.",
        epilog="exit codes: 0 all is well enough to train · 1 a PROBLEM was found",
    )
    add_arguments(doctor)
    doctor.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a training to look into as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    findings = list(examine(args.config, args.overrides))
    ok = all(finding.level != "problem" for finding in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [vars(finding) for finding in findings]}, indent=1))
    else:
        print("\n".join(render(findings)))
    return 0 if ok else 1


def render(findings: Sequence[Finding]) -> Iterator[str]:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        yield f"{MARKS[finding.level]}  {finding.what:{width}}  {plain(finding.found)}"
        if finding.advice:
            yield f"{'':9}{'':{width}}  {plain(finding.advice)}"
    count = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    yield f"{count['problem']} problems, {count['warning']} warnings"


def plain(text: str) -> str:
    """On one line, and without what could act on a terminal: values come from anywhere."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def examine(config: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """All findings, in the order of the table."""
    probe: dict[str, Any] = {}
    inherited = dict(os.environ)  # libraries change it when they are imported
    yield from guarded("Python", examine_python)
    yield from guarded("torch", lambda: examine_torch(probe))
    yield from guarded("data path", _examine_data_path)
    yield from guarded("limits", examine_limits)
    if config is None:
        yield from guarded("runs_dir", lambda: examine_folder("runs_dir", Path("runs"), 0))
    else:
        yield from guarded(config, lambda: examine_config(config, overrides, probe))
    yield from guarded("environment", lambda: examine_environment(inherited))


def guarded(what: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of `look`, and one about `look` itself if it fails."""
    try:
        yield from look()
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
    if "gpus" in probe:
        yield from _examine_gpus(probe["gpus"], torch)
    if "openmp" in probe:
        several = len(probe["openmp"]) > 1 and any("iomp" in name for name in probe["openmp"])
        yield Finding(
            "warning" if several else "ok",
            "threading",
            f"OpenMP: {', '.join(probe['openmp']) or 'none'}; loader's threads its own, processes by spawn, no fork",
            "two kinds of OpenMP in one process can hang or be slow: install torch and numba from one source"
            if several
            else "",
        )


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
    keep = {name: value for name, value in os.environ.items() if not _LAUNCHED.fullmatch(name)}
    try:
        done = subprocess.run(command, env=keep, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
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


def examine_config(path: str, overrides: Sequence[str], probe: dict[str, Any]) -> Iterator[Finding]:
    from simclr_dist.config import load_config
    from simclr_dist.errors import ConfigError

    try:
        config = load_config(path, overrides, check_data=False)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("problem", "configuration", problem)
        return
    yield Finding("ok", "configuration", f"{path}: {config.name}")

    from simclr_dist.doctor.data import examine_data

    yield from guarded("data", lambda: examine_data(config.data, config.train.global_batch_size))
    gpus = probe.get("gpus")
    if config.train.precision == "bf16" and isinstance(gpus, list) and not all(gpu["bf16"] for gpu in gpus):
        yield Finding("warning", "precision", "bf16, which a GPU here only emulates", "train.precision=fp16 or fp32")
    if config.train.precision == "fp16" and gpus == []:
        yield Finding("problem", "precision", "fp16 on a CPU", "train.precision=fp32 or bf16")
    yield from guarded(
        "runs_dir", lambda: examine_folder("runs_dir", config.run_dir, _checkpoints_bytes(config, probe))
    )


def _checkpoints_bytes(config: Any, probe: dict[str, Any]) -> int:
    """What the kept checkpoints and the one being written need; 0 where torch cannot say."""
    if "version" not in probe.get("torch", {}):
        return 0
    from simclr_dist.plan.memory import checkpoint_bytes

    return (config.checkpoint.keep + 1) * checkpoint_bytes(config)


# ---------------------------------------------------------------------------------------------------------------------
# What was inherited

_LAUNCHED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PET_.*|ACCELERATE_.*"
)

# (names, level, what it does and what to do). The first that matches counts.
INHERITED: tuple[tuple[str, Level, str], ...] = (
    ("NUMBA_DISABLE_JIT", "problem", "the loader's kernels cannot run uncompiled: unset it"),
    ("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)", "warning",
     "left by another launcher: a training started by hand would wait for ranks that do not exist: unset it"),
    ("PET_.*|TORCHELASTIC_.*", "warning", "overrides torchrun's and accelerate's options: unset it"),
    ("ACCELERATE_.*", "warning", "overrides accelerate's configuration: unset it unless you mean it"),
    ("OMP_NUM_THREADS|MKL_NUM_THREADS|OPENBLAS_NUM_THREADS|NUMEXPR_NUM_THREADS", "ok",
     "torch computes on so many CPU threads a process; training on a CPU wants its share of the CPUs"),
    ("(OMP|GOMP|KMP)_(PROC_BIND|PLACES|CPU_AFFINITY|AFFINITY)", "warning",
     "ties threads to CPUs, of all processes to the same ones: unset it"),
    ("NUMBA_(NUM_THREADS|THREADING_LAYER.*)", "ok", "has no effect: the loader's threads are its own"),
    ("NUMBA_CACHE_DIR", "ok", "compiled code is kept there: on a cluster, on a local disk"),
    ("CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES", "ok", "only these GPUs are seen"),
    ("CUDA_LAUNCH_BLOCKING|TORCH_DISTRIBUTED_DEBUG|TORCH_SHOW_CPP_STACKTRACES|NCCL_DEBUG", "warning",
     "meant for finding faults, and slow or wordy: unset it afterwards"),
    ("(TORCH_)?NCCL_(ASYNC_ERROR_HANDLING|BLOCKING_WAIT)", "warning",
     "changes how a lost rank is noticed: unset it, timeout.step_s decides that"),
    ("NCCL_(P2P|SHM|IB|NVLS|NET_GDR)_?(DISABLE|LEVEL|ENABLE)", "warning",
     "switches off a way between GPUs; collectives may be many times slower: unset it unless you know why it is there"),
    ("(NCCL|GLOO)_SOCKET_IFNAME", "ok", "must name the interface that leads to the other nodes, on every node"),
    ("NCCL_.*|GLOO_.*", "ok", "reaches NCCL or gloo as it is"),
    ("NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "warning", "changes the precision of products: unset it"),
    ("ATEN_CPU_CAPABILITY|MKL_CBWR|MKL_ENABLE_INSTRUCTIONS|ONEDNN_MAX_CPU_ISA|DNNL_MAX_CPU_ISA", "warning",
     "results differ in their last bits from machines without it, and may be slow: unset it"),
    ("PYTORCH_(CUDA_|NO_CUDA_MEMORY_|HIP_)?(ALLOC_CONF|MEMORY_CACHING)", "ok", "changes torch's GPU memory allocator"),
    ("TORCHDYNAMO_DISABLE|TORCH_COMPILE_DISABLE", "ok", "train.compile has no effect"),
    ("PYTHONPATH", "ok", "modules there come before installed ones"),
    ("PYTHONHOME|PYTHONOPTIMIZE|PYTHONSTARTUP|PYTHONINSPECT", "warning", "changes how Python runs: unset it"),
    ("LD_PRELOAD", "warning", "is loaded into every process: unset it unless you mean it"),
    ("LD_LIBRARY_PATH", "ok", "libraries there come before those that torch brings: unset it if CUDA does not load"),
    ("SIMCLR_(EXPECTED_WORLD_SIZE|ATTEMPT|STOP_SIGNAL)", "warning", "set by our launcher for its workers: unset it"),
    ("SIMCLR_\\w+", "ok", "read by this project"),
    ("SLURM_JOB_ID", "ok", "this shell is inside a job: `python -m launcher check slurm` looks at its nodes"),
)  # fmt: skip


def examine_environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that change what a training does, most of them set by somebody else long ago."""
    rows: list[Finding] = []
    for name in sorted(environ):
        for names, level, meaning in INHERITED:
            if re.fullmatch(names, name):
                value = environ[name]
                shown = value if len(value) <= 60 else value[:57] + "..."
                rows.append(Finding(level, name, shown or "(empty)", meaning))
                break
    yield from rows or [Finding("ok", "environment", "no variable is set that changes how training behaves")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m simclr_dist.doctor", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
