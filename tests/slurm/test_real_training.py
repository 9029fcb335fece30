"""The real trainer through sbatch: interrupted and resumed, it ends where the undisturbed run ends. Slow: minutes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, make_real_checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_train_script import end, log_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]
SETTINGS = ("train.epochs=16", "evaluation.knn_every_epochs=null", "checkpoint.every_epochs=1", "optim.warmup_epochs=1")
STEPS_PER_EPOCH = 8  # 512 synthetic images, 64 in a batch


@pytest.fixture
def real_checkout(tmp_path: Path) -> Checkout:
    return make_real_checkout(tmp_path / "checkout")


def submit(cluster: MiniSlurm, checkout: Checkout, name: str) -> str:
    cluster.env |= {"SIMCLR_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = ("slurm/train.sh", "--nproc=2", "configs/smoke.yaml", f"name={name}", *SETTINGS)
    return cluster.submit("--nodes=2", *words, cwd=checkout.root)


def wait_for_steps(checkout: Checkout, name: str, job: str, steps: int) -> None:
    """The run has gone so many steps further than its newest attempt's start."""
    run_dir = checkout.root / "runs" / name
    start = checkout.records("start", run_dir)[-1]["step"] if (run_dir / "attempts.jsonl").exists() else 0

    def far_enough() -> bool:
        path = run_dir / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] >= start + steps

    try:
        wait_for(far_enough, 120, f"{steps} steps of {name}")
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log_of(checkout, job)}") from None


def release_until_the_end(cluster: MiniSlurm, checkout: Checkout, job: str) -> None:
    """Whoever else has ended an attempt: the job comes back."""

    def over() -> bool:
        if cluster.state(job) == "PENDING":
            cluster.release(job)
        return cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED")

    cluster.wait(over, 400, f"the end of job {job}", lambda: log_of(checkout, job))


def weights_of(run_dir: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's tensors."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    files = sorted(newest.glob("*.safetensors"))
    assert files
    return {f"{newest.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_preemptions_and_a_lost_node_do_not_change_a_single_bit(
    own_cluster: MiniSlurm, real_checkout: Checkout
) -> None:
    cluster, checkout, run_dir = own_cluster, real_checkout, real_checkout.root / "runs" / "disturbed"
    undisturbed = submit(cluster, checkout, "undisturbed")
    assert end(cluster, checkout, undisturbed, 200) == "COMPLETED", log_of(checkout, undisturbed)

    def restarted(times: int) -> bool:
        return cluster.job(job)["Restarts"] == str(times) and cluster.state(job) == "PENDING"

    job = submit(cluster, checkout, "disturbed")
    wait_for_steps(checkout, "disturbed", job, 10)
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)  # as before the time limit
    cluster.wait(lambda: restarted(1), 60, "the first requeue")
    cluster.release(job)
    wait_for(lambda: len(checkout.records("start", run_dir)) == 2, 60, "the second attempt")
    wait_for_steps(checkout, "disturbed", job, 10)
    cluster.lose_node(2)
    cluster.wait(lambda: restarted(2), 120, "the requeue after the loss", lambda: log_of(checkout, job))
    cluster.start_node(2)
    cluster.wait(cluster.all_idle, 60, "both nodes' return")
    cluster.wait(cluster.all_sent, 150, "the end of the lost step's messages")
    cluster.release(job)
    wait_for(lambda: len(checkout.records("start", run_dir)) == 3, 60, "the third attempt")
    wait_for_steps(checkout, "disturbed", job, 10)
    cluster.run("scontrol", "requeue", job, check=True)  # as a preemption by others
    cluster.wait(lambda: restarted(3), 60, "the third requeue")
    release_until_the_end(cluster, checkout, job)
    assert cluster.state(job) == "COMPLETED", log_of(checkout, job)

    starts = [entry["step"] for entry in checkout.records("start", run_dir)]
    assert len(starts) >= 4
    assert starts[0] == 0
    assert starts[:4] == sorted(set(starts[:4]))
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    # After the loss nothing could be saved: steps since the last checkpoint were done twice.
    assert starts[2] % STEPS_PER_EPOCH == 0
    first, second = (weights_of(checkout.root / "runs" / name) for name in ("undisturbed", "disturbed"))
    assert {name.rpartition("/")[2] for name in first} == {"model.safetensors", "optimizer.safetensors"}
    assert first == second


@pytest.mark.slow
def test_trains_on_real_images_over_two_nodes(cluster: MiniSlurm, real_checkout: Checkout, data_root: Path) -> None:
    checkout = real_checkout
    cluster.env["SIMCLR_PYTHON"] = sys.executable
    archive = data_root / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    prepare = ("slurm/prepare.sh", str(archive), "cifar10.beton", "--split", "train")
    job = cluster.submit("--cpus-per-task=2", *prepare, cwd=checkout.root)
    assert end(cluster, checkout, job, 300) == "COMPLETED", log_of(checkout, job)
    words = ("configs/smoke.yaml", "data.train=cifar10.beton", "data.test=null", "evaluation.knn_every_epochs=null")
    words = (*words, "train.max_steps=20", "name=real")
    job = cluster.submit("--nodes=2", "slurm/train.sh", "--nproc=2", *words, cwd=checkout.root)
    assert end(cluster, checkout, job, 200) == "COMPLETED", log_of(checkout, job)
    assert "finished at step 20" in log_of(checkout, job)
