"""Set-up lines, containers and kept code: what is refused, and what a node really runs. No cluster is needed.

Run: pytest tests/test_launcher_node_script.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import node, node_script
from launcher.errors import LaunchError
from launcher.launch_plan import LaunchPlan, read_launch_plan, write_launch_plan
from simclr_dist.config import load_config
from simclr_dist.run.status import read_status

ODD = 'it\'s $HOME `id` "x" %s'


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    """Of a run whose folder has a name that no shell may read; its interpreter prints what it is given."""
    for name in (ODD, "work"):
        (tmp_path / name).mkdir()
    python = tmp_path / "python it's"
    python.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n")
    python.chmod(0o755)
    return LaunchPlan(
        backend="slurm",
        attempt="7.0-abcdef",
        run_dir=str(tmp_path / ODD),
        workdir=str(tmp_path / "work"),
        python=str(python),
        command=("-m", "simclr_dist.train", "c.yaml"),
        resume_argv=("slurm", "c.yaml"),
        device="cuda",
        num_nodes=1,
        procs_per_node=2,
    )


def run(plan: LaunchPlan, **environ: str) -> subprocess.CompletedProcess[str]:
    """What a node does; here under the hardest of shells."""
    words = node_script.step_words(plan)
    assert words[:2] == ["bash", "-c"]
    env = {**os.environ, "SLURMD_NODENAME": "n1", "SHELLOPTS": "errexit:nounset:pipefail", **environ}
    return subprocess.run(words, env=env, text=True, capture_output=True, input="typed", timeout=30)


def started(done: subprocess.CompletedProcess[str]) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the interpreter."""
    assert done.returncode == 0, done.stderr
    argv, environ = json.loads(done.stdout.splitlines()[-1])
    return argv[1:], environ


def test_set_up_lines_change_the_shell_in_which_python_starts(plan: LaunchPlan) -> None:
    hook = node_script.setup_commands(
        'export FOUND="$NO_SUCH_VARIABLE-x"\nfalse || true\nset -eu\nhook() {\n  A=1\n}\n'
    )
    lines = (*hook, "! read -r typed && cd /", f"export ODD={shlex.quote(ODD)}", "trap - USR1", "hook; export A")
    argv, environ = started(run(replace(plan, setup=lines)))
    assert argv == ["-m", "launcher", "node", "--plan", f"{plan.run_dir}/plan.json"]
    assert (environ["FOUND"], environ["A"], environ["ODD"], environ["PWD"]) == ("-x", "1", ODD, plan.workdir)
    assert environ[node_script.RAN] == plan.attempt


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("module load 'no\"such'", 127),
        ("(exit 3)", 3),
        ("false", 1),
        ("exit 5", 5),
        ("set -e; false; true", 1),
        ("if true; then\n  false\nfi", 1),
        ("unset PATH; no-such-program", 127),
    ],
)
def test_a_set_up_line_that_fails_is_named_with_its_exit_code_and_is_permanent(
    plan: LaunchPlan, line: str, code: int
) -> None:
    done = run(replace(plan, setup=("echo first", line, "echo never")))
    assert done.returncode == 2
    assert done.stdout == "first\n"
    shown = line.partition("\n")[0]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"launcher: n1: set-up line ended with exit code {code}: {shown}")
    status = read_status(Path(plan.run_dir))
    assert status is not None
    assert (status.state, status.reason, status.attempt) == ("failed", "config_error", plan.attempt)
    assert last.endswith(status.message)


def test_a_job_that_is_ended_in_a_set_up_line_has_no_line_that_failed(plan: LaunchPlan) -> None:
    done = run(replace(plan, setup=("bash -c 'kill $$; exec sleep 30' & kill $$; wait",)))
    assert (done.returncode, done.stderr) == (143, "")
    assert read_status(Path(plan.run_dir)) is None


def test_a_missing_interpreter_is_named(plan: LaunchPlan) -> None:
    done = run(replace(plan, node_python="no-such-python"))
    assert done.returncode == 2
    assert "n1: no interpreter no-such-python after the set-up lines; name one with --node-python" in done.stderr
    found = (f"cp {shlex.quote(plan.python)} python3", "PATH=$PWD:$PATH")
    assert started(run(replace(plan, node_python="python3", setup=found)))


def test_kept_code_is_imported_unless_others_could_have_written_it(plan: LaunchPlan, tmp_path: Path) -> None:
    code = tmp_path / "co'de"
    done = run(replace(plan, code=str(code)))
    assert (done.returncode, "is gone, or is not yours" in done.stderr) == (2, True)
    code.mkdir(mode=0o700)
    _, environ = started(run(replace(plan, code=str(code)), PYTHONPATH="/mine"))
    assert (environ["PYTHONPATH"], environ["PYTHONSAFEPATH"]) == (f"{code}:/mine", "1")


