"""Looks for inputs that end a reader with anything but success or a message, or that take much time or memory.

    python tools/fuzz.py                                 all targets, 60 s together
    python tools/fuzz.py tar yaml --seconds 600 --seed 7
    python tools/fuzz.py tar --seed 7 --input 4711       that one input again, with its traceback

An input is a function of (target, seed, number). Each target works in a process of its own, so that a crash is a
finding too. Exit code 0: no findings. 1: some; for each the command that repeats it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST_CPU_S = 20.0
MOST_BYTES = 1 << 30
MOST_PIXELS = 1 << 22  # for the readers, so that what is within their limit is little here
MOST_FINDINGS = 5  # of one target

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """seeds: inputs that are read with success. read(input, folder): the readers; raises UserError where it may.

    words: what is inserted beside random bytes. in_place: what lies behind a change should mostly stay where it is.
    mend: makes checksums right again, so that more than they is tried.
    """

    seeds: Callable[[], list[bytes]]
    read: Read
    words: tuple[bytes, ...] = ()
    in_place: bool = False
    mend: Callable[[bytearray], None] = lambda _: None


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def make_input(name: str, seed: int, number: int) -> bytes:
    """A function of its arguments. The first ones are the target's seeds themselves."""
    target = TARGETS[name]
    seeds = _seeds(name)
    if number < len(seeds):
        return seeds[number]
    rng = random.Random(f"{name} {seed} {number}")
    content = bytearray(rng.choice(seeds))
    changes = _IN_PLACE if target.in_place and rng.random() < 0.8 else _CHANGES
    for _ in range(1 + int(rng.expovariate(0.5))):
        rng.choice(changes)(content, rng, target, seeds)
    if rng.random() < 0.9:
        target.mend(content)
    return bytes(content[: 1 << 20])


@cache
def _seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


