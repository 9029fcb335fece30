"""The code as it was when a job was submitted: RUN/code/DIGEST. A job that waits, or is requeued, goes on with it.

    simclr_dist/ launcher/   and the modules of the working directory that they import
    config/ sweep/ slurm/    the files that the command line named
    snapshot.json            the commit, when it was kept, and where the configuration was

DIGEST is that of names, contents and execute permissions. The interpreter and its packages are not copied.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from launcher.errors import LaunchError
from simclr_dist.run.layout import RunDir, read_record, write_record
from simclr_dist.run.provenance import git_id
from simclr_dist.safe_text import printable

MAX_BYTES = 64 * 2**20
LEFT_OUT = "launcher/starter"  # of `launcher init`
OURS = ("simclr_dist", "launcher")
_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(\w+)[\w.]*[ \t]+import\b|import[ \t]+([\w., \t]+?)[ \t\r]*(?:#.*)?$)", re.M
)


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int
    mtime_ns: int
    source: Path


@dataclass(frozen=True)
class Snapshot:
    """What would be kept, read into memory: what is hashed is what is written."""

    path: Path
    files: Mapping[str, File]
    """By name inside `path`."""

    def write(self, **facts: Any) -> None:
        """Appears as a whole, for its owner only; nothing is written where the same is kept already."""
        if self.path.exists():
            refuse_foreign(self.path)
            if self.path.name != _digest({name: _read(self.path / name) for name in self.files}):
                raise LaunchError(f"{self.path}: has been changed since it was kept for a job; move it away")
            return
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.mkdir(mode=0o700)
        try:
            for name, file in self.files.items():
                _write(temporary / name, file)
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_record(RunDir.record_of_code(temporary), {"git": git_id(), "time": now, **facts})
            os.rename(temporary, self.path)
        except OSError as error:
            if not self.path.exists():  # another submission may have been faster
                raise LaunchError(f"{self.path}: the code cannot be kept: {error.strerror}; or --no-snapshot") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def take(run: RunDir, workdir: Path, named: Mapping[str, tuple[Path, bytes | None]], program: bool = True) -> Snapshot:
    """Reads what would be kept; writes nothing.

    named: by folder, the files of the command line, with other contents if they are given. program: also its code.
    """
    files: dict[str, File] = {}
    if program and os.pathsep in str(run.path):
        raise LaunchError(f"{run.path}: Python separates folders of code at colons; choose another, or --no-snapshot")
    if program:
        for package in OURS:
            files |= _package(Path(sys.modules[package].__file__ or "").parent, package)
        _add_own_modules(files, workdir)
    for folder, (path, content) in named.items():
        kept = _read(path)
        files[f"{folder}/{path.name}"] = kept if content is None else replace(kept, content=content)
    if sum(len(file.content) for file in files.values()) > MAX_BYTES:
        _refuse_size(max(files.values(), key=lambda file: len(file.content)).source)
    return Snapshot(run.code / _digest(files), files)


def _package(folder: Path, name: str, around: tuple[str, ...] = ()) -> dict[str, File]:
    """Plain files, through links, without caches and hidden files. A link to a folder around it ends the way."""
    real, files = os.path.realpath(folder), dict[str, File]()
    for path in sorted(folder.iterdir()) if real not in around else ():
        inside = f"{name}/{path.name}"
        if path.name.startswith(".") or path.name == "__pycache__" or path.suffix == ".pyc" or inside == LEFT_OUT:
            continue
        if path.is_dir():
            files |= _package(path, inside, (*around, real))
        elif path.is_file():
            files[inside] = _read(path)
    return files


def _read(path: Path) -> File:
    try:
        status = path.stat()
        if status.st_size > MAX_BYTES:
            _refuse_size(path)
        return File(path.read_bytes(), 0o755 if status.st_mode & 0o100 else 0o644, status.st_mtime_ns, path)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read, so it cannot be kept for the job: {error.strerror}") from None


def _refuse_size(largest: Path) -> NoReturn:
    raise LaunchError(
        f"{largest}: the largest of more than {MAX_BYTES >> 20} MiB that would be kept for the job, which are not only "
        "a program; move data elsewhere, or submit with --no-snapshot"
    )


def _add_own_modules(files: dict[str, File], workdir: Path) -> None:
    """Modules in the working directory that the program imports: `python -m` looks for them there first."""
    looked_at: set[str] = set()
    while left := files.keys() - looked_at:
        looked_at |= left
        imported = {module for name in left for module in imported_names(name, files[name].content)}
        for module in sorted(imported - set(OURS)):
            if (workdir / module / "__init__.py").is_file():
                files |= _package(workdir / module, module)
            elif (workdir / f"{module}.py").is_file():
                files[f"{module}.py"] = _read(workdir / f"{module}.py")


def imported_names(name: str, content: bytes) -> set[str]:
    """The top-level names that a Python file imports, without those of the standard library."""
    if not name.endswith(".py"):
        return set()
    found = set()
    for one, several in _IMPORT.findall(content):
        for part in (one or several).decode().split(","):
            found.add(part.split(".")[0].split(" as ")[0].strip())
    return {name for name in found if name.isidentifier()} - sys.stdlib_module_names


def _digest(files: Mapping[str, File]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        file = files[name]
        digest.update(f"{name}\0{file.mode:o}\0{len(file.content)}\0".encode(errors="surrogateescape"))
        digest.update(file.content)
    return digest.hexdigest()[:16]


def _write(path: Path, file: File) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.content)
    path.chmod(file.mode)
    os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    # numba's machine code belongs to a module with this time and size; without it every process compiles for seconds.
    for compiled in file.source.parent.glob(f"__pycache__/{file.source.stem}.*.nb[ic]"):
        (path.parent / "__pycache__").mkdir(exist_ok=True)
        with suppress(OSError):  # another process may be writing it
            shutil.copyfile(compiled, path.parent / "__pycache__" / compiled.name)


# ---------------------------------------------------------------------------------------------------------------------
# Using one


def use(args: argparse.Namespace, code: Path) -> argparse.Namespace:
    """The command line with the files that are kept in `code` instead of those it names."""
    changes: dict[str, Any] = {"code": str(code), "config": str(code / "config" / Path(args.config).name)}
    if args.sweep:
        changes["sweep"] = str(code / "sweep" / Path(args.sweep).name)
    return argparse.Namespace(**{**vars(args), **changes})


def without(code: str, words: Sequence[str]) -> list[str]:
    """A command line that `use` made, with the files that it named at first: for code and files of now."""
    kept = read_record(RunDir.record_of_code(Path(code))) or {}
    first = {
        f"{option}{code}/{folder}/{Path(path).name}": f"{option}{path}"
        for option, folder in (("", "config"), ("--sweep=", "sweep"))
        if (path := kept.get(folder))
    }
    left = [first.get(word, word) for word in words if word != f"--code={code}"]
    if any(code in word for word in left):
        raise LaunchError(
            f"{code}: does not say where its files were; start again with `python -m launcher slurm CONFIG`"
        )
    return left


def importing(code: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python imports `code`, and nothing from the working directory."""
    others = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != code]
    return {**environ, "PYTHONPATH": os.pathsep.join([code, *others]), "PYTHONSAFEPATH": "1"}


