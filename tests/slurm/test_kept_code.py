"""What `launcher slurm` keeps for a job, on a real SLURM: code, configuration, set-up lines. Run: pytest tests/slurm"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_train_script import LONG, end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
CONDA = """\
# what conda does: a function whose hooks use variables that are not set
conda() {
  . "$PWD/hook.sh" && export IN_ENVIRONMENT="$2"
}
conda activate mine
"""


def submit(cluster: MiniSlurm, checkout: Checkout, *words: str) -> str:
    done = checkout.launch("slurm", "fake.yaml", "--nproc=1", "--device=cpu", *words, env=cluster.env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def log_of(run_dir: Path, job: str) -> str:
    path = run_dir / "logs" / f"slurm-{job}.out"
    return path.read_text() if path.exists() else "no log"


def test_a_job_goes_on_with_the_code_and_the_lines_it_was_submitted_with(
    cluster: MiniSlurm, checkout: Checkout
) -> None:
    checkout.behave(**LONG)
    (checkout.root / "hook.sh").write_text('[ -z "$NEVER_SET" ]; false; export HOOK="$ALSO_NEVER-ran"\n')
    (checkout.root / "setup.sh").write_text(CONDA)
    words = ("--setup=export LINE='a  b'", "--setup-file=setup.sh", "--nodes=1", "--sbatch-arg=--hold")
    job = submit(cluster, checkout, *words)
    (code,) = (checkout.run_dir / "code").iterdir()

    # Meanwhile somebody works in the checkout.
    edited = checkout.root / "launcher" / "node.py"
    original = edited.read_text()
    edited.write_text("while editing(")
    (checkout.root / "simclr_dist" / "train.py").write_text("raise SystemExit('new')")
    (checkout.root / "fake.yaml").write_text((checkout.root / "fake.yaml").read_text() + "seed: 7\nno_such_key: 1\n")
    (checkout.root / "setup.sh").unlink()
    cluster.run("scontrol", "release", job, check=True)

    def trains(attempts: int) -> bool:
        return len(checkout.ranks()) == attempts and bool(checkout.status())

    cluster.wait(lambda: trains(1), 60, "a worker", lambda: log_of(checkout.run_dir, job))
    wait_for(lambda: checkout.newest_step() or checkout.status()["state"] == "running", 20, "a start")
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)
    cluster.wait_state(job, ["PENDING"])
    cluster.release(job)
    cluster.wait(lambda: trains(2), 60, "the second attempt", lambda: log_of(checkout.run_dir, job))
    for worker in checkout.ranks():
        assert worker["file"] == f"{code}/simclr_dist/train.py"
        assert worker["argv"][0] == f"{code}/config/fake.yaml"
        assert worker["cwd"] == str(checkout.root)
        shown = {name: worker["env"].get(name) for name in ("LINE", "HOOK", "IN_ENVIRONMENT")}
        assert shown == {"LINE": "a  b", "HOOK": "-ran", "IN_ENVIRONMENT": "mine"}
    assert {entry["code"] for entry in checkout.records("start")} == {str(code)}

    edited.write_text(original)
    assert checkout.launch("stop", str(checkout.run_dir), env=cluster.env).returncode == 0
    assert end(cluster, checkout, job) == "COMPLETED"
    shown_status = checkout.launch("status", str(checkout.run_dir), env=cluster.env).stdout
    assert f"code        {code} (commit unknown, kept 20" in shown_status
    # Resumed, it is the same again, unless the new code is asked for.
    edited.write_text(original + "# newer\n")
    resumed = checkout.launch("resume", "--dry-run", str(checkout.run_dir), env=cluster.env)
    assert resumed.returncode == 0, resumed.stderr
    assert f"goes on with {code} (commit" in resumed.stderr
    assert f"--code={code} " in resumed.stdout
    assert f"{code}/config/fake.yaml" in resumed.stdout
    assert "set-up line:   export LINE='a  b'" in resumed.stdout
    new = checkout.launch("resume", "--new-code", "--dry-run", str(checkout.run_dir), env=cluster.env)
    assert (new.returncode, "no_such_key" in new.stderr) == (2, True)
    text = (checkout.root / "fake.yaml").read_text().replace("no_such_key: 1\n", "")
    (checkout.root / "fake.yaml").write_text(text)
    new = checkout.launch("resume", "--new-code", "--dry-run", str(checkout.run_dir), env=cluster.env)
    assert str(code) not in new.stdout
    assert f"--code={checkout.run_dir}/code/" in new.stdout
    assert "set-up line:   conda activate mine" in new.stdout


def test_a_set_up_line_that_fails_ends_the_job_for_good_and_is_named(cluster: MiniSlurm, checkout: Checkout) -> None:
    job = submit(cluster, checkout, "--nodes=2", "--setup=module load cuda/99")
    assert end(cluster, checkout, job) == "FAILED", log_of(checkout.run_dir, job)
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("0", "2:0")
    log = log_of(checkout.run_dir, job)
    said = "set-up line ended with exit code 127: module load cuda/99"
    assert re.search(rf"\d: launcher: n\d: {said}", log)
    assert len(re.findall(f"n1: {said}", log)) <= 2
    assert checkout.status()["reason"] == "config_error"
    assert said in checkout.launch("status", str(checkout.run_dir), env=cluster.env).stdout
    assert not (checkout.run_dir / "ranks").exists()


def test_jobs_that_share_a_node_and_a_container_of_apptainer(cluster: MiniSlurm, checkout: Checkout) -> None:
    (checkout.root / "bin").mkdir()
    apptainer = checkout.root / "bin" / "apptainer"
    apptainer.write_text(
        f'#!/bin/sh\nwhile [ "${{1##*.}}" != sif ]; do shift; done\nshift 2\nINSIDE=1 exec {sys.executable} "$@"\n'
    )
    apptainer.chmod(0o755)
    (checkout.root / "image.sif").touch()
    checkout.behave(**LONG)
    words = ("--nodes=1", "--shared", "--cpus-per-task=1", "--mem=100M", "--sbatch-arg=--nodelist=n1")
    words = (*words, "--setup=PATH=$PWD/bin:$PATH", "--container=image.sif")
    jobs = [submit(cluster, checkout, *words, f"name={name}") for name in ("one", "two")]
    run_dirs = [checkout.root / "runs" / name for name in ("one", "two")]
    cluster.wait(
        lambda: all(path.joinpath("ranks").exists() and checkout.ranks(path) for path in run_dirs),
        60,
        "two jobs on one node",
        lambda: [log_of(path, job) for path, job in zip(run_dirs, jobs, strict=True)],
    )
    for job, path in zip(jobs, run_dirs, strict=True):
        assert (cluster.state(job), cluster.job(job)["NodeList"], cluster.job(job)["NumCPUs"]) == ("RUNNING", "n1", "1")
        (worker,) = checkout.ranks(path)
        assert worker["env"]["INSIDE"] == "1"
        plan = json.loads((path / "plan.json").read_text())
        assert (plan["shared"], plan["container"]) == (True, f"apptainer:{checkout.root}/image.sif")
        assert plan["binds"] == [f"{checkout.root}:{checkout.root}"]


def test_a_job_submitted_from_inside_other_jobs_is_only_itself(cluster: MiniSlurm, checkout: Checkout) -> None:
    """In a task of an array, in which a step is asked for the submission, and with defaults of the site."""
    python = f"{sys.executable} -m launcher slurm fake.yaml --nproc=2 --device=cpu --nodes=1"
    script = (
        "export SBATCH_PARTITION=high SBATCH_EXPORT=NONE SBATCH_ARRAY_INX=0-5 CUDA_VISIBLE_DEVICES=9 TMPDIR=/gone\n"
        "export SIMCLR_ATTEMPT=7.3-abcdef SLURM_RESTART_COUNT=2 SLURM_CPUS_PER_TASK=1\n"
        f"srun --ntasks=1 {python} name=inner$SLURM_ARRAY_TASK_ID 2>&1\n"
    )
    # Not in a partition whose jobs those in `high` may push aside.
    options = ("--array=0-1", "--partition=high", "--cpus-per-task=1", "--mem-per-cpu=10")
    options += ("--output=outer-%a.log", "--requeue")
    outer = cluster.submit(*options, f"--wrap={script}", cwd=checkout.root)
    for index in range(2):
        assert end(cluster, checkout, f"{outer}_{index}") == "COMPLETED"
        log = (checkout.root / f"outer-{index}.log").read_text()
        assert "SBATCH_ARRAY_INX=0-5 is not passed on to the job: use --sweep" in log
        assert "CUDA_VISIBLE_DEVICES=9 is not passed on to the job" in log
        job = re.findall(r"^job (\d+): 1 run of", log, re.MULTILINE)[0]
        run_dir = checkout.root / "runs" / f"inner{index}"
        assert end(cluster, checkout, job) == "COMPLETED", log_of(run_dir, job)
        assert (cluster.job(job)["Partition"], cluster.job(job)["Restarts"]) == ("high", "0")
        (start,) = checkout.records("start", run_dir)
        assert start["attempt"].startswith(f"{job}.0-")
        for worker in checkout.ranks(run_dir):
            assert not {"CUDA_VISIBLE_DEVICES", "SBATCH_ARRAY_INX"} & worker["env"].keys()
            assert worker["env"].get("TMPDIR") != "/gone"
            assert worker["env"]["SLURM_CPUS_PER_TASK"] == "4"  # the whole node's
