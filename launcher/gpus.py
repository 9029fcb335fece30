"""How many GPUs a process started here can use, and how that was found out. Without torch, and without using one.

`examine` is a function of a view (environment, answers of programs, files), so every machine can be tried on any other.
Three sides are compared: what is in the machine, what the environment names, and what this torch was built for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from launcher.errors import Exit, LaunchError

OR_ON_THE_CPU = "To train on the CPU, give --device cpu"
Kind = Literal["NVIDIA", "AMD"]
BUILT_FOR: dict[Kind, str] = {"NVIDIA": "CUDA", "AMD": "ROCm"}
NO_DEVICE = ("", "-1", "nodevfiles", "none", "void")
"""Values by which schedulers and people say "no GPU" on purpose."""
JOB = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "KUBERNETES_SERVICE_HOST")
"""Set where a scheduler decides which devices a process gets."""


def _run(argv: tuple[str, ...]) -> tuple[int, str]:
    program = shutil.which(argv[0])
    if program is None:
        return 127, ""
    try:
        done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr


def _torch_version_file() -> Path | None:
    try:
        spec = find_spec("torch")  # finds it, does not import it
    except ValueError:
        return None
    return Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None


@dataclass(frozen=True)
class View:
    """What can be seen of a machine.

    run: exit code (127: no such program) and output of a command. root: of the file system. torch: torch's version.py;
    None where torch is not installed, as in a launcher outside the container in which training runs.
    """

    environ: Mapping[str, str]
    run: Callable[[tuple[str, ...]], tuple[int, str]] = _run
    root: Path = Path("/")
    torch: Path | None = None

    def glob(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern), key=lambda path: (len(str(path)), path))  # 2 before 10

    @cached_property
    def torch_build(self) -> tuple[str, str] | None:
        """torch's version, and what it was built for: CUDA, ROCm or CPUs. None where that cannot be read."""
        text = _read(self.torch) if self.torch is not None else None
        if text is None:
            return None
        found = dict(re.findall(r"^(\w+)(?:\s*:[^=\n]+)?\s*=\s*'([^']*)'", text, re.MULTILINE))
        if "__version__" not in found:
            return None
        return found["__version__"], "ROCm" if found.get("hip") else "CUDA" if found.get("cuda") else "CPUs"


@dataclass(frozen=True)
class Gpus:
    """usable: by processes of one training, one each. how: a sentence that says how this was found out.

    problem: why devices that are there, or that the environment names, cannot be used; empty if there are none such.
    """

    usable: int
    how: str
    problem: str = ""
    kind: Kind | None = None


@dataclass(frozen=True)
class _Gpu:
    """id: empty where the machine does not tell. mig: the ids of the MIG instances that it is divided into."""

    id: str = ""
    mig: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Present:
    """What a machine has. broken: why none of it can be used."""

    kind: Kind
    gpus: list[_Gpu]
    seen_by: str
    broken: str = ""

    def __str__(self) -> str:
        num_mig = sum(len(gpu.mig) for gpu in self.gpus)
        mig = f" with {_count(num_mig, 'MIG instance')}" if num_mig else ""
        return f"{_count(len(self.gpus), f'{self.kind} GPU')}{mig} ({self.seen_by})"


def here() -> Gpus:
    """The GPUs of this machine, as a process started from this one would see them."""
    return examine(View(os.environ, run=cache(_run), torch=_torch_version_file()))


def examine(view: View) -> Gpus:
    found = [present for present in (_nvidia(view), _amd(view)) if present is not None]
    if not found:
        return _none_found(view)
    # A machine may have both: an AMD processor's graphics beside an NVIDIA card. torch can use one kind.
    built = view.torch_build[1] if view.torch_build else None
    present = next((each for each in found if BUILT_FOR[each.kind] == built), found[0])
    gpus = _visible(present, view.environ)
    but = [present.broken] if present.broken else []
    if view.torch_build and BUILT_FOR[present.kind] != built:
        but.append(f"torch {view.torch_build[0]} is built for {built}: install a torch for {BUILT_FOR[present.kind]}")
    if but and gpus.usable:
        text = f"{present}, but {'; and '.join(but)}"
        return Gpus(0, text, text, present.kind)
    return gpus


