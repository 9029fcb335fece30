"""What the environment may say about a training: one table, one door. Imports the standard library only.

Accelerate reads some hundred variables. `accelerate launch` writes most of them, from a file that `accelerate config`
made long ago. Each has one treatment here. `used`: read as it is. `refused`: it asks for another kind of training.
`ignored`: taken out of the environment before accelerate reads it. `said`: torch or a library reads it, and results,
speed or time limits differ. What is refused ends the start; what is ignored or said is named in one line at the start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from simclr_dist.errors import ConfigError
from simclr_dist.safe_text import masked

Treatment = Literal["used", "refused", "ignored", "said"]

_FALSE = ("", "0", "f", "false", "n", "no", "none", "off")
_TRUE = ("1", "t", "true", "y", "yes", "on")


@dataclass(frozen=True)
class Variables:
    """A row of the table: names (with * as in a shell), what is done with them, and why."""

    names: tuple[str, ...]
    treatment: Treatment
    meaning: str
    silent: tuple[str, ...] = ()
    """Values, in small letters, that change nothing: neither refused nor named. `*`: all, without another variable."""
    config: tuple[str, ...] = ()
    """Keys of `accelerate config` that say the same."""

    def names_it(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.names)

    def is_silent(self, value: str) -> bool:
        return "*" in self.silent or value.strip().lower() in self.silent


_ONLY_WITH_IT = "counts only with the refused setting above"

STARTED = ("SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE")
"""How many processes a starter of tasks has started that tells them neither rank nor meeting place by torch's names."""

