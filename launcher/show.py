"""Prints what a launch would do: as text, or as JSON for programs."""

from __future__ import annotations

import json
import shlex
from typing import Any

from launcher import machine
from launcher.launch_plan import LaunchPlan
from launcher.node import agent_argv, agent_env
from launcher.node_script import step_words
from simclr_dist.safe_text import masked, masked_json


def as_dict(plan: LaunchPlan, start: list[list[str]]) -> dict[str, Any]:
    """start: the command lines of the backend, one for each node or one for all."""
    ifname = plan.ifname or "INTERFACE"
    files = [str(plan.files.launch_plan), str(plan.files.attempts)]
    files += [f"{plan.files.logs}/"] if plan.backend == "slurm" else []
    files += [f"{plan.code}/"] if plan.code else []
    return {
        "plan": plan.as_json(),
        "start": start,
        **({"step": step_words(plan)} if plan.backend == "slurm" else {}),
        "files": files,
        "agents": [[plan.python_on_nodes, *agent_argv(plan, rank)[1:]] for rank in range(plan.num_nodes)],
        "environment": masked(agent_env(plan, ifname, machine.num_cpus(), {})),
    }


def as_text(shown: dict[str, Any]) -> str:
    plan = shown["plan"]
    hosts = plan["hosts"] or [f"node {rank}" for rank in range(plan["num_nodes"])]
    nodes = f"{plan['num_nodes']} node{'s' if plan['num_nodes'] > 1 else ''}"
    world = plan["num_nodes"] * plan["procs_per_node"]
    lines = [
        f"{plan['backend']}: {nodes} x {plan['procs_per_node']} processes = {world} on {plan['device']}",
        f"run directory: {plan['run_dir']}",
        f"started in:    {plan['workdir']}",
        f"head address:  {plan['head_addr'] or 'found when the job starts'}",
        f"port:          {plan['port'] or 'a free one, chosen at the start'}",
        f"stop signal:   {plan['stop_signal']}",
        f"failures:      {plan['max_failures']} in a row are forgiven while each makes progress",
        *around_python(plan),
        "",
        "files:",
        *(f"  {name}" for name in shown["files"]),
        "",
        "started here:",
        *(f"  {shlex.join(argv)}" for argv in shown["start"]),
        "",
        "becomes on each node:",
    ]
    for host, argv in zip(hosts, shown["agents"], strict=True):
        lines += [f"  {host}:", f"    {shlex.join(argv)}"]
    lines += ["", "environment set for the workers:"]
    lines += [f"  {name}={value}" for name, value in shown["environment"].items()]
    return "\n".join(lines)


def around_python(plan: dict[str, Any]) -> list[str]:
    """What a node has besides the interpreter, where there is something."""
    found = [
        ("code", plan["code"]),
        ("nodes", "shared with other jobs" if plan["shared"] else ""),
        *(("set-up line", line) for line in plan["setup"]),
        ("container", plan["container"]),
        *(("bound there", folder) for folder in plan["binds"]),
        ("interpreter", plan["node_python"]),
    ]
    return [f"{f'{what}:':15}{value}" for what, value in found if value]


def print_shown(shown: dict[str, Any], as_json: bool) -> None:
    """Without secrets: command lines and set-up lines may hold some that an earlier version let pass."""
    shown = masked_json(shown)
    print(json.dumps(shown, indent=1) if as_json else as_text(shown))
