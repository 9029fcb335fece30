"""What each process of `check --deep` runs: it connects to all others, gathers tensors, and records its progress.

The only file of the launcher that imports torch, and only when it is run (`python -m launcher.deep_check FOLDER`).
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

from simclr_dist.run.layout import write_record

TIMEOUT_S = 60
NUM_FLOATS = 1 << 20


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def note(stage: str, **values: object) -> None:
        write_record(folder / f"rank-{rank}.json", {"rank": rank, "node": node, "stage": stage, **values})

    note("started")
    import torch
    import torch.distributed as dist

    cuda = os.environ.get("ACCELERATE_USE_CPU") != "true"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    note("imported", device=name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
        note("joined", device=name)
    mine = torch.full((NUM_FLOATS,), float(rank), device=device)
    everyone = torch.empty(world_size * NUM_FLOATS, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        if world_size > 1:
            dist.all_gather_into_tensor(everyone, mine)
        else:
            everyone.copy_(mine)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    right = bool((everyone.view(world_size, -1)[:, 0].cpu() == torch.arange(world_size)).all())
    note("gathered" if right else "wrong sum", device=name, gather_ms=round(min(seconds) * 1000, 2))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