def _flip(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    if content:
        content[min(_place(content, rng), len(content) - 1)] ^= 1 << rng.randrange(8)


def _number(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    """Overwrites an integer of any width by one at a border."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(
        (0, 1, -1, 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1, rng.getrandbits(8 * size), len(content))
    )
    packed = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    at = _place(content, rng)
    content[at : at + size] = packed


def _cut(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    at = _place(content, rng)
    del content[at : at + int(rng.expovariate(0.02)) + 1 if rng.random() < 0.8 else None]


def _repeat(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    at = _place(content, rng)
    part = content[at : at + 1 + int(rng.expovariate(0.02))]
    content[at:at] = part * rng.choice((1, 2, 30, 1000))


def _splice(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    content[_place(content, rng) :] = other[rng.randrange(len(other) + 1) :]


def _insert(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    word = rng.choice(target.words) if target.words and rng.random() < 0.9 else rng.randbytes(rng.randrange(1, 9))
    at = _place(content, rng)
    content[at : at + rng.choice((0, 0, len(word), 1))] = word * rng.choice((1, 1, 1, 2, 70, 5000))


def _overwrite(content: bytearray, rng: random.Random, target: Target, seeds: Sequence[bytes]) -> None:
    word = rng.choice((*target.words, rng.randbytes(4)))
    at = _place(content, rng)
    content[at : at + len(word)] = word[: len(content) - at]


_IN_PLACE = (_flip, _number, _number, _overwrite)
_CHANGES = (_flip, _number, _number, _cut, _repeat, _splice, _insert, _insert)


def _place(content: bytearray, rng: random.Random) -> int:
    """Anywhere, but headers more often."""
    return min(rng.randrange(len(content) + 1), rng.randrange(len(content) + 1) if rng.random() < 0.5 else len(content))


# ---------------------------------------------------------------------------------------------------------------------
# Targets. What they read is imported when they are used.


def _small_image(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    from PIL import Image

    gradient = Image.frombytes("RGB", (14, 12), bytes(i * 7 % 256 for i in range(14 * 12 * 3)))
    file = io.BytesIO()
    gradient.convert(mode).save(file, kind, **options)
    return file.getvalue()


def _picture_seeds() -> list[bytes]:
    kinds = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TGA", {}),
    ]
    kinds += [
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("JPEG2000", {}),
        ("ICO", {}),
        ("PCX", {}),
    ]
    grey = [_small_image("TIFF", "L"), _small_image("PNG", "RGBA"), _small_image("PNG", "P")]
    return [_small_image(kind, **options) for kind, options in kinds] + grey + [_two_pages()]


def _two_pages() -> bytes:
    """A TIFF of 16-bit pages, which our own reader of tags takes."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    pages = [Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000) for _ in range(2)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def _read_picture(content: bytes, folder: Path) -> None:
    from simclr_dist.data.sources.decoding import decode
    from simclr_dist.data.sources.sample_values import Decoding
    from simclr_dist.errors import DataError

    for decoding in (Decoding(), Decoding(value_range=(0, 1000)), Decoding(bands=(1, 2, 1))):
        with suppress(DataError):
            decode(io.BytesIO(content), decoding)


def _beton_seeds() -> list[bytes]:
    from simclr_dist.data.beton.prepare import prepare

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, kind in enumerate(("PNG", "JPEG", "PNG", "JPEG")):
            (folder / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            (folder / "in" / "ab"[i % 2] / f"{i}.{kind.lower()}").write_bytes(_small_image(kind))
        for mode in ("raw", "jpg"):
            prepare(folder / "in", folder / f"{mode}.beton", mode=mode, num_workers=1)  # type: ignore[arg-type]
            found.append((folder / f"{mode}.beton").read_bytes())
    return found


def _read_beton(content: bytes, folder: Path) -> None:
    import numpy as np

    from simclr_dist.data.beton.reader import open_beton
    from simclr_dist.data.decode.ffcv_import import unavailable
    from simclr_dist.data.loading.pillow_images import BetonSource
    from simclr_dist.errors import DataError

    path = folder / "in.beton"
    path.write_bytes(content)
    with open_beton(path) as beton:
        num_samples = min(beton.num_samples, 4)
        source = BetonSource(path)
        for i in range(num_samples):
            with suppress(DataError):
                source.read(i)
        os.close(source._beton.fd)
        assert len(beton.content_fingerprint) == 32
    if unavailable() is None:
        from simclr_dist.data.loading.ffcv_images import BetonImages

        images = BetonImages(path)
        images.damaged(np.arange(num_samples))
        images.close()


def _tar_seeds() -> list[bytes]:
    found = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:

            def add(name: str, content: bytes = b"", **values: Any) -> None:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for key, value in values.items():
                    setattr(member, key, value)
                archive.addfile(member, io.BytesIO(content))

            add("a/0.png", _small_image("PNG"))
            add("b/" + "long" * 40 + "é.png", _small_image("PNG"))
            add("b/hard.png", type=tarfile.LNKTYPE, linkname="a/0.png")
            add("c", type=tarfile.SYMTYPE, linkname="a")
            if found:
                add("in.tar", found[0])
        found.append(file.getvalue())
    return found


def _right_checksums(content: bytearray) -> None:
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])


def _read_source(name: str) -> Read:
    """As a source of images that is called so."""

    def read(content: bytes, folder: Path) -> None:
        from simclr_dist.data.sources.open import open_source

        path = folder / name
        path.write_bytes(content)
        source = open_source(path)
        for line in source.account.lines():
            line.encode()
        source.read(0)

    return read


def _webdataset_seeds() -> list[bytes]:
    found = []
    for entries in (("cls", b"3"), ("json", b'{"label": "a"}')), (("cls", b"cat"), ("seg.png", _small_image("PNG"))):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for i in range(2):
                for key, content in (("jpg", _small_image("JPEG")), *entries):
                    member = tarfile.TarInfo(f"{i:03d}.{key}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        found.append(file.getvalue())
    return found


def _zip_seeds() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("a/0.png", _small_image("PNG"))
            archive.writestr("b/é.jpg", _small_image("JPEG"))
            link = zipfile.ZipInfo("c")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "a")
        found.append(file.getvalue())
    return found


def _zstd_seeds() -> list[bytes]:
    from backports import zstd

    return [zstd.compress(content) for content in _tar_seeds()]


def _parquet_seeds() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    image = {"bytes": _small_image("PNG"), "path": "0.png"}
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    found = []
    for columns, written in (
        ({"image": [image, None, image], "label": [0, 1, -1]}, metadata),
        ({"image": [_small_image("JPEG")] * 3, "label": ["a", "b", None]}, None),
    ):
        file = io.BytesIO()
        table = pyarrow.table(columns).replace_schema_metadata(written)
        parquet.write_table(table, file, row_group_size=2, compression="none" if written is None else "snappy")
        found.append(file.getvalue())
    return found


def _table_seeds() -> list[bytes]:
    return [
        b"path,label\nx.png,1\n",
        b"label\tfile\tsplit\n1\t./x.png\ttrain\n",
        b'file;class\r\n"x.png";"a ""b"""\r\n',
    ]


def _read_table(content: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(_small_image("PNG"))
    _read_source("in.csv")(content, folder)


_JSON_WORDS = (
    b"[",
    b"{",
    b'{"a":',
    b'"',
    b"]",
    b"}",
    b",",
    b"null",
    b"1e999",
    b"-",
    b"NaN",
    b"\\",
    b"\\ud800",
    b"\xff",
)


def _json_seeds() -> list[bytes]:
    sidecar = {"num_samples": 4, "class_names": ["a", "b"], "account": {"source": "a", "layout": "b", "taken": 4}}
    sidecar["account"] |= {"left_out": [{"reason": "x", "count": 1, "names": ["a"]}], "notes": []}  # type: ignore[operator]
    status = {"state": "running", "reason": None, "step": 3, "attempt": "a", "time": "t", "message": "m"}
    subset = {"ids": [0, 1], "fingerprint": "f", "share": 0.5, "seed": 0}
    manifest = {"format": 1, "step": 1, "files": {"state.json": {"size": 1, "sha256": "a"}}}
    return [json.dumps(value).encode() for value in (sidecar, status, subset, manifest, [[1, 2.5, None], "text"])]


def _read_json(content: bytes, folder: Path) -> None:
    from simclr_dist.bounded_json import parse_json
    from simclr_dist.checkpoint.files import read_checkpoint, read_facts
    from simclr_dist.data.loading.open_images import describe
    from simclr_dist.errors import UserError
    from simclr_dist.few_labels.subsets import load_subset
    from simclr_dist.run.layout import read_record, read_records
    from simclr_dist.run.owner import _parse
    from simclr_dist.run.status import read_status

    with suppress(ValueError):
        parse_json(content)
    beton = folder / "sidecar.beton"
    if not beton.exists():
        beton.write_bytes(_seeds("beton")[0])
    for name in ("sidecar.beton.json", "status.json", "MANIFEST.json", "state.json"):
        (folder / name).write_bytes(content)
    info = None
    readers: list[Callable[[], Any]] = [lambda: describe(str(beton)), lambda: read_checkpoint(folder)]
    for read in (*readers, lambda: read_facts(folder)):
        with suppress(UserError):
            info = read()
    (folder / "sidecar.beton.json").unlink()
    info = describe(str(beton))
    with suppress(UserError):
        load_subset(folder / "status.json", info)
    read_record(folder / "status.json")
    read_records(folder / "status.json")
    read_status(folder)
    _parse(content.decode("utf-8", "replace"))


_YAML_WORDS = (
    *(b"&a ", b"*a", b"<<: ", b"- ", b"[", b"{", b"? ", b": ", b"|\n ", b"---\n", b"'", b'"', b"#", b"\t", b"\0"),
    *(
        b"!!int ",
        b"!!python/name:os ",
        b"%TAG ! x\n",
        b"1:1",
        b"2020-99-99",
        b".inf",
        b"1e5",
        b"\xc2\x85",
        b"{a: &a [*a]}",
    ),
)


def _yaml_seeds() -> list[bytes]:
    configs = Path(__file__).parent.parent / "configs"
    files = [configs / "smoke.yaml", *sorted((configs / "recipes").glob("*.yaml"))[:1]]
    grid = b"grid:\n  optim.base_lr: [0.3, 0.6]\n  seed: [1, 2]\n"
    aliases = b"a: &a [1, 2]\nb: &b {c: *a, <<: {d: *a}}\nlist: [*b, *b]\n"
    return [*(file.read_bytes() for file in files), grid, aliases]


def _read_yaml(content: bytes, folder: Path) -> None:
    from launcher.errors import LaunchError
    from launcher.sweep import read_points
    from simclr_dist.config import load_config, load_section, render_config
    from simclr_dist.errors import UserError
    from simclr_dist.few_labels.recipe import Recipe
    from simclr_dist.report.record import read_run

    path = folder / "config.yaml"
    path.write_bytes(content)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: render_config(load_config(path, check_data=False)),
        lambda: load_section(path, Recipe),
        lambda: read_points(path),
        lambda: read_run(folder),
    )
    for read in readers:
        with suppress(UserError, LaunchError):
            read()


def _safetensors_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(2, dtype=torch.int64)}
    metadata = {"format": "pt", "start": "head", "class_names": '["a", "b"]', "config": "{}"}
    return [save(tensors), save(tensors, metadata), save({})]


