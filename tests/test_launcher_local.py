"""`python -m launcher local`: processes start, stop, and never stay behind. Run: pytest tests/test_launcher_local.py"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher_checkout import REPOSITORY, Checkout, is_running, make_checkout, wait_for

pytestmark = pytest.mark.distributed
CONFIG = "fake.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "check out, with 'quotes' & $HOME")


def test_starts_the_planned_processes_with_their_rank_and_settings(checkout: Checkout) -> None:
    environment = {"PMI_SIZE": "7", "WORLD_SIZE": "9", "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1"}
    done = checkout.launch(
        "local", CONFIG, "seed=1", "--nproc", "2", "--env", "NOTE=a, b", "name=fake", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "not passed on to the training: ACCELERATE_USE_FSDP=true" in done.stderr
    first, second = checkout.ranks()
    for worker in (first, second):
        assert worker["argv"] == [str(checkout.root / CONFIG), "seed=1", "name=fake"]
        assert worker["cwd"] == str(checkout.root)
        assert worker["env"]["SIMCLR_EXPECTED_WORLD_SIZE"] == worker["env"]["WORLD_SIZE"] == "2"
        assert worker["env"]["NOTE"] == "a, b"
        assert "PMI_SIZE" not in worker["env"]
        assert "ACCELERATE_USE_FSDP" not in worker["env"]
    assert first["env"]["SIMCLR_ATTEMPT"] == second["env"]["SIMCLR_ATTEMPT"] == checkout.status()["attempt"]
    assert [entry["why"] for entry in checkout.records("end")] == ["finished"]
    lines = [f"rank {rank} of 2: finished at step 5\n" for rank in range(2)]
    assert sorted(done.stdout.splitlines(keepends=True)) == lines  # seen as it is printed
    folder = checkout.run_dir / "logs" / first["env"]["SIMCLR_ATTEMPT"]
    assert [path.read_text() for path in sorted(folder.iterdir())] == lines
    shown = [checkout.launch("logs", str(checkout.run_dir), "--rank", rank) for rank in ("1", "7")]
    assert shown[0].stdout == lines[1]
    assert "rank_00007.log: not there; the newest attempt has 2" in shown[1].stderr


def test_one_process_needs_no_rendezvous(checkout: Checkout) -> None:
    done = checkout.launch("local", CONFIG, "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert [worker["env"]["SIMCLR_EXPECTED_WORLD_SIZE"] for worker in checkout.ranks()] == ["1"]
    assert "1 process on cpu" in done.stderr
    assert done.stdout == "rank 0 of 1: finished at step 5\n"  # the training's alone: it may be JSON lines


def test_a_batch_that_does_not_divide_is_refused_before_any_process_starts(checkout: Checkout) -> None:
    done = checkout.launch("local", CONFIG, "--nproc", "3")
    assert done.returncode == 2
    assert "8 does not divide over 3 processes; use 6 or 9" in done.stderr
    assert "Traceback" not in done.stderr
    assert not checkout.run_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_new_start_continues(checkout: Checkout, number: signal.Signals) -> None:
    checkout.behave(steps=10_000, every=10_000)
    launcher = checkout.start("local", CONFIG, "--nproc", "2")
    wait_for(lambda: len(checkout.ranks()) == 2 and checkout.status(), 60, "workers")
    for _ in range(5 if number == signal.SIGTERM else 1):  # however often it is said
        launcher.send_signal(number)
        time.sleep(0.05)
    assert launcher.wait(30) == 75
    assert checkout.status()["state"] == "preempted"
    assert checkout.newest_step() == checkout.status()["step"] > 0
    assert f"continue with: cd '{checkout.root}".replace("'quotes'", "'\"'\"'quotes'\"'\"'") in checkout.log()
    assert not checkout.pids_alive()
    reached = checkout.newest_step()
    checkout.behave(steps=reached + 3)
    assert checkout.launch("local", CONFIG, "--nproc", "2").returncode == 0
    assert [entry["step"] for entry in checkout.records("start")] == [0, reached]


def test_a_request_while_the_workers_still_import_is_not_lost(checkout: Checkout) -> None:
    checkout.behave(steps=10_000, import_s=3)
    launcher = checkout.start("local", CONFIG, "--nproc", "2")
    wait_for(checkout.ranks, 60, "a worker")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 75
    assert checkout.status()["state"] == "preempted"


def test_under_nohup_a_closed_terminal_is_no_request(checkout: Checkout) -> None:
    checkout.behave(steps=100_000)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = checkout.start("local", CONFIG)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(checkout.newest_step, 60, "a step")
    launcher.send_signal(signal.SIGHUP)
    reached = checkout.newest_step()
    wait_for(lambda: checkout.newest_step() > reached + 5, 60, "more steps")
    assert "saving, then stopping" not in checkout.log()
    launcher.terminate()
    assert launcher.wait(30) == 75


def test_secrets_of_the_environment_reach_no_file(checkout: Checkout) -> None:
    done = checkout.launch("local", CONFIG, "--env=NOTE=kept", env={"HF_TOKEN": "hunter2"})
    assert done.returncode == 0, done.stderr
    (worker,) = checkout.ranks()
    assert worker["env"]["HF_TOKEN"] == "hunter2"  # on one's own machine it is passed on, but by no file
    for path in (checkout.run_dir / "plan.json", checkout.run_dir / "attempts.jsonl"):
        assert "hunter2" not in path.read_text()
    assert "NOTE" in (checkout.run_dir / "plan.json").read_text()
    assert "hunter2" not in checkout.launch("show", "local", CONFIG, "--json", env={"HF_TOKEN": "hunter2"}).stdout


def test_a_second_interrupt_kills_everything(checkout: Checkout) -> None:
    checkout.behave(steps=10_000, import_s=1000)
    launcher = checkout.start("local", CONFIG, "--nproc", "2")
    wait_for(lambda: len(checkout.ranks()) == 2, 60, "workers")
    launcher.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C kills" in checkout.log(), 10, "the first answer")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(15) == 4
    assert not checkout.pids_alive()


def test_workers_die_with_a_killed_launcher(checkout: Checkout) -> None:
    checkout.behave(steps=10_000)
    launcher = checkout.start("local", CONFIG, "--nproc", "2")
    wait_for(lambda: len(checkout.ranks()) == 2, 60, "workers")
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not checkout.pids_alive(), 5, "the workers' end")


def test_workers_die_with_a_killed_agent(checkout: Checkout) -> None:
    checkout.behave(steps=10_000)
    launcher = checkout.start("local", CONFIG, "--nproc", "2")
    wait_for(lambda: len(checkout.ranks()) == 2, 60, "workers")
    agent = int(Path(f"/proc/{checkout.ranks()[0]['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    assert agent != launcher.pid
    os.kill(agent, signal.SIGKILL)
    assert launcher.wait(15) == 4
    assert not checkout.pids_alive()


def test_a_killed_rank_ends_the_run_with_the_line_that_continues_it(checkout: Checkout) -> None:
    checkout.behave(steps=10_000, end={"*": [5, "kill"]})
    done = checkout.launch("local", CONFIG, "--nproc", "2")
    assert done.returncode == 4
    assert "-m launcher resume" in done.stderr.splitlines()[-1]
    assert not checkout.pids_alive()
    folder = checkout.run_dir / "logs" / checkout.records("start")[0]["attempt"]
    said = f"launcher: rank 0 ended by signal 9; {folder}/rank_00000.log ends with:\n  | rank 0: kill as told\n"
    assert said in done.stderr


def test_forgiven_failures_start_again_while_they_make_progress(checkout: Checkout) -> None:
    checkout.behave(steps=12, end={"0": [5, "raise"], "1": [5, "kill"]})
    done = checkout.launch("local", CONFIG, "--nproc", "1", "--max-failures", "3", "resume=none")
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in checkout.records("start")] == [0, 4, 8]
    told = [worker["argv"][-1] for worker in checkout.ranks()]
    assert told == ["resume=none", "resume=auto", "resume=auto"]


def test_a_crash_loop_ends(checkout: Checkout) -> None:
    checkout.behave(end={"*": [1, "raise"]})
    done = checkout.launch("local", CONFIG, "--nproc", "1", "--max-failures", "9")
    assert done.returncode == 5
    assert "2 attempts in a row made no progress" in done.stderr
    assert len(checkout.records("start")) == 2


def test_bad_data_is_never_tried_again(checkout: Checkout) -> None:
    checkout.behave(end={"*": [2, "data_error"]})
    done = checkout.launch("local", CONFIG, "--max-failures", "9")
    assert done.returncode == 4
    assert "data_error as told" in done.stderr
    assert len(checkout.records("start")) == 1


def test_two_launchers_do_not_share_a_run_directory(checkout: Checkout) -> None:
    checkout.behave(steps=10_000)
    launcher = checkout.start("local", CONFIG)
    wait_for(checkout.ranks, 60, "a worker")
    second = checkout.launch("local", CONFIG)
    assert second.returncode == 2
    assert f"already being trained by process {launcher.pid}" in second.stderr
    launcher.terminate()
    launcher.wait(30)
    assert not is_running(launcher.pid)


def test_a_busy_port_is_an_error(checkout: Checkout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        done = checkout.launch("local", CONFIG, "--nproc", "2", "--port", str(port))
    assert done.returncode == 3
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr


def test_a_closed_pipe_ends_quietly(checkout: Checkout) -> None:
    import subprocess
    import sys

    shown = subprocess.Popen(
        [sys.executable, "-m", "launcher", "show", "local", CONFIG],
        cwd=checkout.root,
        env=checkout.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    shown.stdout.close()
    assert "Traceback" not in shown.stderr.read()
    shown.stderr.close()
    shown.wait(10)


def test_closed_output_ends_no_training(checkout: Checkout) -> None:
    def close() -> None:
        for number in (1, 2):
            os.close(number)

    done = subprocess.run(
        [sys.executable, "-m", "launcher", "local", CONFIG, "--nproc", "1"],
        cwd=checkout.root,
        env=checkout.env,
        preexec_fn=close,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0
    assert checkout.status()["state"] == "finished"


LATE = """
import os, signal
from launcher.local import Requests

with Requests("USR1"):
    pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
with Requests("USR1") as requests:
    os.kill(os.getpid(), signal.SIGINT)
    assert requests.stop and not requests.kill
os.kill(os.getpid(), signal.SIGINT)
print("ended as it meant to")
"""


def test_a_second_interrupt_that_comes_late_does_not_change_the_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ended as it meant to\n"), done.stderr