def compare_with_allocated(allocated: int, source: str, gpus: Gpus) -> None:
    """LaunchError where fewer GPUs can be used than a scheduler has given. source: what says so, NAME=value."""
    if gpus.usable < allocated:
        raise LaunchError(
            f"{source}: {_count(allocated, 'GPU')} allocated, but {gpus.usable} usable here: "
            f"{gpus.problem or gpus.how}. {OR_ON_THE_CPU}",
            Exit.PREFLIGHT,
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the machine has


def _nvidia(view: View) -> _Present | None:
    # nvidia-smi first: where a scheduler hides devices, it lists those that are left. /proc lists all of the machine.
    code, listing = view.run(("nvidia-smi", "-L"))
    if code == 0 and (gpus := _listed(listing)):
        return _Present("NVIDIA", gpus, "nvidia-smi -L")
    for pattern, seen_by in (
        ("proc/driver/nvidia/gpus/*", "/proc/driver/nvidia"),
        ("dev/nvidia[0-9]*", "/dev/nvidia*"),
    ):
        cards = view.glob(pattern)
        if cards and code == 127:  # the driver is there and its tools are not, as in many containers
            gpus = [_Gpu(_uuid_in(_read(card / "information"))) for card in cards]
            return _Present("NVIDIA", gpus, f"{seen_by}; no nvidia-smi")
        if cards and code == 0 and any(name in view.environ for name in JOB):
            return None  # a job without GPUs on a machine with some
        if cards:
            broken = f"`nvidia-smi -L` (exit code {code}) says: {_words(listing)}"
            return _Present("NVIDIA", [_Gpu()] * len(cards), seen_by, broken)
    return None


def _listed(listing: str) -> list[_Gpu]:
    gpus: list[_Gpu] = []
    for line in listing.splitlines():
        uuid = match[1] if (match := re.search(r"\(UUID: (\S+)\)", line)) else ""
        if re.match(r"GPU \d+:", line):
            gpus.append(_Gpu(uuid))
        elif re.match(r"\s+MIG ", line) and gpus:
            gpus[-1] = replace(gpus[-1], mig=(*gpus[-1].mig, uuid))
    return gpus


def _uuid_in(text: str | None) -> str:
    match = re.search(r"GPU UUID:\s*(GPU-[0-9a-f-]+)", text or "")
    return match[1] if match else ""


def _amd(view: View) -> _Present | None:
    gpus, num_integrated = [], 0
    for file in view.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
        text = _read(file)  # not readable for a device that is kept from this process
        values = {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text or "", re.MULTILINE)}
        if not values.get("simd_count"):
            continue  # a CPU
        if values.get("cpu_cores_count") and not 90400 <= values.get("gfx_target_version", 0) < 90600:
            num_integrated += 1  # a processor's own graphics; an MI300A has CPU cores, too, but is no such thing
            continue
        gpus.append(_Gpu(f"GPU-{values['unique_id']:016x}" if values.get("unique_id") else ""))
    kfd, seen_by = view.root / "dev/kfd", "/sys/class/kfd"
    if not gpus and not num_integrated:
        for argv in (("amd-smi", "list"), ("rocm-smi", "--showid")):
            code, listing = view.run(argv)
            numbers = set(re.findall(r"^GPU(?:: |\[)(\d+)", listing, re.MULTILINE)) if code == 0 else set()
            if numbers:
                gpus, seen_by = [_Gpu()] * len(numbers), " ".join(argv)
                break
    if gpus:
        rights = "" if os.access(kfd, os.R_OK | os.W_OK) else (
            "/dev/kfd is missing here" if not kfd.exists() else
            "this user may not open /dev/kfd: ask to be in the groups `render` and `video`"
        )  # fmt: skip
        return _Present("AMD", gpus, seen_by, rights)
    if num_integrated or not kfd.exists():
        return None
    return _Present("AMD", [_Gpu()], "/dev/kfd", "neither /sys/class/kfd, amd-smi nor rocm-smi says how many")


