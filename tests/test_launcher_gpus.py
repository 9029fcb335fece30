"""GPUs are counted as CUDA, HIP and torch would, on pretended machines. Run: pytest tests/test_launcher_gpus.py"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from launcher import build, gpus
from launcher.errors import Exit, LaunchError
from launcher.gpus import Gpus, View, compare_with_allocated, examine

UUIDS = [f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abcd"]
MIG = [f"MIG-{letter * 8}-0000-0000-0000-000000000000" for letter in "ef"]
SMI = "".join(f"GPU {index}: NVIDIA A100-SXM4-40GB (UUID: {uuid})\n" for index, uuid in enumerate(UUIDS))
SMI_MIG = f"GPU 0: NVIDIA A100 (UUID: {UUIDS[0]})\n" + "".join(
    f"  MIG 3g.20gb     Device  {index}: (UUID: {uuid})\n" for index, uuid in enumerate(MIG)
)
CUDA = "__version__ = '2.15.0+cu132'\ndebug = False\ncuda: Optional[str] = '13.2'\nhip: Optional[str] = None\n"
ROCM = "__version__ = '2.8.0+rocm6.4'\ndebug = False\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4.4'\n"
CPU = "__version__ = '2.8.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"


def machine(
    root: Path,
    environ: Mapping[str, str] = {},
    programs: Mapping[str, str | tuple[int, str]] = {},
    files: Mapping[str, str] = {},
    torch: str | None = None,
) -> Gpus:
    """What `examine` says of a machine with these programs and their output, files, and content of torch/version.py."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if torch is not None:
        root.mkdir(exist_ok=True)
        (root / "version.py").write_text(torch)

    def run(argv: tuple[str, ...]) -> tuple[int, str]:
        answer = programs.get(argv[0], (127, ""))
        return (0, answer) if isinstance(answer, str) else answer

    return examine(View(environ, run, root, root / "version.py" if torch is not None else None))


def amd(*nodes: str) -> dict[str, str]:
    return {f"sys/class/kfd/kfd/topology/nodes/{n}/properties": text for n, text in enumerate(nodes)} | {"dev/kfd": ""}


AMD_CPU = "cpu_cores_count 64\nsimd_count 0\n"
AMD_GPU = "cpu_cores_count 0\nsimd_count 440\ngfx_target_version 90402\nunique_id {}\n"
AMD_INTEGRATED = "cpu_cores_count 16\nsimd_count 8\ngfx_target_version 90012\n"
FOUR_AMD = amd(AMD_CPU, *(AMD_GPU.format(number) for number in range(161, 165)))


@pytest.mark.parametrize(
    ("visible", "usable", "problem"),
    [
        (None, 4, ""),
        ("0", 1, ""),
        ("0, 1", 2, ""),
        ("3,2,1,0", 4, ""),
        ("0,1,", 2, ""),
        ("", 0, ""),
        ("-1", 0, ""),
        ("0,-1,1", 1, ""),
        ("NoDevFiles", 0, ""),
        ("none", 0, ""),
        ("7", 0, "names '7', which is no device here, and of 4 left 0"),
        ("0,7,1", 1, "names '7'"),
        ("all", 0, "names 'all'"),
        ("0,0", 0, "names '0' twice, which hides all"),
        (UUIDS[1], 1, ""),
        ("GPU-a,GPU-BBBB", 2, ""),
        ("GPU-", 0, "names 'GPU-'"),  # fits more than one
        ("GPU-a,GPU-ffff", 1, "names 'GPU-ffff'"),
        ("GPU-a,GPU-aaaa", 0, "twice"),
        ("GPU-a,0", 1, "names '0'"),  # ids and numbers do not mix
        (MIG[0], 0, "no device here"),
    ],
)
def test_nvidia_gpus_are_counted_as_cuda_counts_them(
    tmp_path: Path, visible: str | None, usable: int, problem: str
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = machine(tmp_path, environ, {"nvidia-smi": SMI})
    assert found.usable == usable
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)
    assert "4 NVIDIA GPUs (nvidia-smi -L)" in found.how
    assert visible is None or f"CUDA_VISIBLE_DEVICES={visible} leaves {usable}" in found.how


