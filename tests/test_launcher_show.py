"""What `show` prints (golden files), and arguments that are unlucky or hostile. Run: pytest tests/test_launcher_show.py

REGOLD=1 writes the golden files anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from launcher import __main__ as cli
from launcher import build, slurm, sweep
from launcher.arguments import parse
from launcher.errors import LaunchError
from launcher.launch_plan import checked_env, masked, shell_text
from simclr_dist.errors import ConfigError
from tests.launcher_checkout import Checkout, make_checkout

GOLDEN = Path(__file__).parent / "golden" / "launcher"
CONFIG = "fake.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


# -- golden files -----------------------------------------------------------------------------------------------------

SHOWN = {
    "local": ["local", CONFIG, "seed=1", "--nproc", "2", "--env", "NOTE=x y"],
    "slurm": ["slurm", CONFIG, "--nodes=2", "--nproc=4", "--gpus-per-node=4", "--time=1-0", "--sbatch-arg=--nice=5"],
    "slurm_sweep": ["slurm", CONFIG, "--sweep", "sweep.yaml", "--partition=gpu", "--no-requeue"],
    "local_sweep": ["local", CONFIG, "--nproc=1", "--sweep", "sweep.yaml", "--jobs=2"],
    "hosts_odd": ["hosts", CONFIG, "--hostfile", "hosts.txt", "--device=cpu", "runs_dir='it''s $HOME, \"100%x\"'"],
    "hosts": ["hosts", CONFIG, "--hostfile", "hosts.txt", "--device", "cuda", "name=test"],
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("form", ["txt", "json"])
def test_show_prints_what_the_golden_file_says(checkout: Checkout, name: str, form: str) -> None:
    (checkout.root / "sweep.yaml").write_text("grid: {seed: [1, 2], optim.base_lr: [0.1, 1.0e-3]}")
    (checkout.root / "hosts.txt").write_text("# two nodes\nnode1 slots=2 addr=10.0.0.1\nnode2 slots=2\n")
    done = checkout.launch("show", *SHOWN[name], *(["--json"] if form == "json" else []))
    assert done.returncode == 0, done.stderr
    assert not (checkout.root / "runs").exists()
    if form == "json":
        json.loads(done.stdout)
    shown = done.stdout.replace(str(checkout.root), "/CHECKOUT").replace(
        str(Path(sys.executable).absolute()), "/PYTHON"
    )
    shown = re.sub(r"code/[0-9a-f]{16}", "code/DIGEST", shown)
    path = GOLDEN / f"{name}.{form}"
    shown = "\n".join(line for line in shown.splitlines() if "OMP_NUM_THREADS" not in line) + "\n"  # the machine's
    if os.environ.get("REGOLD"):
        path.write_text(shown)
    assert shown == path.read_text()


def test_dry_run_is_show(checkout: Checkout) -> None:
    shown = checkout.launch("show", "slurm", CONFIG, "--nodes=2").stdout
    assert checkout.launch("slurm", CONFIG, "--nodes=2", "--dry-run").stdout == shown != ""


# -- hostile and unlucky arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--nproc", "0"], ["--nproc", "two"], ["stray"], ["--max-failures=-1"], ["--no-such"]]
)
def test_a_wrong_command_line_is_refused_by_name(checkout: Checkout, words: list[str]) -> None:
    done = checkout.launch("local", CONFIG, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert words[-1].partition("=")[0] in done.stderr or words[0] in done.stderr


@pytest.mark.parametrize("name", ["../x", "a/b", "%x", "-rf", "a b", "a\nb", "$(touch pwned)", "a;b", "é", "x" * 65])
def test_run_names_cannot_leave_their_folder_or_become_options(checkout: Checkout, name: str) -> None:
    done = checkout.launch("show", "slurm", CONFIG, f"name={name}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "value", ["runs x", "it's", 'say "runs"', "a,b", "$(touch pwned)", "%x-%j", "a;b", "`id`", "-n"]
)
def test_strange_paths_stay_single_words(checkout: Checkout, value: str) -> None:
    done = checkout.launch("show", "slurm", CONFIG, f"runs_dir='{value}'".replace("it's", "it''s"), "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    run_dir = str(checkout.root / value / "fake")
    assert shown["plan"]["run_dir"] == run_dir
    assert f"--output={run_dir.replace('%', '%%')}/logs/slurm-%j.out" in shown["start"][0]


BACKENDS = ("local", "slurm", "hosts")
ODD = ["two words", "it's", 'say "hi"', "a,b", "100%x-%j", "-rf", "--wrap=id", "$(touch pwned)", "`id`", "a;b&c|d", "*"]


def shown_json(capsys: pytest.CaptureFixture[str], backend: str, *words: str) -> dict:
    hostfile = ["--hostfile=hosts.txt"] if backend == "hosts" else []
    assert cli.main(["show", backend, *words, *hostfile, "--device=cpu", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.fixture
def inside(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """The checkout, as working directory of this process."""
    (checkout.root / "hosts.txt").write_text("node1 addr=10.0.0.1\nnode2\n")
    monkeypatch.chdir(checkout.root)
    return checkout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("odd", ODD)
def test_an_override_arrives_as_one_word(
    inside: Checkout, capsys: pytest.CaptureFixture[str], backend: str, odd: str
) -> None:
    setting = f"runs_dir={json.dumps(odd)}"
    shown = shown_json(capsys, backend, CONFIG, setting)
    run_dir = str(inside.root / odd / "fake")
    assert shown["plan"]["run_dir"] == run_dir
    assert all(argv[-1] == setting for argv in shown["agents"])
    started = shown["start"][0]
    if backend == "slurm":
        assert started[-1] == setting
    elif backend == "local":
        assert started[-1] == f"{run_dir}/plan.json"
    else:
        remote = subprocess.run(
            ["sh", "-c", started[-1].replace("env ", "printf '%s\\n' ", 1)], capture_output=True, text=True, check=True
        )
        assert f"{run_dir}/plan.json" in remote.stdout.splitlines()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("odd", [odd for odd in ODD if not odd.startswith("-")])
def test_a_configuration_may_lie_anywhere(
    inside: Checkout, capsys: pytest.CaptureFixture[str], backend: str, odd: str
) -> None:
    (inside.root / odd).mkdir()
    path = inside.root / odd / "-c.yaml"
    path.write_text((inside.root / CONFIG).read_text())
    shown = shown_json(capsys, backend, f"{odd}/-c.yaml")
    expected = f"{shown['plan']['code']}/config/-c.yaml" if backend == "slurm" else str(path)
    assert all(argv[-1] == expected for argv in shown["agents"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "words",
    [
        ("--wrap=id",),
        ("-x=1",),
        ("runs_dir=a\nb",),
        ('runs_dir="a\\nb"',),
        ("name=a,b",),
        ("name='a''b'",),
        ('name="x y"',),
        ("name=%x",),
        ("name=--x",),
        ("--env=A=b\nc",),
    ],
)
def test_arguments_that_could_act_as_options_are_refused_on_every_backend(
    inside: Checkout, capsys: pytest.CaptureFixture[str], backend: str, words: tuple[str, ...]
) -> None:
    hostfile = ["--hostfile=hosts.txt"] if backend == "hosts" else []
    try:
        code = cli.main(["show", backend, CONFIG, *words, *hostfile, "--device=cpu"])
    except SystemExit as left:  # argparse
        code = int(str(left.code))
    assert code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("word", ["seed=1\n#SBATCH --wrap=id", "seed=\x1b[2J", "seed=1\r"])
def test_control_characters_are_refused(checkout: Checkout, word: str) -> None:
    done = checkout.launch("show", "slurm", CONFIG, word)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--wrap=id", "train.sh"),
        ("--ntasks=8", "--nproc"),
        ("--array=1-3", "--sweep"),
        ("--export=ALL,A=b", "--env"),
        ("-N4", "expected --option"),
        ("nodes=2", "expected --option"),
        ("--comment=a\nb", "control characters"),
    ],
)
def test_sbatch_options_that_would_break_the_job_are_refused(checkout: Checkout, option: str, hint: str) -> None:
    done = checkout.launch("show", "slurm", CONFIG, f"--sbatch-arg={option}")
    assert done.returncode == 2
    assert hint in done.stderr


@pytest.mark.parametrize(
    "setting",
    [
        *("RANK=0", "MASTER_ADDR=x", "PET_NNODES=3", "SIMCLR_ATTEMPT=x", "A B=c", "NOVALUE", "=x", "A=b\nc"),
        *("HF_TOKEN=x", "GITHUB_PAT=x", "PROXY_AUTH=x", "SLACK_WEBHOOK_URL=x", "SENTRY_DSN=x", "GOOGLE_CREDENTIALS=x"),
        *("HTTPS_PROXY=http://me:pw@proxy:3128", "DATABASE_URL=postgres://me@db/x", f"MINE=hf_{'a' * 30}"),
    ],
)
def test_environment_that_would_break_or_leak_is_refused(setting: str) -> None:
    with pytest.raises(LaunchError):
        checked_env([setting])


def test_environment_values_are_kept_whole_and_secrets_masked() -> None:
    assert checked_env(["A=b,c d='e'=f", "B="]) == {"A": "b,c d='e'=f", "B": ""}
    assert masked({"WANDB_API_KEY": "s3cret", "A": "b"}) == {"A": "b", "WANDB_API_KEY": "***"}
    assert masked({"PROXY": "http://me:pw@proxy:3128"}) == {"PROXY": "http://***@proxy:3128"}
    plain = {"PATH": "/a@b:/c", "AUTHOR": "me", "PATTERN": "x", "URL": "https://host/a@b", "SEED": "3", "COMPASS": "n"}
    assert masked(plain) == checked_env([f"{name}={value}" for name, value in plain.items()]) == plain


@pytest.mark.parametrize(
    "line", ["export WANDB_API_KEY=abc", "export A=1 HTTP_PROXY=http://u:p@h", "git_pat='x' conda x"]
)
def test_secrets_in_set_up_lines_are_refused(line: str) -> None:
    """They stand on sbatch's command line, which everybody can read."""
    with pytest.raises(LaunchError, match="looks like a secret"):
        shell_text(line)
    assert shell_text("export WANDB_API_KEY=$(cat ~/.key) KEY_DIR='$HOME/keys' A=b")