TABLE: tuple[Variables, ...] = (
    # Which processes there are, and where.
    Variables(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_*", "ROLE_*",
               "MASTER_ADDR", "MASTER_PORT"), "used",
              "which process this is, of how many, and where they meet; set by `accelerate launch` and torchrun",
              config=("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
                      "same_network", "rdzv_backend")),
    Variables(("TORCHELASTIC_*", "PET_*"), "used", "torchrun's: its own options, the number of this restart"),
    Variables(("PMI_*", "PMIX_*", "OMPI_*", "MV2_*", "MPI_LOCAL*"), "used",
              "the same from mpirun, on CPUs, where MASTER_ADDR is set", config=("mpirun_config",)),
    Variables(STARTED, "used",
              "how many tasks srun, flux or jsrun has started: refused where nothing says where they meet"),
    Variables(("ACCELERATE_USE_CPU",), "used", "train on the CPU although there are GPUs: a yes or no",
              config=("use_cpu", "compute_environment", "distributed_type")),
    Variables(("ACCELERATE_TORCH_DEVICE",), "refused",
              "one device for all processes: choose with CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=true"),
    Variables(("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
               "HIP_VISIBLE_DEVICES"), "used",
              "only these GPUs are seen", config=("gpu_ids",)),
    Variables(("FORK_LAUNCHED", "ACCELERATE_NUM_PROCESSES", "ACCELERATE_DEBUG_RDV_FILE"), "used",
              "accelerate's notebook launcher has started this process"),
    Variables(("ACCELERATE_CPU_AFFINITY",), "used", "a process stays on the CPUs that are near its GPU",
              config=("enable_cpu_affinity",)),
    # Other kinds of training.
    Variables(("ACCELERATE_USE_DEEPSPEED",), "refused", "DeepSpeed has a step of its own; this one is not in it",
              silent=_FALSE, config=("deepspeed_config",)),
    Variables(("ACCELERATE_DEEPSPEED_*", "ACCELERATE_CONFIG_DS_FIELDS"), "ignored", _ONLY_WITH_IT, silent=("*",)),
    Variables(("ACCELERATE_USE_FSDP",), "refused",
              "FSDP shards parameters; LARS, checkpoints and global BatchNorm need whole ones",
              silent=_FALSE, config=("fsdp_config",)),
    Variables(("FSDP_*", "ACCELERATE_ALLOW_CP_STANDALONE"), "ignored", _ONLY_WITH_IT, silent=("*",)),
    Variables(("ACCELERATE_USE_MEGATRON_LM",), "refused", "Megatron-LM is for language models", silent=_FALSE,
              config=("megatron_lm_config",)),
    Variables(("MEGATRON_LM_*",), "ignored", _ONLY_WITH_IT, silent=("*",)),
    Variables(("ACCELERATE_USE_PARALLELISM_CONFIG",), "refused",
              "tensor, context or sequence parallelism: images are shared out over all processes here", silent=_FALSE,
              config=("parallelism_config",)),
    Variables(("PARALLELISM_CONFIG_*",), "ignored", _ONLY_WITH_IT, silent=("*",)),
    Variables(("ACCELERATE_USE_SAGEMAKER",), "refused", "SageMaker's own communication", silent=_FALSE),
    Variables(("ACCELERATE_SAGEMAKER_*",), "ignored", _ONLY_WITH_IT, silent=("*",)),
    Variables(("ACCELERATE_IN_TPU_POD", "ACCELERATE_DOWNCAST_BF16"), "refused", "TPUs are not supported", silent=_FALSE,
              config=("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env",
                      "command_file", "commands")),
    # What the configuration decides.
    Variables(("ACCELERATE_GRADIENT_ACCUMULATION_STEPS",), "ignored",
              "each batch is one update: train.global_batch_size says how large, train.micro_batch_size in which parts",
              silent=("1",)),
    Variables(("ACCELERATE_GRADIENT_CLIPPING",), "ignored", "optim.max_grad_norm decides", silent=_FALSE),
    Variables(("ACCELERATE_MIXED_PRECISION",), "ignored", "train.precision decides", silent=_FALSE,
              config=("mixed_precision",)),
    Variables(("ACCELERATE_FP8_*", "FP8_*"), "ignored", "train.precision decides", silent=("*",),
              config=("fp8_config",)),
    Variables(("ACCELERATE_DYNAMO_BACKEND",), "ignored", "train.compile decides", silent=_FALSE,
              config=("dynamo_config",)),
    Variables(("ACCELERATE_DYNAMO_*",), "ignored", "train.compile decides", silent=("*",)),
    Variables(("ACCELERATE_DEBUG_MODE",), "ignored", "checks accelerate's own collectives, which are not used here",
              silent=_FALSE, config=("debug",)),
    Variables(("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH", "ACCELERATE_BYPASS_DEVICE_MAP",
               "ACCELERATE_INIT_INCLUDE_BUFFERS"), "ignored", "changes nothing in a training", silent=("*",),
              config=("main_training_function",)),
    Variables(("ACCELERATE_*",), "ignored", "not known to this version"),
    # What torch and its libraries read.
    Variables(("OMP_NUM_THREADS",), "used",
              "torch computes on so many CPU threads a process: a whole number from 1 on"),
    Variables(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "used",
              "CPU threads of a library"),
    Variables(("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"), "said",
              "changes the precision of products"),
    Variables(("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
               "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"), "said",
              "results differ in their last bits from machines without it"),
    Variables(("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_FX_GRAPH_CACHE"), "used",
              "where and how fast torch.compile compiles"),
    Variables(("TORCHDYNAMO_*", "TORCH_COMPILE*", "TORCHINDUCTOR_*"), "said", "changes what train.compile does"),
    Variables(("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT",
               "NCCL_BLOCKING_WAIT"), "said", "changes how a lost rank is noticed, which timeout.* should decide",
              silent=("", "1", "3")),
    Variables(("TORCH_DISTRIBUTED_DEBUG", "CUDA_LAUNCH_BLOCKING"), "said", "for finding faults, and slow",
              silent=(*_FALSE, "info")),
    Variables(("PYTORCH_NO_CUDA_MEMORY_CACHING",), "said", "every tensor is allocated anew, and slow", silent=_FALSE),
    Variables(("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
              "used", "memory of torch and its libraries on GPUs"),
    Variables(("SIMCLR_EXPECTED_WORLD_SIZE", "SIMCLR_ATTEMPT", "SIMCLR_STOP_SIGNAL", "SIMCLR_CHECKED",
               "SIMCLR_OUTPUT"), "used",
              "set by our launcher for its workers"),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A variable that is set, or a key of accelerate's configuration, and its row."""

    name: str
    value: str
    row: Variables

    @property
    def shown(self) -> str:
        """The value for people and records, without secrets."""
        return masked({self.name: self.value})[self.name]

    @property
    def counts(self) -> bool:
        """Whether it must be spoken of."""
        return self.row.treatment != "used" and not self.row.is_silent(self.value)

    def __str__(self) -> str:
        value = self.shown if len(self.shown) <= 40 else f"{self.shown[:37]}..."
        return f"{self.name}={value}: {self.row.meaning}"


def look_up(name: str) -> Variables | None:
    """The row of the variable `name`; None for one that has nothing to do with a training."""
    return next((row for row in TABLE if row.names_it(name)), None)


def found_in(environ: Mapping[str, str]) -> list[Found]:
    """What of `environ` the table knows, by name."""
    return [Found(name, environ[name], row) for name in sorted(environ) if (row := look_up(name)) is not None]


def check_environment(environ: Mapping[str, str]) -> None:
    """Raises ConfigError with everything in `environ` that a training refuses."""
    found = found_in(environ)
    problems = [
        f"the environment variable {entry}" for entry in found if entry.row.treatment == "refused" and entry.counts
    ]
    if problems:
        problems[-1] += ". Unset it, or change what sets it (`accelerate config`)"
    problems += [*_wrong_ranks(environ), *_wrong_values(environ)]
    if problems:
        raise ConfigError(problems)


def sentence(environ: Mapping[str, str]) -> str | None:
    """One line about what is ignored and what changes results; None if there is nothing to say."""
    found = [entry for entry in found_in(environ) if entry.counts]
    parts = [
        f"{entry.name}={entry.shown} is ignored ({entry.row.meaning})"
        for entry in found
        if entry.row.treatment == "ignored"
    ]
    parts += [str(entry) for entry in found if entry.row.treatment == "said"]
    return f"environment: {'; '.join(parts)}" if parts else None


def wants_cpu(environ: Mapping[str, str]) -> bool:
    return environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE


@contextmanager
def without_ignored() -> Iterator[None]:
    """Inside, what is ignored is not in os.environ."""
    ignored = {entry.name: entry.value for entry in found_in(os.environ) if entry.row.treatment == "ignored"}
    for name in ignored:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ignored)


