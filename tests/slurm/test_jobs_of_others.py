"""Trainings that are started from inside other jobs touch no job but their own. On a real SLURM.

Run: pytest tests/slurm/test_jobs_of_others.py
"""

from __future__ import annotations

import re
import subprocess
from itertools import chain

import pytest

from tests.launcher_checkout import Checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_step_requests import pretend

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
# A job of another kind, in which a person submits four trainings and starts one by hand. They all crash.
OUTER = """\
#!/bin/bash
name=${SLURM_ARRAY_TASK_ID-}$1
{
  for i in 1 2 3 4; do
    sbatch --parsable --nodes=1 --oversubscribe --output=/dev/null slurm/train.sh --device=cpu fake.yaml name=$name-$i
  done
  bash slurm/train.sh --device=cpu fake.yaml name=$name
} > $name.out 2>&1
[ $name != tunnel ] || srun --overlap bash outer.sh shell  # as in a shell of `srun --pty`
touch $name.through
[ $name = shell ] || while [ ! -e done ]; do sleep 0.2; done
"""


# Twenty jobs and five trainings by hand take some 40 s: each of them plans, starts a step and decides what follows.
def test_twenty_submissions_from_inside_other_jobs_touch_no_foreign_job(cluster: MiniSlurm, checkout: Checkout) -> None:
    root = checkout.root
    pretend(checkout)
    cluster.env.pop("SIMCLR_PYTHON", None)
    (root / "outer.sh").write_text(OUTER)
    size = ("--nodes=1", "--ntasks=1", "--oversubscribe")
    array = cluster.submit(*size, "--array=0-1", "--output=/dev/null", "outer.sh", "array", cwd=root)
    tunnel = cluster.submit(*size, "--output=/dev/null", "outer.sh", "tunnel", cwd=root)
    names = ("0array", "1array", "tunnel", "shell", "alloc")
    with subprocess.Popen(["salloc", "-Q", *size, "bash", "outer.sh", "alloc"], env=cluster.env, cwd=root) as alloc:
        try:
            wait_for(lambda: all((root / f"{name}.through").exists() for name in names), 150, "all commands")
            printed = {name: (root / f"{name}.out").read_text() for name in names}
            jobs = {name: re.findall(r"^\d+$", text, re.MULTILINE) for name, text in printed.items()}
            assert [len(found) for found in jobs.values()] == [4] * 5, printed
            for job in chain.from_iterable(jobs.values()):
                cluster.wait(lambda job=job: cluster.job(job).get("Restarts") == "1", 60, f"{job}'s own requeue")
            for job in (f"{array}_0", f"{array}_1", tunnel):
                assert (cluster.state(job), cluster.job(job)["Restarts"]) == ("RUNNING", "0"), printed
            assert alloc.poll() is None
        finally:
            (root / "done").touch()
    for name, text in printed.items():
        why = "is an interactive one" if name == "alloc" else "does more than this training"
        assert re.search(rf"job \d+ {why}.*: it is not requeued when the training stops", text), text
        assert re.search(rf"ended without a status \(exit code 1\).*; not requeued: job \d+ {why}", text), text
        assert f"launcher resume {root}/runs/{name}" in text, text
