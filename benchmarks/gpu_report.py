"""The last part of `benchmarks/gpu.sh`: one table of the results of all parts, and the same as JSON, with the logs."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from simclr_dist.run.provenance import git_id, versions

MOST_OF_A_LOG = 1 << 20


def describe(found: dict[str, Any]) -> str:
    if "step_ms" in found:
        return (
            f"{found['images_per_s']:,.0f} images/s, {found['floor_share']:.1%} of the bare encoder, augment "
            f"{found['augment_share']:.1%}, data wait {found['data_wait_share']:.2%}, "
            f"{found['share_of_matrix_product']:.1%} of a matrix product; "
            + ", ".join(f"{name}: {part}" for part, name in found["computed_by"].items())
        )
    if "knn" in found:
        seconds, knn = found.get("seconds_an_epoch"), list(found["knn"].values())
        return (
            (f"{seconds:.2f} s an epoch" if seconds else "no speed yet")
            + (f", kNN {knn[-1]:.2%}" if knn else "")
            + (f", linear {found['linear']:.2%}" if "linear" in found else f", {found['state']}")
        )
    if "one_process" in found:
        return ", ".join(f"N = {rows}: {row['ours']['median_ms']:.2f} ms" for rows, row in found["one_process"].items())
    return "written"


def of_all_parts(work: Path, parts: Iterable[str]) -> dict[str, Any]:
    results = {}
    for part in parts:
        newest = sorted([*work.glob(f"{part}.json"), *work.glob(f"{part}_*.json")])
        if newest:
            results[part] = json.loads(newest[-1].read_text())
    return results


def logs(work: Path, parts: Iterable[str]) -> str:
    """The end of each part's log, small enough for the results of a machine that gives few files back."""
    files = [path for part in parts if (path := work / f"{part}.log").exists()]
    return "".join(f"== {path.stem}\n{path.read_text(errors='replace')[-MOST_OF_A_LOG:]}\n" for path in files)


def main() -> None:
    work, out, commit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    states = dict(word.split("=", 1) for word in sys.argv[4:])
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "commit": commit or git_id() or "unknown",
        "versions": {**versions(), "cuda": torch.version.cuda},
        "states": states,
    }
    results = of_all_parts(work, states)
    lines = [f"{facts['device']}, {facts['date']}, commit {facts['commit']}, torch {torch.__version__}"]
    for part, state in states.items():
        lines.append(f"{part:16} {state:16} {describe(results[part]) if part in results else 'see logs.txt'}")
    (out / "gpu.json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    (out / "gpu.txt").write_text("\n".join(lines) + "\n")
    (out / "logs.txt").write_text(logs(work, states))
    print("\n" + "\n".join(lines))
    print(f"written: gpu.txt, gpu.json and logs.txt in {out}")


if __name__ == "__main__":
    main()