def _read_safetensors(content: bytes, folder: Path) -> None:
    """As the weights of a checkpoint whose manifest is right, and as a classifier."""
    from simclr_dist.checkpoint.files import read_checkpoint
    from simclr_dist.errors import UserError
    from simclr_dist.few_labels.classifier import load_classifier

    files = {"model.safetensors": content, "optimizer.safetensors": content, "state.json": _state_of_checkpoint()}
    for name, written in files.items():
        (folder / name).write_bytes(written)
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (folder / "MANIFEST.json").write_text(json.dumps({"format": 1, "files": entries}))
    for read in (lambda: read_checkpoint(folder), lambda: load_classifier(folder / "model.safetensors")):
        with suppress(UserError):
            read()


@cache
def _state_of_checkpoint() -> bytes:
    from simclr_dist.config import load_config

    config = load_config(Path(__file__).parent.parent / "configs" / "smoke.yaml", check_data=False)
    facts = {
        "step": 1,
        "samples_seen": 2,
        "fingerprint": "f",
        "grad_scaler": {},
        "config": config.model_dump(mode="json"),
    }
    return json.dumps(facts).encode()


def _embeddings_seeds() -> list[bytes]:
    import numpy as np

    from simclr_dist.evaluation.embeddings_file import Embeddings, save_embeddings

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.npz"
        h, labels = np.ones((2, 3), np.float32), np.array([0, -1])
        save_embeddings(path, Embeddings(h, labels, ("0.png", "1.png"), ("a",), "c", "d", "s", "f"))
        return [path.read_bytes()]


