"""What follows from the end of an attempt: the whole decision table, without any process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from launcher import local, outcome
from launcher.errors import Exit
from launcher.launch_plan import LaunchPlan
from launcher.outcome import Ended, Evidence, decide
from launcher.scontrol import parse_job_state
from simclr_dist.errors import Reason
from simclr_dist.run.layout import RunDir, newest_step, write_record
from simclr_dist.run.status import Status, read_status, write_status

FINISHED, STOPPED, PREEMPTED, RUNNING = (Status(state) for state in ("finished", "stopped", "preempted", "running"))
GOOD, IDLE = Ended(failed=True, progressed=True), Ended(failed=True, progressed=False)


def failed(reason: str) -> Status:
    return Status("failed", reason)


def action(
    status: Status | None, job: outcome.JobState, steps: tuple[int, int] = (10, 20), **values: object
) -> tuple[str, int]:
    options = {"max_failures": values.pop("max_failures", 3), "requeue": values.pop("requeue", True)}
    decision = decide(Evidence(1, status, *steps, job=job, **values), **options)  # type: ignore[arg-type]
    return decision.action, int(decision.exit_code)


@pytest.mark.parametrize("job", ["none", "running", "time_limit", "cancelled", "requeued", "unknown"])
def test_a_finished_or_stopped_run_is_done_whatever_the_scheduler_reports(job: outcome.JobState) -> None:
    assert action(FINISHED, job) == ("done", Exit.OK)
    assert action(STOPPED, job) == ("done", Exit.OK)
    assert action(PREEMPTED, job, stop_file=True) == ("done", Exit.OK)


@pytest.mark.parametrize("status", [PREEMPTED, RUNNING, None, failed("crash"), failed("data_error")])
def test_a_cancelled_or_already_requeued_job_is_left_alone(status: Status | None) -> None:
    assert action(status, "cancelled") == ("leave", Exit.OK)
    assert action(status, "requeued") == ("leave", Exit.OK)


def test_preempted_jobs_come_back_without_limit_while_they_save() -> None:
    many = tuple(Ended(failed=False, progressed=True) for _ in range(50))
    assert action(PREEMPTED, "running", earlier=many) == ("requeue", Exit.OK)
    assert action(RUNNING, "time_limit", earlier=many) == ("requeue", Exit.OK)


def test_a_time_limit_too_short_for_any_progress_ends_the_requeueing() -> None:
    idle = Ended(failed=False, progressed=False)
    assert action(PREEMPTED, "running", (10, 10), earlier=(idle,)) == ("requeue", Exit.OK)
    assert action(PREEMPTED, "running", (10, 10), earlier=(idle, idle, idle)) == ("fail", Exit.GAVE_UP)
    assert action(PREEMPTED, "none", (10, 10), earlier=(idle, idle, idle)) == ("leave", Exit.PREEMPTED)  # by hand


@pytest.mark.parametrize("status", [failed("crash"), failed("hang"), RUNNING, None])
def test_failures_in_a_row_are_forgiven_up_to_the_limit(status: Status | None) -> None:
    assert action(status, "running", earlier=(GOOD, GOOD)) == ("requeue", Exit.OK)
    assert action(status, "running", earlier=(GOOD, GOOD, GOOD)) == ("fail", Exit.GAVE_UP)
    preempted = Ended(failed=False, progressed=True)
    assert action(status, "running", earlier=(GOOD, GOOD, GOOD, preempted)) == ("requeue", Exit.OK)


def test_two_failures_without_progress_are_enough() -> None:
    assert action(None, "running", (10, 10)) == ("requeue", Exit.OK)
    assert action(None, "running", (10, 10), earlier=(IDLE,)) == ("fail", Exit.GAVE_UP)
    assert action(None, "running", (10, 10), earlier=(GOOD,)) == ("requeue", Exit.OK)


@pytest.mark.parametrize("reason", outcome.PERMANENT)
def test_errors_that_would_come_back_are_never_requeued(reason: str) -> None:
    code = outcome.PERMANENT_EXIT.get(reason, Exit.FAILED)
    assert action(failed(reason), "running", max_failures=99) == ("fail", code)


# Whether another attempt can help, for every reason that the trainer or a node may report. For a new reason decide it
# here and in launcher.outcome.PERMANENT.
CAN_ANOTHER_ATTEMPT_HELP = {
    "config_error": False,
    "data_error": False,
    "checkpoint_error": False,
    "nan_abort": False,
    "crash": True,
    "hang": True,
    "preflight": True,
    "unfit": False,
}


def test_for_every_reason_of_a_failure_it_is_decided_whether_to_try_again() -> None:
    assert {*get_args(Reason), "preflight", "unfit"} <= CAN_ANOTHER_ATTEMPT_HELP.keys()
    assert set(outcome.PERMANENT) <= CAN_ANOTHER_ATTEMPT_HELP.keys()


@pytest.mark.parametrize("reason", CAN_ANOTHER_ATTEMPT_HELP)
def test_a_reason_is_tried_again_where_that_can_help_but_not_for_ever(reason: str) -> None:
    helps = CAN_ANOTHER_ATTEMPT_HELP[reason]
    assert action(failed(reason), "running")[0] == ("requeue" if helps else "fail")
    assert action(failed(reason), "running", (10, 10), earlier=(IDLE,))[0] == "fail"
    assert action(failed(reason), "running", earlier=(GOOD, GOOD, GOOD))[0] == "fail"


def test_without_an_answer_of_the_scheduler_nothing_is_requeued() -> None:
    assert action(PREEMPTED, "unknown") == ("leave", Exit.PREEMPTED)
    assert action(None, "unknown") == ("leave", Exit.FAILED)


def test_requeueing_can_be_switched_off() -> None:
    assert action(PREEMPTED, "running", requeue=False) == ("leave", Exit.PREEMPTED)
    assert action(failed("crash"), "running", requeue=False) == ("leave", Exit.FAILED)


def test_without_a_scheduler_a_stopped_run_waits_for_its_owner() -> None:
    assert action(PREEMPTED, "none") == ("leave", Exit.PREEMPTED)
    assert action(failed("crash"), "none", max_failures=0) == ("fail", Exit.FAILED)
    assert action(failed("preflight"), "none", max_failures=0) == ("fail", Exit.PREFLIGHT)


def test_a_step_that_srun_did_not_start_is_not_tried_again() -> None:
    never = {"never_started": "srun: error: Unable to create step"}
    assert action(None, "running", (0, 0), **never) == ("fail", Exit.FAILED)
    assert action(None, "unknown", (0, 0), **never) == ("fail", Exit.FAILED)
    assert action(None, "requeued", (0, 0), **never) == ("leave", Exit.OK)  # by SLURM, which lost a node
    assert action(PREEMPTED, "running", (0, 9), **never)[0] == "requeue"  # something ran after all
    # Asked to stop before anything could start: as any preemption, and not for ever.
    assert action(None, "running", (0, 0), **never, stop_requested=True)[0] == "requeue"
    idle = Ended(failed=False, progressed=False)
    assert action(None, "running", (0, 0), stop_requested=True, earlier=(idle, idle, idle))[0] == "fail"


def test_a_job_that_is_more_than_the_training_is_not_requeued() -> None:
    other = {"not_ours": "job 7 does more than this training"}
    assert action(PREEMPTED, "running", **other) == ("leave", Exit.PREEMPTED)
    assert action(failed("crash"), "running", **other) == ("leave", Exit.FAILED)
    assert action(FINISHED, "running", **other) == ("done", Exit.OK)


def test_attempts_of_one_step_each_do_not_go_on_for_ever() -> None:
    # A stop request that comes while an attempt starts lets it train one step.
    idle = Ended(failed=False, progressed=outcome.has_progressed(10, 11))
    assert action(PREEMPTED, "running", (10, 11), earlier=(idle, idle, idle)) == ("fail", Exit.GAVE_UP)
    assert action(PREEMPTED, "running", (10, 12), earlier=(idle, idle, idle))[0] == "requeue"


JOB = "JobId=7 JobName=x UserId=me(1) JobState={} Reason={} Dependency=(null) Requeue=1 Restarts={} BatchFlag=1"


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "own", "word"),
    [
        ("RUNNING", "None", 0, 0, "running"),
        ("COMPLETING", "TimeLimit", 1, 1, "time_limit"),
        ("COMPLETING", "None", 0, 0, "cancelled"),
        ("CANCELLED", "None", 0, 0, "cancelled"),
        ("COMPLETING", "None", 1, 0, "requeued"),
        ("COMPLETING", "BeginTime", 2, 1, "requeued"),
        ("PENDING", "BeginTime", 0, 0, "requeued"),
        ("COMPLETING", "NodeDown", 0, 0, "unknown"),
        ("FAILED", "JobLaunchFailure", 0, 0, "unknown"),
    ],
)
def test_the_causes_of_a_term_are_told_apart(state: str, reason: str, restarts: int, own: int, word: str) -> None:
    assert parse_job_state(JOB.format(state, reason, restarts), own) == word


def test_no_description_of_the_job_means_unknown() -> None:
    assert parse_job_state("", 0) == "unknown"


def write_records(run_dir: Path, *records: tuple[str, str, dict]) -> None:
    for event, attempt, values in records:
        outcome.record(run_dir, event, attempt, **values)


def test_only_the_same_jobs_attempts_count_and_a_lost_one_is_no_failure(tmp_path: Path) -> None:
    write_records(
        tmp_path,
        ("start", "6.0-aaaaaa", {"step": 0}),
        ("end", "6.0-aaaaaa", {"step": 0, "failed": True}),
        ("start", "7.0-aaaaaa", {"step": 0}),
        ("end", "7.0-aaaaaa", {"step": 5, "failed": False}),
        ("start", "7.1-aaaaaa", {"step": 5}),  # its node was lost: no end
        ("start", "7.2-aaaaaa", {"step": 9}),
    )
    assert outcome.earlier_attempts(tmp_path, "7.2-aaaaaa") == [Ended(False, True), Ended(False, True)]


def test_a_line_cut_short_does_not_hide_the_others(tmp_path: Path) -> None:
    write_records(tmp_path, ("start", "7.0-aaaaaa", {"step": 3}))
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "end", "att')
    assert outcome.start_step(tmp_path, "7.0-aaaaaa") == 3
    assert [entry["event"] for entry in outcome.recorded(tmp_path, "start", "end")] == ["start"]


def test_the_newest_checkpoint_ignores_unfinished_and_damaged_ones(tmp_path: Path) -> None:
    for name in ("step_00000012", "step_00000020.tmp-7.0-aaaaaa", "step_00000019.corrupt", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


def test_the_status_of_another_attempt_is_ignored(tmp_path: Path) -> None:
    """On a lost node a trainer may still run, and write its status when the next attempt has started."""
    plan = LaunchPlan(
        backend="slurm", attempt="7.1-bbbbbb", run_dir=str(tmp_path), workdir="/", python=sys.executable,
        command=(), resume_argv=(), device="cpu", num_nodes=1, procs_per_node=1,
    )  # fmt: skip
    write_records(tmp_path, ("start", "7.1-bbbbbb", {"step": 0}))
    write_status(tmp_path, "finished", step=9, attempt="7.0-aaaaaa")
    assert local.conclude(plan, 1, "running").failed
    write_status(tmp_path, "finished", step=9, attempt="7.1-bbbbbb")
    assert local.conclude(plan, 1, "running").action == "done"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "running", "step": "many"}'])
def test_an_unreadable_status_is_no_status(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_status_survives_the_way_to_disk(tmp_path: Path) -> None:
    write_status(tmp_path, "failed", step=3, reason="preflight", message="n2 is gone", attempt="7.0-aaaaaa")
    found = read_status(tmp_path)
    assert found
    assert replace(found, time="") == Status("failed", "preflight", 3, "7.0-aaaaaa", "n2 is gone")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_the_rank_that_failed_first_has_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its node may not be the first, others fail because of it, and what it printed is not trusted."""
    files, attempt = RunDir(tmp_path), "7.0-abcdef"
    plan = LaunchPlan(
        backend="slurm",
        attempt=attempt,
        run_dir=str(tmp_path),
        workdir="/",
        python="/python",
        command=(),
        resume_argv=(),
        device="cpu",
        num_nodes=2,
        procs_per_node=2,
    )
    files.logs_of(attempt).mkdir(parents=True)
    for rank, seconds in ((0, 7.5), (3, 7.0)):
        write_record(files.rank_failure(attempt, rank), {"rank": rank, "how": f"rank {rank} ended", "time": seconds})
    files.rank_failure(attempt, 1).write_text('{"rank": "1", "time": 0}')
    files.rank_log(attempt, 3).write_bytes(
        b"first\n" + b"\n".join(b"line %d" % i for i in range(30)) + b"\n\x1b[2J\xff\n"
    )
    local.print_last_words(plan)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"launcher: rank 3 ended; {files.rank_log(attempt, 3)} ends with:"
    assert lines[1] == "  | line 11"
    assert lines[-1] == "  | \\x1b[2J\ufffd"


def test_the_logs_of_old_attempts_go(tmp_path: Path) -> None:
    attempts = [f"7.{restart}-abcdef" for restart in range(12)]
    for attempt in (*attempts, "kept"):
        RunDir(tmp_path).logs_of(attempt).mkdir(parents=True)
    outcome.record(tmp_path, "start", "../kept")
    for attempt in attempts:
        outcome.record(tmp_path, "start", attempt)
    local.remove_old_logs(tmp_path)
    assert sorted(path.name for path in RunDir(tmp_path).logs.iterdir()) == sorted([*attempts[-10:], "kept"])