def test_torch_counts_the_same_of_any_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is torch's own reading of the variable, which ends at the first device that is not there."""
    draw = random.Random(0)
    words = ["0", "1", "3", "4", "-1", "", " 2", "1gpu", "none", "GPU-a", "GPU-b", UUIDS[2], "GPU-zz", "x"]
    for _ in range(300):
        value = ",".join(draw.choices(words, k=draw.randint(1, 3)))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        listed = torch.cuda._parse_visible_devices()
        if listed and isinstance(listed[0], str):
            listed = torch.cuda._transform_uuid_to_ordinals(listed, UUIDS)
        expected = next((index for index, each in enumerate(listed) if each >= 4), len(listed))
        assert machine(tmp_path, {"CUDA_VISIBLE_DEVICES": value}, {"nvidia-smi": SMI}).usable == expected, value


@pytest.mark.parametrize(
    ("visible", "usable"), [(None, 1), (",".join(MIG), 1), (MIG[1], 1), ("MIG-eeee", 1), ("0", 1), ("MIG-0", 0)]
)
def test_one_training_can_use_one_mig_instance(tmp_path: Path, visible: str | None, usable: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = machine(tmp_path, environ, {"nvidia-smi": SMI_MIG})
    assert found.usable == usable
    assert ("one MIG instance" in found.how) == bool(usable)
    beside = SMI_MIG + SMI.replace("GPU 0:", "GPU 1:", 1).splitlines()[0]
    assert machine(tmp_path, {}, {"nvidia-smi": beside}).usable == 1  # the whole one


def test_gpus_are_found_without_nvidia_smi(tmp_path: Path) -> None:
    files = {f"proc/driver/nvidia/gpus/0000:0{n}:00.0/information": f"GPU UUID: \t {UUIDS[n]}\n" for n in range(2)}
    found = machine(tmp_path / "proc", {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, files=files)
    assert (found.usable, "/proc/driver/nvidia; no nvidia-smi" in found.how) == (1, True)
    devices = {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}
    assert machine(tmp_path / "dev", files=devices).usable == 2
    assert machine(tmp_path / "dev", {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}).usable == 1  # its ids are not known


def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(tmp_path: Path) -> None:
    files = {"proc/driver/nvidia/gpus/0000:01:00.0/information": ""}
    broken = (18, "Failed to initialize NVML: Driver/library version mismatch\n")
    found = machine(tmp_path, programs={"nvidia-smi": broken}, files=files)
    assert found.usable == 0
    assert "1 NVIDIA GPU (/proc/driver/nvidia), but `nvidia-smi -L` (exit code 18) says: Failed to" in found.problem
    hidden = {"nvidia-smi": "No devices were found\n"}
    assert machine(tmp_path, programs=hidden).problem
    job = machine(tmp_path, {"SLURM_JOB_ID": "7"}, hidden)  # a job without GPUs on a node with some
    assert (job.usable, job.problem) == (0, "")
    assert "`nvidia-smi -L` says: No devices were found" in job.how


@pytest.mark.parametrize(
    ("environ", "usable", "problem"),
    [
        ({}, 4, ""),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, 2, ""),
        ({"HIP_VISIBLE_DEVICES": "0"}, 1, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, ""),  # HIP reads it, too
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, 1, ""),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, 1, ""),
        # A scheduler that sets both with numbers of the machine: HIP counts what ROCR has left.
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "2,3"}, 0, "names '2', which is no device here"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000a2"}, 1, ""),
        ({"ROCR_VISIBLE_DEVICES": ""}, 0, ""),
    ],
)  # fmt: skip
def test_amd_gpus_are_counted_as_rocm_counts_them(
    tmp_path: Path, environ: dict[str, str], usable: int, problem: str
) -> None:
    found = machine(tmp_path, environ, files=FOUR_AMD, torch=ROCM)
    assert (found.usable, found.kind) == (usable, "AMD")
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)