APPTAINER = """\
#!/bin/sh
printf '%s\\n' "$0" "$PYTHONNOUSERSITE" "$@" >> "$CALLED"
while [ "${1##*.}" != sif ]; do shift; done
shift
exec "$@"
"""


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
@pytest.mark.parametrize("gpu", ["--nv", "--rocm", None])
def test_apptainer_gets_the_gpus_the_folders_and_the_interpreter(
    plan: LaunchPlan, tmp_path: Path, name: str, gpu: str | None
) -> None:
    (tmp_path / "bin").mkdir()
    for program, text in ((name, APPTAINER), ("python3", Path(plan.python).read_text())):
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    image, called = tmp_path / "my image.sif", tmp_path / "called"
    folders = ("/data:/data", "/scratch/x y:/in")
    plan = replace(plan, container=f"apptainer:{image}", binds=folders, device="cuda" if gpu else "cpu")
    words = node_script.step_words(plan, rocm=gpu == "--rocm")

    def go(path: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": path, "CALLED": str(called)}
        return subprocess.run([f"/bin/{words[0]}", *words[1:]], env=env, text=True, capture_output=True, timeout=30)

    assert "neither apptainer nor singularity is there" in go("/usr/bin:/bin").stderr
    assert f"--container {image} is not there" in go(f"{tmp_path}/bin:/usr/bin:/bin").stderr
    image.touch()
    argv, _ = started(go(f"{tmp_path}/bin:/usr/bin:/bin"))
    assert argv == ["-m", "launcher", "node", "--plan", f"{plan.run_dir}/plan.json"]
    options = [*([gpu] if gpu else []), "--bind", ",".join(folders), "--pwd", plan.workdir, str(image)]
    assert called.read_text().splitlines() == [f"{tmp_path}/bin/{name}", "1", "exec", *options, "python3", *argv]


def test_pyxis_gets_its_options_from_srun_and_starts_the_same_script_inside(plan: LaunchPlan) -> None:
    inside = replace(plan, container="pyxis:nvcr.io#nvidia/pytorch:24.01-py3", binds=("/a:/a", "/b:/c"))
    words = node_script.step_words(inside)
    assert words[:4] == [
        "--container-image=nvcr.io#nvidia/pytorch:24.01-py3",
        "--container-mounts=/a:/a,/b:/c",
        f"--container-workdir={plan.workdir}",
        "bash",
    ]
    assert "exec python3 -m launcher node --plan" in words[5]
    assert "apptainer" not in words[5]


@pytest.mark.parametrize(
    ("spec", "typed"),
    [
        ("docker://pytorch", "write apptainer:FILE.sif"),
        ("image.sqsh", "write apptainer:FILE.sif"),
        ("pytorch", "or pyxis:IMAGE"),
        ("pyxis:", "or pyxis:IMAGE"),
        ("none.sif", "is not there"),
        ("apptainer:none", "is not there"),
        ("apptainer:docker://x/y", "apptainer build image.sif docker://x/y"),
        ("pyxis:a\nb", "control characters"),
    ],
)
def test_a_container_that_cannot_be_meant_is_answered_with_what_to_type(spec: str, typed: str) -> None:
    with pytest.raises(LaunchError) as refused:
        node_script.container(spec)
    assert typed in str(refused.value)


def test_containers_are_told_apart_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.sif", "x.sqsh"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert node_script.container("x.sif") == node_script.container("apptainer:x.sif") == f"apptainer:{tmp_path}/x.sif"
    assert node_script.container("apptainer:folder") == f"apptainer:{tmp_path}/folder"
    assert node_script.container("pyxis:./x.sqsh") == f"pyxis:{tmp_path}/x.sqsh"
    assert node_script.container("pyxis:org/name:tag") == "pyxis:org/name:tag"
    assert node_script.bind("folder:/in") == f"{tmp_path}/folder:/in"
    for spec in ("folder:in", "none", "a,b"):
        with pytest.raises(LaunchError):
            node_script.bind(spec)


def test_a_container_sees_what_links_lead_to(tmp_path: Path) -> None:
    for name in ("data", "own", "disk/runs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "train.beton").touch()
    (tmp_path / "own" / "train.beton").symlink_to(tmp_path / "data" / "train.beton")
    (tmp_path / "own" / "runs").symlink_to(tmp_path / "disk" / "runs")
    values: dict[str, Any] = {"name": "x", "model": {"encoder": "resnet_small"}}
    values |= {"data": {"train": f"{tmp_path}/own/train.beton", "image_size": 32}}
    config = load_config(values, {"train": {"global_batch_size": 8, "epochs": 20}})
    found = node_script.binds(config, [f"{tmp_path}/own", f"{tmp_path}/own/runs/x"], ["/a:/b"])
    folders = [f"{tmp_path}/{name}" for name in ("data", "disk/runs/x", "own")]
    assert found == (*(f"{folder}:{folder}" for folder in folders), "/a:/b")


@pytest.mark.parametrize("text", ["if true", "echo 'a", "cat <<EOF\nx", "echo a \\", "a )", "echo \x1b[2J"])
def test_a_set_up_line_that_bash_does_not_understand_is_refused_before_the_queue(text: str) -> None:
    with pytest.raises(LaunchError, match="set-up line"):
        node_script.setup_commands(text)


def test_a_set_up_file_is_a_list_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "no_such.UTF-8")  # of which bash warns
    text = "# modules\n\nmodule load \\\n  cuda\nif true; then\n\n  # here\n  echo a\nfi\ncat <<EOF\n b\nEOF\n"
    (tmp_path / "setup.sh").write_text(text)
    commands = node_script.setup_file(str(tmp_path / "setup.sh"))
    assert commands == ["module load \\\n  cuda", "if true; then\n\n  # here\n  echo a\nfi", "cat <<EOF\n b\nEOF"]
    assert node_script.kept_setup(json.dumps(commands)) == commands
    with pytest.raises(LaunchError, match="cannot be read"):
        node_script.setup_file(str(tmp_path / "none"))


def test_the_plan_keeps_it_and_a_script_that_does_not_know_it_is_refused(plan: LaunchPlan) -> None:
    plan = replace(plan, setup=("a\n\tb",), container="pyxis:x", binds=("/a:/a",), node_python="python", shared=True)
    path = write_launch_plan(plan)
    assert read_launch_plan(path) == plan
    with pytest.raises(LaunchError, match="batch script is of an earlier version"):
        node.run_node(path, 0)
    for wrong in ({"setup": ("a\x1b",)}, {"container": "a\nb"}, {"code": "relative"}, {"binds": ("a\nb",)}):
        with pytest.raises(LaunchError):
            replace(plan, **wrong)  # type: ignore[arg-type]
