"""Does `prepare` take longer from a zip, parquet or WebDataset than from the folder of the same photographs?

    python benchmarks/prepare_sources.py --photographs imagenet-sample-256.tar [--copies 4] [--workers 2]

Each source is prepared by a command of its own, in turns, several rounds; the medians of CPU and wall time count, with
what starting takes. The files written must be the same to the byte.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from report import RESULTS, circumstances, write  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="tar of class folders")
    parser.add_argument("--copies", type=int, default=4, help="of each photograph, so that starting weighs little")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = circumstances({**vars(options), "photographs": options.photographs.name})
    with tempfile.TemporaryDirectory() as work:
        files = photographs(options.photographs, options.copies)
        sources = make_sources(files, Path(work))
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
        written = set()
        for _ in range(options.rounds):
            for name, source in sources.items():
                cpu, wall, content = prepare(source, Path(work) / "out.beton", options.workers)
                seconds[name].append((cpu, wall))
                written.add(content)
                print(f"{name}: {cpu:.1f} s of CPU time, {wall:.1f} s", flush=True)
    assert len(written) == 1, "the files differ"
    found["seconds_of_cpu_and_wall"] = seconds
    lines = [
        f"`prepare` of {len(files):,} photographs with {options.workers} processes, {found['device']}, commit "
        f"{found['commit']}, medians of {options.rounds} rounds in turn; the files are the same to the byte.",
        "",
        "| source | images / CPU second | images / second | of the folder's CPU time |",
        "|---|---:|---:|---:|",
    ]
    cpu_of_folder = statistics.median(cpu for cpu, _ in seconds["folder"])
    for name, times in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
        lines.append(f"| {name} | {len(files) / cpu:.0f} | {len(files) / wall:.0f} | {cpu / cpu_of_folder:.2f} |")
    print("\n".join(lines))
    write("prepare_sources", options.out, found, lines)


def photographs(tar: Path, copies: int) -> list[tuple[str, str, bytes]]:
    """(class, name, content), in the order of a folder."""
    with tarfile.open(tar) as archive:
        found = [(Path(member.name), archive.extractfile(member)) for member in archive if member.isreg()]
        contents = [(path, file.read()) for path, file in found if file is not None]
    return sorted(
        (path.parent.name, f"{path.stem}_{copy}{path.suffix}", content)
        for path, content in contents
        if path.suffix.lower() in (".jpg", ".jpeg")
        for copy in range(copies)
    )


def make_sources(files: list[tuple[str, str, bytes]], work: Path) -> dict[str, Path]:
    names = [f"{label}/{name}" for label, name, _ in files]
    for label, name, content in files:
        (work / "folder" / label).mkdir(parents=True, exist_ok=True)
        (work / "folder" / label / name).write_bytes(content)
    methods = {"zip, stored": zipfile.ZIP_STORED, "zip, deflated": zipfile.ZIP_DEFLATED}
    sources = {"folder": work / "folder"}
    for kind, method in methods.items():
        sources[kind] = work / f"{method}.zip"
        with zipfile.ZipFile(sources[kind], "w", method) as archive:
            for name, (*_, content) in zip(names, files, strict=True):
                archive.writestr(name, content)
    table = pa.table({"image": [{"bytes": c, "path": n} for _, n, c in files], "label": [label for label, *_ in files]})
    for rows in (100, len(files)):
        sources[f"parquet, {rows:,} rows a group"] = work / f"{rows}.parquet"
        pq.write_table(table, work / f"{rows}.parquet", row_group_size=rows)
    sources["WebDataset"] = work / "webdataset.tar"
    with tarfile.open(sources["WebDataset"], "w") as archive:
        for i, (label, _, content) in enumerate(files):
            for key, part in (("jpg", content), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{key}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return sources


def prepare(source: Path, out: Path, workers: int) -> tuple[float, float, bytes]:
    """(seconds of CPU time, seconds, what was written)."""
    command = [sys.executable, "-m", "simclr_dist.cli", "prepare", str(source), str(out), "--overwrite"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, out.read_bytes()


if __name__ == "__main__":
    main()
