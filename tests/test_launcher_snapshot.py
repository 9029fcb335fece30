"""The code that is kept for a job: what belongs to it, that it appears whole, and who may have written it.

Run: pytest tests/test_launcher_snapshot.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import outcome, slurm, snapshot
from launcher.arguments import parse
from launcher.errors import LaunchError
from simclr_dist.config import load_config
from simclr_dist.run.layout import RunDir
from tests.conftest import REPOSITORY
from tests.launcher_checkout import Checkout, make_checkout

SHOW = ("show", "slurm", "fake.yaml", "--json")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


def take(checkout: Checkout, **named: Path) -> snapshot.Snapshot:
    """Of the checkout, as a launcher in it would."""
    code = (
        "import sys, pathlib; from launcher import snapshot; from simclr_dist.run.layout import RunDir; "
        "named = dict(word.split('=') for word in sys.argv[1:]); here = pathlib.Path.cwd(); "
        "kept = snapshot.take(RunDir(here / 'run'), here, {key: (pathlib.Path(path), None) for key, path in "
        "named.items()}); kept.write(); print(kept.path)"
    )
    words = [sys.executable, "-c", code, *(f"{key}={path}" for key, path in named.items())]
    done = subprocess.run(words, cwd=checkout.root, env=checkout.env, text=True, capture_output=True, timeout=60)
    if done.returncode:
        raise LaunchError(done.stderr.strip().splitlines()[-1])
    return snapshot.Snapshot(Path(done.stdout.strip()), {})


def names(kept: snapshot.Snapshot) -> set[str]:
    return {str(path.relative_to(kept.path)) for path in kept.path.rglob("*") if path.is_file()}


def test_the_program_is_kept_with_what_it_imports_and_without_what_it_does_not_need(
    checkout: Checkout, tmp_path: Path
) -> None:
    root, package = checkout.root, checkout.root / "simclr_dist"
    (package / "mine.py").write_text("import json, mine_too\nfrom lib.part import x  # of ours\nimport yaml as y\n")
    (root / "mine_too.py").write_text('"""\nfrom examples in the folder\nimport nothing\n"""\n    from deep import z\n')
    for folder in ("lib", "deep", "examples"):
        (root / folder).mkdir()
        (root / folder / "__init__.py").touch()
    (root / "lib" / "data.txt").write_text("x")
    # Files elsewhere, folders elsewhere, a way round in circles, nothing, and something that is no file.
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "v.py").write_text("V = 1")
    (package / "linked.py").symlink_to(tmp_path / "views" / "v.py")
    (package / "views").symlink_to(tmp_path / "views")
    (package / "circle").symlink_to(package)
    (package / "dangling.py").symlink_to("nowhere")
    os.mkfifo(package / "fifo")
    (package / "compiled.so").write_bytes(b"\x7fELF")
    (package / "tool.sh").write_text("#!/bin/sh\n")
    (package / "tool.sh").chmod(0o4775)
    (package / "__pycache__").mkdir()
    for unwanted in (".hidden.py", "old.pyc", "__pycache__/mine.cpython-311.pyc"):
        (package / unwanted).touch()
    (package / "__pycache__" / "mine.f-1.py311.nbi").write_bytes(b"machine code")
    kept = take(checkout, config=root / "fake.yaml", slurm=root / "slurm" / "train.sh")
    found = names(kept)
    wanted = {"mine.py", "linked.py", "views/v.py", "compiled.so", "tool.sh", "train.py", "run/layout.py"}
    assert {f"simclr_dist/{name}" for name in wanted} <= found
    assert {"launcher/node.py", "launcher/accelerate.yaml", "config/fake.yaml", "slurm/train.sh"} <= found
    assert {"mine_too.py", "lib/__init__.py", "lib/data.txt", "deep/__init__.py", "snapshot.json"} <= found
    left_out = ("examples", "circle", "dangling", ".pyc", "hidden", "fifo", "starter", "yaml/")
    assert not [name for name in found if any(word in name for word in left_out)]
    assert not any(path.is_symlink() for path in kept.path.rglob("*"))
    inside = kept.path / "simclr_dist"
    assert kept.path.stat().st_mode & 0o777 == kept.path.parent.stat().st_mode & 0o777 == 0o700
    assert inside.joinpath("tool.sh").stat().st_mode & 0o7777 == 0o755
    assert inside.joinpath("mine.py").stat().st_mode & 0o7777 == 0o644
    # numba's machine code is that of a file with this time.
    assert inside.joinpath("__pycache__", "mine.f-1.py311.nbi").read_bytes() == b"machine code"
    assert inside.joinpath("mine.py").stat().st_mtime_ns == package.joinpath("mine.py").stat().st_mtime_ns


def test_the_same_content_is_kept_once_and_any_other_apart(checkout: Checkout) -> None:
    first = take(checkout, config=checkout.root / "fake.yaml").path
    before = {path: path.stat().st_ino for path in first.rglob("*")}
    os.utime(checkout.root / "simclr_dist" / "train.py")
    assert take(checkout, config=checkout.root / "fake.yaml").path == first
    assert {path: path.stat().st_ino for path in first.rglob("*")} == before
    (checkout.root / "simclr_dist" / "train.py").chmod(0o755)
    second = take(checkout, config=checkout.root / "fake.yaml").path
    (checkout.root / "fake.yaml").write_text("name: other")
    third = take(checkout, config=checkout.root / "fake.yaml").path
    assert len({first, second, third}) == 3
    assert sorted(first.parent.iterdir()) == sorted((first, second, third))  # nothing half-written
    snapshot.remove_unused(RunDir(checkout.root / "run"), {str(second)})
    assert list(first.parent.iterdir()) == [second]


def test_what_an_attempt_or_a_task_of_an_array_may_run_with_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number, points in enumerate((None, 3, None, None)):
        outcome.record(tmp_path, "submit", f"{number}.0-000000", job=str(number), code=f"/old/{number}", points=points)
    outcome.record(tmp_path, "start", "2.0-abcdef", code="/old/2")
    assert slurm.used_code(run) == {"/old/1", "/old/2", "/old/3"}  # 0 never started, 3 is the newest
    for number in range(4):
        (run.code / f"{number}").mkdir(parents=True)
    snapshot.remove_unused(run, slurm.used_code(run))
    assert sorted(path.name for path in run.code.iterdir()) == ["1", "2", "3"]


def test_kept_code_that_was_changed_or_is_not_ours_is_refused(checkout: Checkout) -> None:
    kept = take(checkout).path
    (kept / "launcher" / "node.py").write_text("print('changed')")
    with pytest.raises(LaunchError, match="has been changed since it was kept"):
        take(checkout)
    kept.chmod(0o770)
    with pytest.raises(LaunchError, match="others may have written"):
        snapshot.enter(str(kept), ["status"])
    with pytest.raises(LaunchError, match=r"is gone; .*--new-code"):
        snapshot.enter(str(kept) + "0", ["status"])


def test_data_in_the_package_is_no_program(checkout: Checkout) -> None:
    with (checkout.root / "simclr_dist" / "images.bin").open("wb") as file:
        file.truncate(snapshot.MAX_BYTES + 1)
    with pytest.raises(LaunchError, match=r"simclr_dist/images.bin: the largest .* --no-snapshot"):
        take(checkout)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import a", {"a"}),
        ("  from a.b import c", {"a"}),
        ("import a.b as d, e, os", {"a", "e"}),
        ("import a  # why\r\nfrom .b import c", {"a"}),
        ("from the folder import it", set()),
        ("x = 'import a'", set()),
        ("import", set()),
    ],
)
def test_imports_are_read_without_running_anything(line: str, found: set[str]) -> None:
    assert snapshot.imported_names("x.py", line.encode()) == found
    assert snapshot.imported_names("x.txt", line.encode()) == set()


def test_provenance_names_the_commit_of_kept_code_and_not_of_the_folder_around_it(checkout: Checkout) -> None:
    for words in (["init", "-q"], ["add", "simclr_dist"], ["commit", "-qm", "x"]):
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words]
        subprocess.run(git, cwd=checkout.root, check=True, env=checkout.env)
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, cwd=checkout.root, check=True, text=True, capture_output=True).stdout.strip()
    (checkout.root / "simclr_dist" / "train.py").write_text("# edited")
    kept = take(checkout).path
    subprocess.run(["git", "checkout", "-q", "."], cwd=checkout.root, check=True)
    code = "from simclr_dist.run import provenance as p; print(p.__file__, p.git_id())"
    env = snapshot.importing(str(kept), checkout.env)
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout.root, env=env, text=True, capture_output=True)
    assert done.stdout.split() == [str(kept / "simclr_dist" / "run" / "provenance.py"), f"{commit}-dirty"]
    assert f"(commit {commit}-dirty, kept 20" in snapshot.describe(str(kept))


def test_show_names_the_code_and_without_snapshot_there_is_none(checkout: Checkout) -> None:
    shown = json.loads(checkout.launch(*SHOW).stdout)
    code = shown["plan"]["code"]
    assert Path(code).parent == checkout.run_dir / "code"
    assert shown["start"][0][-2:] == [f"--code={code}", f"{code}/config/fake.yaml"]
    assert not checkout.run_dir.exists()
    shown = json.loads(checkout.launch(*SHOW, "--no-snapshot").stdout)
    assert shown["plan"]["code"] == ""
    assert shown["start"][0][-1] == str(checkout.root / "fake.yaml")
    assert str(checkout.root / "slurm" / "train.sh") in shown["start"][0]
    odd = checkout.launch(*SHOW, "runs_dir='a:b'")
    assert (odd.returncode, "separates folders of code at colons" in odd.stderr) == (2, True)


def test_a_configuration_is_kept_with_what_it_begins_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared.yaml").write_text((REPOSITORY / "configs" / "smoke.yaml").read_text())
    Path("mine.yaml").write_text("_base_: shared.yaml\nname: mine\ntrain: {epochs: 3}\n")
    submission = slurm.prepare(parse(["slurm", "mine.yaml", "--nodes=1", "--device=cpu"]))
    assert submission.kept is not None
    copy = tmp_path / "elsewhere" / "mine.yaml"
    copy.parent.mkdir()
    copy.write_bytes(submission.kept.files["config/mine.yaml"].content)
    before = load_config("mine.yaml")
    (tmp_path / "shared.yaml").unlink()  # edited or gone until the job starts again
    assert load_config(copy) == before
