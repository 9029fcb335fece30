"""What is lost when `prepare` recodes JPEG files by way of their coefficients, against encoding their pixels.

    python benchmarks/prepare_quality.py --photographs imagenet-sample-256.tar

Both ways, at the same quality, are compared with the decoded source: PSNR, bytes, and the mean difference of a value
from 0 to 255 in views of --side px. Files that are stored as they came are left out, and those that cannot be recoded.
Writes JSON and a table to --out.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from data import stage  # type: ignore[import-not-found]
from numpy.typing import NDArray
from PIL import Image
from report import RESULTS, circumstances, write  # type: ignore[import-not-found]

from simclr_dist.data.beton import encode
from simclr_dist.data.sources.jpeg_file import read_jpeg_file

KINDS = {b"\x11\x11\x11": "4:4:4", b"\x22\x11\x11": "4:2:0", b"\x11": "grey"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="image folder or tar of class folders")
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = circumstances({**vars(options), "photographs": options.photographs.name})
    rows: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(stage(options.photographs, None, Path(work) / "photographs")["folder"])
        for path in sorted(folder.glob("*/*")):
            measured = measure(path.read_bytes(), options.quality, options.side)
            if measured is not None:
                rows.setdefault(measured[0], []).append(measured[1])
    found["images"] = rows
    lines = [
        f"JPEG files of {options.photographs.name} at quality {options.quality}, recoded by way of their coefficients "
        f"or decoded and encoded, commit {found['commit']}. Means over the files; views of {options.side} px.",
        "",
        "| source | files | PSNR recoded | encoded | least gain, dB | bytes recoded | encoded "
        "| views: recoded - source | encoded - source | recoded - encoded |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, values in rows.items():
        recoded, encoded, *sizes_and_views = np.mean(values, axis=0)
        least = min(row[0] - row[1] for row in values)
        lines.append(
            f"| {kind} | {len(values)} | {recoded:.2f} | {encoded:.2f} | {least:.2f} | {sizes_and_views[0]:,.0f} | "
            f"{sizes_and_views[1]:,.0f} | " + " | ".join(f"{value:.3f}" for value in sizes_and_views[2:]) + " |"
        )
    print("\n".join(lines))
    write("prepare_quality", options.out, found, lines)


def measure(content: bytes, quality: int, side: int) -> tuple[str, list[float]] | None:
    """The kind of a file that is recoded; PSNR and bytes of both ways, and the differences of the views."""
    file, recoder = read_jpeg_file(content), encode._recoder(quality)
    found = None if file is None or recoder is None else recoder(file)
    if file is None or found is None or found.kept:
        return None
    source = pixels(content)
    encoded = encode._jpeg(source, quality)
    pictures = source, pixels(found.content), pixels(encoded)
    views = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BILINEAR)) for p in pictures]
    return KINDS[file.frame[7::3] if file.num_components == 3 else b"\x11"], [
        psnr(pictures[1], source),
        psnr(pictures[2], source),
        len(found.content),
        len(encoded),
        *(float(np.abs(views[a].astype(float) - views[b]).mean()) for a, b in ((1, 0), (2, 0), (1, 2))),
    ]


def pixels(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def psnr(picture: NDArray[np.uint8], source: NDArray[np.uint8]) -> float:
    """In dB, at most 60: some files have the wanted steps already."""
    error = float(((picture.astype(np.float64) - source) ** 2).mean())
    return 60.0 if error == 0 else min(60.0, 10 * np.log10(255**2 / error))


if __name__ == "__main__":
    main()