def test_amd_is_found_by_its_programs_and_named_where_it_cannot_be_counted(tmp_path: Path) -> None:
    showid = "".join(f"GPU[{n}]\t\t: Device Name: MI250\nGPU[{n}]\t\t: Device ID: 0x740c\n" for n in range(2))
    kfd = {"dev/kfd": ""}
    assert machine(tmp_path, programs={"rocm-smi": showid}, files=kfd).usable == 2
    assert machine(tmp_path, programs={"amd-smi": "GPU: 0\n    BDF: 0000:01:00.0\n\nGPU: 1\n"}, files=kfd).usable == 2
    found = machine(tmp_path / "no kfd", programs={"rocm-smi": showid}, torch=CUDA)
    assert "2 AMD GPUs (rocm-smi --showid), but /dev/kfd is missing here; and torch 2.15.0+cu132" in found.problem
    assert "neither /sys/class/kfd, amd-smi nor rocm-smi" in machine(tmp_path, files=kfd).problem
    closed = {name: text for name, text in FOUR_AMD.items() if name != "dev/kfd"}
    assert "/dev/kfd is missing here" in machine(tmp_path / "closed", files=closed).problem


@pytest.mark.parametrize(
    ("build", "programs", "files", "problem"),
    [
        (CUDA, {}, FOUR_AMD, "4 AMD GPUs (/sys/class/kfd), but torch 2.15.0+cu132 is built for CUDA: install a"),
        (CPU, {"nvidia-smi": SMI}, {}, "torch 2.8.0+cpu is built for CPUs: install a torch for CUDA"),
        (ROCM, {"nvidia-smi": SMI}, {}, "torch 2.8.0+rocm6.4 is built for ROCm"),
        (CUDA, {"nvidia-smi": SMI}, {}, ""),
        (ROCM, {}, FOUR_AMD, ""),
        (CUDA, {"nvidia-smi": SMI}, FOUR_AMD, ""),
        (ROCM, {"nvidia-smi": SMI}, FOUR_AMD, ""),
        (CUDA, {}, amd(AMD_CPU, AMD_INTEGRATED), ""),  # a laptop
        ("nothing of the kind", {"nvidia-smi": SMI}, {}, ""),
    ],
)  # fmt: skip
def test_a_torch_built_for_other_gpus_is_named(
    tmp_path: Path, build: str, programs: dict[str, str], files: dict[str, str], problem: str
) -> None:
    found = machine(tmp_path, programs=programs, files=files, torch=build)
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)
    assert found.usable == (0 if problem or AMD_INTEGRATED in files.values() else 4)


def test_this_torch_is_read_as_it_says_itself() -> None:
    version = View({}, torch=gpus._torch_version_file()).torch_build
    built = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPUs"
    assert version == (torch.__version__, built)


def test_gpus_that_are_named_or_allocated_and_not_there_are_never_a_cpu_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = machine(tmp_path)
    with pytest.raises(LaunchError, match=r"SLURM_GPUS_ON_NODE=4: 4 GPUs allocated, but 0 usable here: no GPU found"):
        compare_with_allocated(4, "SLURM_GPUS_ON_NODE=4", nothing)
    compare_with_allocated(0, "SLURM_GPUS_ON_NODE=0", nothing)

    named = machine(tmp_path, {"CUDA_VISIBLE_DEVICES": "0,1"})
    monkeypatch.setattr(gpus, "here", lambda: named)
    chosen = argparse.Namespace(device="auto", nproc=None)
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=0,1 names GPUs, but no GPU found") as raised:
        build.device_and_procs(chosen)
    assert raised.value.exit_code == Exit.PREFLIGHT
    assert "--device cpu" in str(raised.value)
    assert build.device_and_procs(argparse.Namespace(device="cpu", nproc=2)) == ("cpu", 2)

    partly = machine(tmp_path, {"CUDA_VISIBLE_DEVICES": "0,7"}, {"nvidia-smi": SMI})
    monkeypatch.setattr(gpus, "here", lambda: partly)
    with pytest.raises(LaunchError, match="names '7'"):
        build.device_and_procs(chosen)
    assert build.device_and_procs(argparse.Namespace(device="cuda", nproc=1)) == ("cuda", 1)

    capsys.readouterr()
    monkeypatch.setattr(gpus, "here", lambda: nothing)
    assert build.device_and_procs(chosen) == ("cpu", 1)
    assert "launcher: on the CPU: no GPU found: no nvidia-smi, " in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_user_who_may_not_open_the_device_is_told_the_groups(tmp_path: Path) -> None:
    machine(tmp_path, files=FOUR_AMD)
    (tmp_path / "dev/kfd").chmod(0)
    assert "groups `render` and `video`" in machine(tmp_path).problem
