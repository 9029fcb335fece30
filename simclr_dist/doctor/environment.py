"""Environment variables that change what a training does, most of them set by somebody else long ago."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from simclr_dist.doctor.finding import Finding, Level

SET_BY_LAUNCHERS = re.compile(
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