def _wrong_ranks(environ: Mapping[str, str]) -> Iterator[str]:
    """A half-set environment, in which this process would wait for others for ever."""
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in environ:
            if not environ[name].isdecimal():
                yield f"the environment variable {name}={environ[name]} is not a whole number"
                return
            numbers[name] = int(environ[name])
    size = numbers.get("WORLD_SIZE", 1)
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environ]
    if "WORLD_SIZE" not in environ and "MASTER_ADDR" not in environ:
        counts = (*STARTED, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PET_NNODES")
        if found := [f"{name}={environ[name]}" for name in counts if environ.get(name, "0") not in ("0", "1", "1:1")]:
            yield (
                f"the environment says that mpirun, srun or the like started several processes ({', '.join(found)}), "
                "but not where they meet, and each would train alone: start one task on each node with `python -m "
                "launcher node CONFIG`, or all with `accelerate launch` or torchrun. To train with one, unset it"
            )
        tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks not in ("0", "1") and "SIMCLR_ATTEMPT" not in environ:  # our launcher runs one task on each node
            yield (
                f"srun started {tasks} tasks (the environment variable SLURM_STEP_NUM_TASKS), and each would be a "
                "training of its own. For one training with a process for each GPU: `bash slurm/train.sh CONFIG`, "
                "without srun; for a training in each task, unset the variable"
            )
    if size > 1 and missing:
        yield (
            f"the environment says WORLD_SIZE={size}, but {', '.join(missing)} is not set: start all processes with "
            "`accelerate launch`, torchrun or `python -m launcher`, or unset WORLD_SIZE to train with one"
        )
    elif numbers.get("RANK", 0) >= size:
        yield (
            f"the environment says RANK={numbers['RANK']} of WORLD_SIZE={size}: left by another launcher? Unset both "
            "to train with one process"
        )


def _wrong_values(environ: Mapping[str, str]) -> Iterator[str]:
    threads = environ.get("OMP_NUM_THREADS")
    if threads is not None and not (threads.strip().isdecimal() and int(threads) > 0):
        yield f"the environment variable OMP_NUM_THREADS={threads} is not a whole number from 1 on"
    cpu = environ.get("ACCELERATE_USE_CPU")
    if cpu is not None and cpu.lower() not in (*_TRUE, *_FALSE):
        yield f"the environment variable ACCELERATE_USE_CPU={cpu} is neither true nor false"


def as_markdown() -> str:
    """The table for docs/environment.md."""
    lines = ["| Variable | Key of `accelerate config` | | What it does |", "|---|---|---|---|"]
    for row in TABLE:
        names, keys = (", ".join(f"`{name}`" for name in words) for words in (row.names, row.config))
        lines.append(f"| {names} | {keys} | {row.treatment} | {row.meaning} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# `accelerate config`

_PLAIN_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU")


def found_in_accelerate_config(values: Mapping[str, object]) -> list[Found]:
    """What a file made by `accelerate config` says that a training refuses or ignores."""
    found = []
    for key, value in values.items():
        row = next((row for row in TABLE if key in row.config), None)
        if key == "distributed_type" and value not in _PLAIN_TYPES:
            row = Variables(("distributed_type",), "refused", f"only {', '.join(_PLAIN_TYPES)} are for this training")
        if key == "compute_environment" and value != "LOCAL_MACHINE":
            row = Variables((key,), "refused", "only LOCAL_MACHINE is for this training")
        if key.endswith("_config") and isinstance(value, Mapping):
            value = " ".join(f"{inner}={each}" for inner, each in value.items() if str(each).lower() not in _FALSE)
        if row is not None and value:
            found.append(Found(key, str(value), row))
    return found
