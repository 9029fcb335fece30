"""What `prepare --for-views` saves: bytes, and CPU time of two crops an image, against the default's file.

    python benchmarks/prepare_to_fit.py --photographs imagenet-sample-256.tar [--side 224]

Both files are made from the same photographs. Each is read by our loader in a fresh process on one CPU, in turns,
several rounds; the median of CPU time counts, so that a busy machine disturbs it little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from data import in_child, stage  # type: ignore[import-not-found]
from report import RESULTS, circumstances, write  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="image folder or tar of class folders")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time of a measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    arguments = {**vars(options), "photographs": options.photographs.name}
    found = circumstances(arguments)
    with tempfile.TemporaryDirectory() as work:
        files = prepared(options.photographs, options.side, Path(work))
        found["bytes"] = {name: file.stat().st_size for name, file in files.items()}
        speeds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(options.rounds):
            for name, file in files.items():
                task = {"contestant": "ours", "side": options.side, "complete": False, "seconds": options.seconds}
                speeds[name].append(
                    in_child(sys.executable, {**task, "beton": str(file), "folder": ""})["images_per_cpu_s"]
                )
                print(name, round(speeds[name][-1]), flush=True)
    found["images_per_cpu_s"] = speeds
    lines = [
        f"Two crops of {options.side} px of each image of {options.photographs.name}, one core of {found['device']}, "
        f"commit {found['commit']}, median of {options.rounds} rounds.",
        "",
        "| prepared | MB | images / CPU second | bytes | speed |",
        "|---|---:|---:|---:|---:|",
    ]
    of_default = found["bytes"]["default"], statistics.median(speeds["default"])
    for name, speed in speeds.items():
        size, median = found["bytes"][name], statistics.median(speed)
        shares = f"{size / of_default[0]:.2f} | {median / of_default[1]:.2f}x"
        lines.append(f"| {name} | {size / 1e6:.1f} | {median:,.0f} | {shares} |")
    print("\n".join(lines))
    write("prepare_to_fit", options.out, found, lines)


def prepared(photographs: Path, side: int, work: Path) -> dict[str, Path]:
    from simclr_dist.data.beton.prepare import prepare

    staged = stage(photographs, None, work / "photographs")
    fit = work / "fit.beton"
    prepare(staged["folder"], fit, for_views=side, on_error="skip")
    return {"default": Path(staged["beton"]), f"--for-views {side}": fit}


if __name__ == "__main__":
    main()
