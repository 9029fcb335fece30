"""Breaks one promise of the code at a time, in a copy, and shows which of them no test notices.

    python tools/mutate.py [--only WORDS] [--jobs 2]

tools/mutations.toml lists the promises: a place in the code that keeps one, the text that breaks it, and the tests that
must fail then. Exit code 0: every broken promise was noticed. 1: some survived; they are named. 2: the table does not
fit the code, or its tests do not pass on the unchanged copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from queue import SimpleQueue

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutations.toml")
TIMEOUT_S = 900
PASSED, FAILED = 0, 1  # pytest's exit codes


class TableError(Exception):
    """A row does not fit the code."""


@dataclass(frozen=True)
class Mutation:
    promise: str
    file: str
    old: str
    """Occurs exactly once in `file`."""
    new: str
    tests: list[str]
    """pytest node ids."""

    def texts(self, root: Path) -> tuple[str, str]:
        """The content of `file`, as it is and broken. Raises TableError."""
        path = root / self.file
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (found := content.count(self.old)) != 1:
            raise TableError(f"{self.promise}: found {found} times in {self.file}, not once: {self.old!r}")
        return content, content.replace(self.old, self.new)


def read_table(path: Path = TABLE) -> list[Mutation]:
    return [Mutation(**row) for row in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]]


@contextmanager
def copy_of_repository() -> Iterator[Path]:
    """What git knows or would add, in a temporary folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="simclr-mutate-") as folder:
        for name in filter(None, names.split("\0")):
            source, target = REPOSITORY / name, Path(folder, name)
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        yield Path(folder)


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code, FAILED if it takes too long, and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"not done after {TIMEOUT_S} s"
    return done.returncode, done.stdout + done.stderr


def is_noticed(mutation: Mutation, copies: SimpleQueue[Path]) -> bool:
    """In one of `copies`, which has it back as it was. Raises TableError if the tests cannot run."""
    root = copies.get()
    sound, broken = mutation.texts(root)
    try:
        (root / mutation.file).write_text(broken, encoding="utf-8")
        code, output = run_tests(root, mutation.tests)
    finally:
        (root / mutation.file).write_text(sound, encoding="utf-8")
        copies.put(root)
    if code not in (PASSED, FAILED):
        raise TableError(f"{mutation.promise}: its tests cannot run (pytest: exit code {code})\n{output}")
    return code == FAILED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", default="", help="promises that contain these words")
    parser.add_argument("--list", action="store_true", help="print the promises and end")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (default: 1)")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table")
    args = parser.parse_args(argv)
    chosen = [mutation for mutation in read_table(args.table) if args.only in mutation.promise]
    if args.list:
        print(*(mutation.promise for mutation in chosen), sep="\n")
        return 0
    if not chosen:
        parser.error(f"no promise contains {args.only!r}; see --list")
    survivors, copies = 0, SimpleQueue[Path]()
    try:
        for mutation in chosen:
            mutation.texts(REPOSITORY)
        with ExitStack() as stack:
            for _ in range(args.jobs):
                copies.put(stack.enter_context(copy_of_repository()))
            root = copies.get()
            code, output = run_tests(root, sorted({test for mutation in chosen for test in mutation.tests}))
            if code != PASSED:
                raise TableError(f"the tests do not pass on the unchanged copy (pytest: exit code {code})\n{output}")
            copies.put(root)
            pool = stack.enter_context(ThreadPoolExecutor(args.jobs))
            for mutation, noticed in zip(chosen, pool.map(is_noticed, chosen, repeat(copies)), strict=True):
                survivors += not noticed
                print(f"{'noticed ' if noticed else 'SURVIVED'}  {mutation.promise}", flush=True)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(chosen) - survivors} of {len(chosen)} broken promises were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