def _none_found(view: View) -> Gpus:
    how = "no GPU found: no nvidia-smi, /proc/driver/nvidia, /dev/nvidia*, /sys/class/kfd or /dev/kfd"
    code, said = view.run(("nvidia-smi", "-L"))
    if code != 127:
        how = f"no GPU found: `nvidia-smi -L` says: {_words(said)}"
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        value = view.environ.get(name)
        if value is not None and value.strip().partition(",")[0].lower() not in NO_DEVICE:
            return Gpus(0, how, f"{name}={value} names GPUs, but {how}")
    return Gpus(0, how)


# ---------------------------------------------------------------------------------------------------------------------
# What the environment leaves of it


def _visible(present: _Present, environ: Mapping[str, str]) -> Gpus:
    names = ["CUDA_VISIBLE_DEVICES"]
    if present.kind == "AMD":
        # ROCm hides devices first; HIP counts what is left, and reads CUDA's variable where its own is not set.
        hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
        names = ["ROCR_VISIBLE_DEVICES", hip]
    left, how, problems = present.gpus, str(present), []
    for name in names:
        if name in environ:
            before = len(left)
            left, problem = _filter(left, environ[name])
            how += f"; {name}={environ[name]} leaves {len(left)}"
            if problem:
                problems.append(
                    f"{name}={environ[name]} {problem}, and of {before} left {len(left)} for a training; {present}"
                )
    undivided = [gpu for gpu in left if not gpu.mig]
    if len(undivided) < len(left):
        # CUDA shows one MIG instance to a process, whatever the variable names.
        left = undivided or left[:1]
        how += f"; a training can use {'no MIG instance beside whole GPUs' if undivided else 'one MIG instance'}"
    return Gpus(len(left), how, "; ".join(problems), present.kind)


def _filter(gpus: list[_Gpu], value: str) -> tuple[list[_Gpu], str]:
    """What the variable's value leaves of `gpus`, and what is wrong with the value.

    Read as CUDA, HIP and torch do: up to the first entry that names no device; a repeated one hides all.
    """
    entries = value.split(",")
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), "")
    chosen: dict[str, _Gpu] = {}
    for entry in entries:
        key, gpu = _named(gpus, entry, prefix)
        if gpu is None:
            on_purpose = entry.strip().lower() in NO_DEVICE
            return list(chosen.values()), "" if on_purpose else f"names {entry!r}, which is no device here"
        if key in chosen:
            return [], f"names {entry!r} twice, which hides all"
        chosen[key] = gpu
    return list(chosen.values()), ""


def _named(gpus: list[_Gpu], entry: str, prefix: str) -> tuple[str, _Gpu | None]:
    """The device that an entry of a list names, and a key by which it is the same as another one; None: no device.

    prefix: of all ids in the list; empty for a list of numbers.
    """
    if not prefix:
        match = re.match(r"\+?\d+", entry.strip())  # as strtoul reads: `1gpu` is 1
        index = int(match[0]) if match else len(gpus)
        return str(index), gpus[index] if index < len(gpus) else None
    if not entry.startswith(prefix):
        return entry, None
    known = [gpu.id for gpu in gpus] if prefix == "GPU-" else [each for gpu in gpus for each in gpu.mig]
    if not any(gpu.id for gpu in gpus):  # this machine does not tell its ids: believed, as far as there are devices
        return entry, _Gpu(entry, mig=(entry,) if prefix == "MIG-" else ()) if gpus else None
    # The beginning of an id is enough where it fits one device.
    matches = [each for each in known if each.lower().startswith(entry.lower())]
    if len(matches) != 1:
        return entry, None
    if prefix == "MIG-":
        return matches[0], _Gpu(matches[0], mig=(matches[0],))
    return matches[0], next(gpu for gpu in gpus if gpu.id == matches[0])


def _read(path: Path | None) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path is not None else None
    except OSError:
        return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _words(output: str) -> str:
    return " ".join(output.split())[:200] or "nothing"
