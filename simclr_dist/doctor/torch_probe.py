"""Tries what torch can do on this machine. `simclr-dist doctor` runs this file in a process of its own.

A broken library may raise, abort or hang. So a line of JSON on stdout precedes each attempt, another has its result.
Imports nothing of this package, so that it starts where little else works.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    warnings.simplefilter("ignore")
    attempt("torch", torch)
    attempt("torchvision", torchvision)
    attempt("accelerate", accelerate)
    attempt("gpus", gpus)
    attempt("gloo", lambda: start_group("gloo", "cpu"))
    import torch as t

    if t.cuda.is_available():
        attempt("nccl", lambda: start_group("nccl", "cuda"))
    attempt("openmp", openmp)


def attempt(what: str, action: Callable[[], Any]) -> None:
    print(json.dumps({"trying": what}), flush=True)
    try:
        print(json.dumps({what: action()}), flush=True)
    except Exception as error:
        print(json.dumps({what: {"error": f"{type(error).__name__}: {error}"}}), flush=True)
        if what == "torch":
            sys.exit()


def torch() -> dict[str, Any]:
    import torch

    torch.zeros(2, requires_grad=True).sum().backward()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "distributed": torch.distributed.is_available(),
    }


def torchvision() -> dict[str, Any]:
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)  # fails when built for another torch
    return {"version": torchvision.__version__}


def accelerate() -> dict[str, Any]:
    import accelerate
    from accelerate.commands.config.config_args import default_config_file

    return {
        "version": accelerate.__version__,
        "config": default_config_file if os.path.isfile(default_config_file) else "",
    }


def gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        x = torch.ones(64, 64, device=f"cuda:{index}")
        if float((x @ x).sum()) != 64.0**3:
            raise RuntimeError(f"GPU {index} computes a wrong product")
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "free_gib": free / 2**30,
                "total_gib": total / 2**30,
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    return found


def start_group(backend: str, device: str) -> dict[str, Any]:
    """A process group of one: shows that the library loads and starts, not that other machines can be reached."""
    import torch

    dist = torch.distributed
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        x = torch.ones(1, device=device)
        dist.all_reduce(x)
        dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    return {"version": version}


def openmp() -> list[str]:
    """OpenMP runtimes in a process that loads the libraries of training."""
    for module in ("numba", "cv2", "sklearn"):
        try:
            __import__(module)
        except Exception:
            continue
    names = re.findall(r"/(lib(?:gomp|iomp5|omp)\b[^/\s]*)", Path("/proc/self/maps").read_text())
    return sorted(set(names))


if __name__ == "__main__":
    main()