def test_jobs_get_no_tokens_from_the_login_shell_and_nothing_of_a_job_around_it() -> None:
    shell = {"PATH": "/bin", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "NCCL_DEBUG": "INFO", "TMPDIR": "/tmp/x"}
    defaults = {
        "SBATCH_ACCOUNT": "mine",
        "SBATCH_PARTITION": "gpu",
        "SBATCH_TIMELIMIT": "60",
        "APPTAINER_BIND": "/data",
    }
    assert slurm.passed_on({**shell, **defaults}).keys() == {
        *("PATH", "NCCL_DEBUG", "TMPDIR", "SIMCLR_PYTHON"),
        *defaults,
    }
    around = dict.fromkeys(("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_CPUS_PER_TASK"), "1")
    around |= dict.fromkeys(("SBATCH_MEM_BIND", "SBATCH_CPU_BIND_TYPE", "SBATCH_EXPORT", "SBATCH_ARRAY_INX"), "1")
    around |= {"SIMCLR_ATTEMPT": "7.0-abcdef", "SIMCLR_EXPECTED_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0"}
    inside = slurm.passed_on({**shell, **defaults, **around})
    assert inside.keys() == {"PATH", "NCCL_DEBUG", "SIMCLR_PYTHON", *defaults}


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--gres=gpu:2"], "write --sbatch-arg=--gres=gpu:2"),
        (["--gres", "gpu:2"], "write --sbatch-arg=--gres=gpu:2"),
        (["--gpus=8"], "write --sbatch-arg=--gpus=8"),
        (["--gpus", "8"], "write --sbatch-arg=--gpus=8"),
        (["--mem-per-cpu=2G"], "write --sbatch-arg=--mem-per-cpu=2G"),
        (["--mail-type", "ALL"], "write --sbatch-arg=--mail-type=ALL"),
        (["--hold"], "write --sbatch-arg=--hold"),
        (["-N", "2"], "write --nodes=2"),
        (["-N2"], "write --nodes=2"),
        (["-pgpu"], "write --partition=gpu"),
        (["-G4"], "write --sbatch-arg=--gpus=4"),
        (["--array=0-3"], "use --sweep"),
        (["--ntasks", "8"], "use --nproc"),
        (["--max-failure=2"], "did you mean --max-failures?"),
        (["--nodes=3-2"], "expected N or MIN-MAX"),
        (["--nodes=0"], "expected N or MIN-MAX"),
        (["--shared"], "--cpus-per-task=… --mem=… --gpus-per-node=… (or --device=cpu)"),
        (["--shared", "--cpus-per-task=2", "--sbatch-arg=--gres=gpu:1"], "of each node: --mem=…"),
        (["--container=pytorch"], "write apptainer:FILE.sif"),
        (["--setup=if true"], "bash does not understand it"),
        (["--setup-file=none"], "--setup-file none: cannot be read"),
    ],
)
def test_an_option_of_sbatch_is_answered_with_what_to_type(
    inside: Checkout, capsys: pytest.CaptureFixture[str], words: list[str], typed: str
) -> None:
    for line in (["slurm", CONFIG, *words], ["show", "slurm", *words, CONFIG]):
        try:
            code = cli.main(line)
        except SystemExit as left:  # argparse
            code = int(str(left.code))
        shown = capsys.readouterr()
        assert (code, shown.out) == (2, "")
        assert typed in shown.err


