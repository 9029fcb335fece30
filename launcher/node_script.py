"""What a SLURM step runs on each node before Python: set-up lines and a container.

    srun … [--container-image=… of Pyxis] bash -c SCRIPT
           SCRIPT: set-up lines ▶ [apptainer exec … IMAGE] python -m launcher node --plan RUN/plan.json

Set-up lines are shell text on purpose; all else is data, and quoted. With Pyxis they run inside the container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from launcher.errors import LaunchError
from launcher.launch_plan import LaunchPlan, one_line, shell_text
from simclr_dist.bounded_json import parse_json
from simclr_dist.config import Config
from simclr_dist.run.layout import newest_step
from simclr_dist.run.status import Status
from simclr_dist.source_text import places

# ---------------------------------------------------------------------------------------------------------------------
# Options of the command line. All raise LaunchError, with what to type.


def setup_commands(text: str) -> list[str]:
    """The commands of a shell text one by one, so that one that fails can be named; `if … fi` is one command."""
    commands: list[str] = []
    lines: list[str] = []
    complaint = ""
    for line in text.splitlines():
        lines.append(line)
        command = "\n".join(lines)
        if not command.strip() or re.fullmatch(r"\s*#.*", command):
            lines = []
        elif not (complaint := _syntax_error(command)):
            commands.append(shell_text(command))
            lines = []
    if lines:
        raise LaunchError(f"set-up line {lines[0]!r}: bash does not understand it: {complaint}")
    return commands


def _syntax_error(command: str) -> str:
    """What bash says; empty for a complete command. An unfinished here-document is only a warning to it."""
    if command.endswith("\\"):
        return "the last line ends with a backslash"
    # Nothing else may be said: a missing locale would be.
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = subprocess.run(["bash", "-n", "-c", command], env=env, capture_output=True, text=True, check=False)
    return done.stderr.partition("\n")[0]


def setup_file(path: str) -> list[str]:
    try:
        return setup_commands(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--setup-file {path}: cannot be read: {error}") from None


def kept_setup(text: str) -> list[str]:
    """From a JSON list, in which they fit into one word."""
    return [shell_text(str(command)) for command in parse_json(text)]


def container(spec: str) -> str:
    """RUNTIME:IMAGE, checked."""
    runtime, _, image = spec.partition(":")
    if spec.endswith(".sif") and runtime not in ("apptainer", "pyxis"):
        runtime, image = "apptainer", spec
    if runtime not in ("apptainer", "pyxis") or not image:
        raise LaunchError(
            f"--container {spec}: write apptainer:FILE.sif (or a folder), or pyxis:IMAGE (as srun's --container-image)"
        )
    one_line("--container", image)
    if runtime == "pyxis" and not ("/" in image and os.path.exists(image)):
        return spec
    if "://" in image:
        raise LaunchError(
            f"--container {spec}: every node would build it again; build it once, "
            f"`apptainer build image.sif {image}`, then --container image.sif"
        )
    if not os.path.exists(image):
        raise LaunchError(f"--container {spec}: {os.path.abspath(image)} is not there")
    return f"{runtime}:{os.path.abspath(image)}"


def bind(spec: str) -> str:
    """FOLDER:INSIDE, both absolute, from FOLDER or FOLDER:INSIDE."""
    outside, _, inside = spec.partition(":")
    outside = os.path.abspath(outside)
    inside = inside or outside
    if not os.path.exists(outside):
        raise LaunchError(f"--bind {spec}: {outside} is not there")
    if not inside.startswith("/"):
        raise LaunchError(f"--bind {spec}: {inside}: the place inside the container must be an absolute path")
    return f"{_bindable(outside)}:{_bindable(inside)}"


def _bindable(path: str) -> str:
    if re.search(r"[,:\\]", one_line("folder for the container", path)):
        raise LaunchError(f"{path}: commas, colons and backslashes separate paths for containers; rename it")
    return path


def binds(config: Config | None, needed: Iterable[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """FOLDER:INSIDE for what the training reads and writes, at the same paths, and then those that were chosen."""
    data = (config.data.train, config.data.test, config.evaluation.train) if config else ()
    files = [os.path.abspath(path) for source in data if source for path in places(source)]
    # What a link leads to has to be there, too.
    folders = {path for name in needed for path in (name, os.path.realpath(name))}
    folders |= {os.path.dirname(path) for name in files for path in (name, os.path.realpath(name))}
    kept: list[str] = []
    for path in sorted(folders):
        if not any(Path(path).is_relative_to(around) for around in kept):
            kept.append(_bindable(path))
    return (*(f"{path}:{path}" for path in kept), *chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The step

FAILED = """\
simclr_failed() {  # $1: what went wrong; $2: the same for JSON
  trap - EXIT
  local node="${SLURMD_NODENAME:-$HOSTNAME}"
  echo "launcher: $node: $1" >&2
  printf '%s%s: %s"}\\n' "$simclr_status" "$node" "$2" > "$simclr_status_file"
  exit 2
}
"""
SETUP = """\
type module > /dev/null 2>&1 || for simclr_file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
  [ ! -r "$simclr_file" ] || . "$simclr_file"  # elsewhere only interactive shells know `module`
