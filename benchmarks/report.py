"""What every result says of itself, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"


def circumstances(arguments: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """When, at which commit, on what. To be asked before measuring, because the load of the machine is in it."""
    import torch  # not above: contestants of data.py have interpreters of their own

    on_gpu = device is not None and device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "load_average": os.getloadavg(),
        "arguments": {name: value for name, value in arguments.items() if name not in ("out", "work")},
    }


def write(name: str, out: str | Path, report: Mapping[str, Any], lines: Sequence[str]) -> None:
    """OUT/NAME_<date>.json with all of `report`, and the table for people beside it."""
    path = Path(out) / f"{name}_{datetime.now(UTC):%Y%m%d_%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(f"written: {path}")


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