@pytest.mark.parametrize(
    ("words", "procs"),
    [
        ([], None),
        (["--gpus-per-node=4"], 4),
        (["--gpus-per-node=a100:4"], 4),
        (["--gpus-per-node=a100:3,v100:1"], 4),
        (["--sbatch-arg=--gres=gpu:2"], 2),
        (["--sbatch-arg=--gres=nvme:1,gpu:a100:2"], 2),
        (["--sbatch-arg=--gres=gpu"], 1),
        (["--sbatch-arg=--gres=nvme:1"], None),
        (["--sbatch-arg=--gpus-per-task=4"], 4),
        (["--sbatch-arg=--gpus=8"], 4),
        (["--sbatch-arg=--gpus=a100:8"], 4),
        (["--sbatch-arg=--gpus=7"], None),
        (["--gpus-per-node=4", "--nproc=2"], 2),
        (["--device=cpu"], 1),
    ],
)
def test_processes_are_known_before_the_queue_where_the_command_line_says_them(
    words: list[str], procs: int | None
) -> None:
    assert slurm.planned_procs(parse(["slurm", CONFIG, "--nodes=2", *words])) == procs


def test_every_number_of_nodes_that_the_job_may_get_must_divide_the_batch(
    inside: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_json(capsys, "slurm", CONFIG, "--nodes=1-2", "--nproc=2")
    assert (shown["plan"]["num_nodes"], "--nodes=1-2" in shown["start"][0]) == (2, True)
    assert cli.main(["show", "slurm", CONFIG, "--nodes=2-4", "--nproc=1", "--device=cpu"]) == 2
    assert "8 does not divide over 3 processes" in capsys.readouterr().err


def test_a_job_that_shares_its_nodes_has_a_script_without_exclusive(
    inside: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    script = inside.root / "slurm" / "train.sh"
    assert b"\n#SBATCH --exclusive" in script.read_bytes()
    args = parse(["slurm", CONFIG, "--shared", "--cpus-per-task=2", "--mem=1G", "--device=cpu", "--no-snapshot"])
    changed = slurm.script_for(args, script)
    assert changed is not None
    assert [line for line in script.read_bytes().splitlines() if line not in changed.splitlines()] == [
        next(line for line in script.read_bytes().splitlines() if line.startswith(b"#SBATCH --exclusive"))
    ]
    submission = slurm.prepare(args)
    assert submission.kept is not None
    assert list(submission.kept.files) == ["slurm/train.sh"]
    assert f"{submission.kept.path}/slurm/train.sh" in submission.command
    assert not any(word.startswith("--code") for word in submission.command)


def test_a_task_of_an_array_remembers_how_it_was_submitted(inside: Checkout) -> None:
    (inside.root / "sweep.yaml").write_text("list: [{seed: 1}]")
    words = (
        "--sweep=sweep.yaml",
        "--time=1-0",
        "--gpus-per-node=2",
        "--sbatch-arg=--nice=5",
        "--setup=a 'b'",
        "--nodes=1",
    )
    submission = slurm.prepare(parse(["slurm", CONFIG, *words]))
    at = next(at for at, word in enumerate(submission.command) if word.endswith("train.sh"))
    code = submission.args.code
    job = parse(["job", *submission.command[at + 1 :]])
    assert job.submitted == ["--nodes=1", "--time=1-0", "--gpus-per-node=2", "--sbatch-arg=--nice=5"]
    assert (job.setup, job.code, job.sweep) == (["a 'b'"], code, f"{code}/sweep/sweep.yaml")
    again = parse(
        ["slurm", *job.submitted, *slurm.job_arguments(sweep.at_point(args_at(job, inside), [["seed=1"]], 0))]
    )
    assert (again.time, again.gpus_per_node, again.sbatch_arg, again.setup) == ("1-0", "2", ["--nice=5"], ["a 'b'"])
    assert (again.sweep, again.overrides) == (None, ["seed=1", "name=fake-000"])


def args_at(job: argparse.Namespace, checkout: Checkout) -> argparse.Namespace:
    """Nothing has been written: with the configuration that would have been kept."""
    return argparse.Namespace(**{**vars(job), "config": str(checkout.root / CONFIG)})


def test_pyxis_is_missed_before_the_queue_and_its_interpreter_is_shown(
    inside: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    srun = inside.root / "srun"
    monkeypatch.setenv("PATH", str(inside.root), prepend=os.pathsep)
    for options, code in (("--nodes", 2), ("--container-image=", 0)):
        srun.write_text(f"#!/bin/sh\necho ' {options}'\n")
        srun.chmod(0o755)
        found = cli.main(["show", "slurm", CONFIG, "--container=pyxis:nvidia/pytorch", "--device=cpu"])
        shown = capsys.readouterr()
        assert (found, "Pyxis is not installed" in shown.err) == (code, code == 2), shown.err
    assert "container:     pyxis:nvidia/pytorch" in shown.out
    assert "\n    python3 -m accelerate" in shown.out


@pytest.mark.parametrize(
    ("script", "problem", "said"),
    [
        ('print(\'{"what": "network", "problem": "unknown encoder"}\')', "unknown encoder", ""),
        ('print(\'{"what": "checkpoints", "problem": "the owner lives"}\')', None, ""),
        ('raise ImportError("no torch on this login node")', None, "so the job will: ImportError: no torch"),
    ],
    ids=["wrong", "may change", "cannot be looked at"],
)
def test_a_job_is_checked_before_it_waits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    problem: str | None,
    said: str,
) -> None:
    (tmp_path / "preflight_here.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(build, "PREFLIGHT", "preflight_here")
    args = argparse.Namespace(config="fake.yaml", overrides=[], container=None, node_python=None)
    with pytest.raises(ConfigError, match=problem) if problem else nullcontext():
        build.check_before_the_queue(args)
    assert said in capsys.readouterr().err
