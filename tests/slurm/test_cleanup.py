"""A cluster ends with the process that started it, however that one ends. Run: pytest tests/slurm/test_cleanup.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher_checkout import REPOSITORY, is_running, wait_for
from tests.slurm.mini_slurm import processes_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120), pytest.mark.usefixtures("_slurm_installed")]
STARTS_A_JOB = """
from tests.slurm.mini_slurm import MiniSlurm
with MiniSlurm(num_nodes=1) as cluster:
    cluster.submit("--output=/dev/null", "--wrap=srun sleep 1000", cwd=cluster.root)
    print(cluster.root, flush=True)
    input()
"""


def test_a_killed_pytest_leaves_no_process_of_its_cluster() -> None:
    words = [sys.executable, "-c", STARTS_A_JOB]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        root = Path(parent.stdout.readline().strip())
        found = wait_for(lambda: _with_a_running_job(root), 60, "a running job")
        parent.kill()
    wait_for(lambda: not any(map(is_running, found)), 20, "the end of the cluster's processes")
    wait_for(lambda: not root.exists(), 20, "the end of the cluster's folder")
    assert processes_of(root) == []


def _with_a_running_job(root: Path) -> list[int]:
    """The cluster's processes, once the job's step daemons and its task are among them."""
    found = processes_of(root)
    try:
        programs = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in found]
    except OSError:  # one has just ended
        return []
    return found if programs.count("sleep") == 1 and programs.count("slurmstepd") >= 2 else []