def _read_embeddings(content: bytes, folder: Path) -> None:
    from simclr_dist.evaluation.embeddings_file import load_embeddings

    (folder / "in.npz").write_bytes(content)
    load_embeddings(folder / "in.npz")


_PICTURE_WORDS = (b"\xff\xd8\xff", b"II*\0", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"IHDR", b"\xff\xc0")
_TAR_WORDS = (b"ustar", b"0" * 12, b"7" * 12, b"\xff" * 12, b"\x80" + b"\0" * 11, b"L", b"x", b"S", b"../", b"a/")
_TENSOR_WORDS = (*_JSON_WORDS, b"F64", b"F8_E4M3", b"BOOL", b"C64", b"\0\0\0\0\0\1\0\0")

TARGETS = {
    "pictures": Target(_picture_seeds, _read_picture, _PICTURE_WORDS),
    "beton": Target(_beton_seeds, _read_beton, in_place=True),
    "tar": Target(_tar_seeds, _read_source("in.tar"), _TAR_WORDS, in_place=True, mend=_right_checksums),
    "webdataset": Target(_webdataset_seeds, _read_source("in.tar"), (*_TAR_WORDS, b".cls"), True, _right_checksums),
    "zip": Target(_zip_seeds, _read_source("in.zip"), (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\xff" * 4), in_place=True),
    "zstd": Target(_zstd_seeds, _read_source("in.tar.zst"), (b"\x28\xb5\x2f\xfd",), in_place=True),
    "parquet": Target(_parquet_seeds, _read_source("in.parquet"), (b"PAR1", b"huggingface"), in_place=True),
    "table": Target(_table_seeds, _read_table, (b",", b";", b"\t", b'"', b"\n", b"label", b"path", b"../", b"\xff")),
    "json": Target(_json_seeds, _read_json, _JSON_WORDS),
    "yaml": Target(_yaml_seeds, _read_yaml, _YAML_WORDS),
    "safetensors": Target(_safetensors_seeds, _read_safetensors, _TENSOR_WORDS),
    "embeddings": Target(_embeddings_seeds, _read_embeddings, (b"PK\3\4", b"{'descr': 'O'}", b"PK\1\2")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Trying


def try_input(name: str, content: bytes, folder: Path) -> None:
    """Raises what is a finding."""
    from simclr_dist.errors import UserError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TARGETS[name].read(content, folder)
        except UserError as error:
            if len(str(error)) > 20_000:
                raise RuntimeError(f"a message of {len(str(error)):,} characters") from None
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MOST_BYTES:
        raise RuntimeError(f"took {grown / 2**20:,.0f} MiB of memory")


def _work(name: str, seed: int, start: int, wire: Connection) -> None:
    """Tries inputs from `start` on, says each number before it, and what is found. The parent or a limit ends it."""
    os.environ["SIMCLR_MAX_PIXELS"] = str(MOST_PIXELS)
    _seeds(name)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's words about each input
    with tempfile.TemporaryDirectory(prefix="simclr-fuzz-") as folder:
        for content in _seeds(name):  # imports what is needed
            TARGETS[name].read(content, Path(folder))
        number = start
        while True:
            content = make_input(name, seed, number)
            signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)  # its signal ends the process, also in C
            wire.send((number, None))
            try:
                try_input(name, content, Path(folder))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                wire.send(
                    (number, f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})")
                )
            number += 1


def search(
    name: str, seed: int, seconds: float, work: Callable[[str, int, int, Connection], None] = _work
) -> tuple[int, list[tuple[int, str]]]:
    """The number of inputs tried, and the findings: (number of the input, what happened)."""
    context = multiprocessing.get_context("spawn")
    findings: list[tuple[int, str]] = []
    number, deadline = -1, None
    while len(findings) < MOST_FINDINGS and (deadline is None or time.monotonic() < deadline):
        wire, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(name, seed, number + 1, theirs))
        worker.start()
        theirs.close()
        begun = False
        try:
            while len(findings) < MOST_FINDINGS and (deadline is None or time.monotonic() < deadline):
                if wire.poll(0.2):
                    number, problem = wire.recv()
                    begun = True
                    deadline = deadline or time.monotonic() + seconds  # not before it has begun
                    if problem is not None:
                        findings.append((number, problem))
        except EOFError:
            worker.join()
            if not begun:
                raise SystemExit(f"{name}: the readers cannot be started; see above") from None
            findings.append((number, _ended_by(worker.exitcode)))
        finally:
            worker.kill()
            worker.join()
            wire.close()
    return number + 1, findings


def _ended_by(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"took more than {MOST_CPU_S:.0f} s of CPU"
    return f"the process ended with signal {-code}" if code and code < 0 else f"the process ended with code {code}"


def repeat(name: str, seed: int, number: int, save: Path | None) -> int:
    """One input, here: a finding is raised. Exit code 0 where it is none any more."""
    os.environ["SIMCLR_MAX_PIXELS"] = str(MOST_PIXELS)
    content = make_input(name, seed, number)
    print(f"{name}, seed {seed}, input {number}: {len(content):,} bytes, beginning with {content[:40]!r}", flush=True)
    if save is not None:
        save.write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, 3 * MOST_CPU_S)
    with tempfile.TemporaryDirectory(prefix="simclr-fuzz-") as folder:
        try_input(name, content, Path(folder))
    print("no finding")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, help="only this input of the one target")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --input: write it to FILE")
    args = parser.parse_args(argv)
    names = args.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]}; there are {', '.join(TARGETS)}")
    if args.input is not None:
        if len(names) != 1:
            parser.error("--input is of one target; name it")
        return repeat(names[0], args.seed, args.input, args.save)
    found = [_report(name, args.seed, args.seconds / len(names)) for name in names]
    return 1 if any(found) else 0


def _report(name: str, seed: int, seconds: float) -> bool:
    count, findings = search(name, seed, seconds)
    print(f"{name:12} {count:8,} inputs, {len(findings)} findings", flush=True)
    for line in _lines(name, seed, findings):
        print(line, flush=True)
    return bool(findings)


def _lines(name: str, seed: int, findings: list[tuple[int, str]]) -> Iterator[str]:
    for number, problem in findings:
        yield f"  {problem}"
        yield f"    python tools/fuzz.py {name} --seed {seed} --input {number}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