done
simclr_setup_failed() {
  local what="set-up line ended with exit code $1: "
  simclr_failed "$what$simclr_line" "$what$simclr_json"
}
trap 'simclr_setup_failed $?' EXIT
trap 'trap - EXIT; exit 143' TERM  # ended from outside: no line has failed
"""
QUIET = "trap '' USR1 USR2; set +eu +o pipefail"  # a stop signal may come before Python runs; hooks use unset variables
RAN = "SIMCLR_NODE_SCRIPT"
"""By this variable `launcher node` knows that this attempt's script has run."""


def step_words(plan: LaunchPlan, rocm: bool = False) -> list[str]:
    """What follows srun's own options. rocm: the nodes have GPUs of AMD."""
    words = ["bash", "-c", script(plan, rocm), "launcher"]
    runtime, _, image = plan.container.partition(":")
    if runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(plan.binds)}"] if plan.binds else []
        words = [f"--container-image={image}", *mounts, f"--container-workdir={plan.workdir}", *words]
    return words


def script(plan: LaunchPlan, rocm: bool = False) -> str:
    quote = shlex.quote
    status = Status("failed", "config_error", newest_step(plan.files.path), plan.attempt)
    values = {key: value for key, value in asdict(status).items() if key != "message"}
    head = json.dumps({**values, "message": ""}).removesuffix('"}')
    there = f"cd {quote(plan.workdir)}"
    lines = [QUIET, there, f"simclr_status={quote(head)} simclr_status_file={quote(str(plan.files.status))}", FAILED]
    lines += [SETUP] if plan.setup else []
    for command in plan.setup:
        first, more, _ = command.partition("\n")
        shown = f"{first} …" if more else first
        lines += [
            f"simclr_line={quote(shown)} simclr_json={quote(json.dumps(shown)[1:-1])}",
            f"eval {quote(command)} < /dev/null",
            f"simclr_code=$?; {QUIET}; [ $simclr_code = 0 ] || simclr_setup_failed $simclr_code",
        ]
    lines += ["trap - EXIT TERM", there, f"export {RAN}={plan.attempt}"]
    if plan.code:
        lines += [
            _unless(f"[ -O {quote(plan.code)} ]", f"{plan.code}: the code of this run is gone, or is not yours"),
            f'export PYTHONPATH={quote(plan.code)}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
        ]
    python = plan.python_on_nodes
    launch = [python, "-m", "launcher", "node", "--plan", str(plan.path)]
    runtime, _, image = plan.container.partition(":")
    if runtime == "apptainer":
        gpu = [] if plan.device == "cpu" else ["--rocm"] if rocm else ["--nv"]
        folders = ["--bind", ",".join(plan.binds)] if plan.binds else []
        missing = "neither apptainer nor singularity is there; load it with --setup 'module load apptainer'"
        lines += [
            _unless("simclr_run=$(type -P apptainer || type -P singularity)", missing),
            _unless(f"[ -e {quote(image)} ]", f"--container {image} is not there"),
            'export PYTHONNOUSERSITE="${PYTHONNOUSERSITE-1}"',  # packages in the home directory are for another Python
            f'exec "$simclr_run" {shlex.join(["exec", *gpu, *folders, "--pwd", plan.workdir, image, *launch])}',
        ]
    else:
        missing = f"no interpreter {python} after the set-up lines; name one with --node-python"
        lines += [_unless(f"type -P {quote(python)} > /dev/null", missing), f"exec {shlex.join(launch)}"]
    return "\n".join(lines)


def _unless(condition: str, problem: str) -> str:
    return f"{condition} || simclr_failed {shlex.quote(problem)} {shlex.quote(json.dumps(problem)[1:-1])}"
