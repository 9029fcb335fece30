"""The last part of `benchmarks/gpu.sh`: one table of the results of all parts, and DIR/gpu.json beside it."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from simclr_dist.run.provenance import git_id, versions


def describe(found: dict[str, Any]) -> str:
    if "step_ms" in found:
        return (
            f"{found['images_per_s']:,.0f} images/s, {found['floor_share']:.1%} of the bare encoder, augment "
            f"{found['augment_share']:.1%}, data wait {found['data_wait_share']:.2%}, "
            f"{found['share_of_matrix_product']:.1%} of a matrix product"
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


def main() -> None:
    folder, commit, states = Path(sys.argv[1]), sys.argv[2], dict(word.split("=", 1) for word in sys.argv[3:])
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "commit": commit or git_id() or "unknown",
        "versions": {**versions(), "cuda": torch.version.cuda},
        "states": states,
    }
    results = {}
    for part in states:
        newest = sorted([*folder.glob(f"{part}.json"), *folder.glob(f"{part}_*.json")])
        if newest:
            results[part] = json.loads(newest[-1].read_text())
    (folder / "gpu.json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    print(f"\n{facts['device']}, {facts['date']}, commit {facts['commit']}, torch {torch.__version__}")
    for part, state in states.items():
        what = describe(results[part]) if part in results else "see its log"
        print(f"{part:16} {state:16} {what}")
    print(f"written: {folder / 'gpu.json'}")


if __name__ == "__main__":
    main()