def enter(code: str, argv: Collection[str]) -> None:
    """Starts the launcher of `code` in place of this one, unless it is this one already."""
    here = Path(__file__).resolve().parents[1]
    if not code or here == Path(code).resolve():
        return
    refuse_foreign(Path(code))
    if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] == code:
        raise LaunchError(f"{sys.executable} imports the launcher from {here}, although PYTHONPATH begins with {code}")
    _become([sys.executable, "-m", "launcher", *argv], importing(code, os.environ))


def refuse_foreign(code: Path) -> None:
    """LaunchError unless `code` is a folder that this user alone can have filled."""
    try:
        status = code.lstat()
    except OSError:
        raise LaunchError(f"{code}: the code that was kept for this run is gone; {TAKE_NEW}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LaunchError(f"{code}: others may have written the code that was kept for this run; {TAKE_NEW}")


TAKE_NEW = "`python -m launcher resume --new-code RUN` goes on with the checkout as it is now"


def _become(argv: list[str], env: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, env)


def describe(code: str) -> str:
    """For people: where it is, its commit, and since when."""
    kept = read_record(RunDir.record_of_code(Path(code)))
    if kept is None:
        return f"{code} (gone)"
    return printable(f"{code} (commit {kept.get('git') or 'unknown'}, kept {kept.get('time')})")


def remove_unused(run: RunDir, used: Collection[str]) -> None:
    """Removes what was kept for jobs that never started. used: paths; a run may have been moved since."""
    names = {Path(code).name for code in used}
    for path in run.code.glob("[0-9a-f]*"):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
