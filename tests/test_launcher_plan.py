"""Launch plans: what they hold and refuse, how nodes find each other, and that the launcher needs no torch.

Run: pytest tests/test_launcher_plan.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import __main__ as cli
from launcher import hosts, machine, node, rollcall
from launcher.arguments import EPILOG
from launcher.errors import Exit, LaunchError
from launcher.hosts import Host
from launcher.launch_plan import LaunchPlan, read_launch_plan, write_launch_plan
from tests.launcher_checkout import REPOSITORY, Checkout, make_checkout

CONFIG = "fake.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    return LaunchPlan(
        backend="slurm",
        attempt="7.0-abcdef",
        run_dir=str(tmp_path / "run"),
        workdir=str(tmp_path),
        python=sys.executable,
        command=("-m", "simclr_dist.train", "c.yaml"),
        resume_argv=("slurm", "c.yaml"),
        device="cpu",
        num_nodes=2,
        procs_per_node=2,
        hosts=("n1", "n2"),
        head_addr="127.0.0.1",
        port=20001,
    )


# -- a quick start ----------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import importlib, pkgutil, sys
for name in ("torch", "numpy", "accelerate", "torchvision"):
    sys.modules[name] = None
import launcher
for module in pkgutil.iter_modules(launcher.__path__):
    if module.name != "__main__":
        importlib.import_module("launcher." + module.name)
from launcher.__main__ import main
sys.exit(main(["show", "local", sys.argv[1], "--nproc", "2"]))
"""


def test_the_launcher_works_with_torch_blocked(checkout: Checkout) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, CONFIG],
        cwd=checkout.root,
        env=checkout.env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    # Half a second is the promise; what costs time is imports, and those can be counted on any machine.
    code = "import sys, launcher.__main__, launcher.arguments as a; a.parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert not {"torch", "accelerate", "numpy", "pydantic", "yaml", "rich", "psutil"} & set(loaded)
    assert len(loaded) < 200


# -- the plan file ----------------------------------------------------------------------------------------------------


def test_a_plan_survives_the_way_to_disk(plan: LaunchPlan) -> None:
    path = write_launch_plan(replace(plan, env={"A": "b, c"}))
    assert read_launch_plan(path) == replace(plan, env={"A": "b, c"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert Path(plan.run_dir).stat().st_mode & 0o007 == 0


def test_a_plan_of_an_earlier_version_is_read(plan: LaunchPlan) -> None:
    """Its key for resume_argv is `again`, and stays so: an earlier version reads a new file, too."""
    path = write_launch_plan(plan)
    values = json.loads(path.read_text())
    assert values["again"] == ["slurm", "c.yaml"]
    assert "resume_argv" not in values
    assert read_launch_plan(path).resume_argv == ("slurm", "c.yaml")


def test_a_plan_that_others_can_write_is_refused(plan: LaunchPlan) -> None:
    path = write_launch_plan(plan)
    path.chmod(0o620)
    with pytest.raises(LaunchError, match="others may write"):
        read_launch_plan(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_plan_of_another_user_is_refused(plan: LaunchPlan) -> None:
    path = write_launch_plan(plan)
    os.chown(path, 12345, -1)
    with pytest.raises(LaunchError, match="belongs to user 12345"):
        read_launch_plan(path)


def test_a_plan_behind_a_link_or_of_another_version_is_refused(plan: LaunchPlan, tmp_path: Path) -> None:
    path = write_launch_plan(plan)
    (tmp_path / "link.json").symlink_to(path)
    with pytest.raises(LaunchError):
        read_launch_plan(tmp_path / "link.json")
    path.write_text(json.dumps({"evil": 1}))
    with pytest.raises(LaunchError, match="not a launch plan"):
        read_launch_plan(path)


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": ("-oProxyCommand=touch pwned", "n2")},
        {"head_addr": "10.0.0.1; id"},
        {"ifname": "eth0 --x"},
        {"attempt": "../../x"},
        {"run_dir": "relative"},
        {"port": 22},
        {"stop_signal": "KILL"},
        {"command": ("a\nb",)},
        {"num_nodes": 0},
    ],
)
def test_malformed_plans_are_refused(plan: LaunchPlan, change: dict) -> None:
    with pytest.raises(LaunchError):
        replace(plan, **change)


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_the_node_rank_comes_from_the_step_and_is_never_guessed(plan: LaunchPlan) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    assert node.find_node_rank(plan, None, step) == 1
    assert node.find_node_rank(plan, 0, {}) == 0
    with pytest.raises(LaunchError, match="one task a node with one srun"):
        node.find_node_rank(plan, None, step | {"SLURM_STEP_NUM_NODES": "1"})  # srun -N1 -w n2
    with pytest.raises(LaunchError, match="ntasks-per-node=1"):
        node.find_node_rank(plan, None, step | {"SLURM_LOCALID": "1"})
    with pytest.raises(LaunchError, match="--node-rank"):
        node.find_node_rank(plan, None, {"SLURM_NODEID": "1"})  # the batch script's, not a step's


def test_the_users_own_settings_win_over_ours(plan: LaunchPlan) -> None:
    env = node.agent_env(replace(plan, env={"A": "b"}), "eth0", 8, {"GLOO_SOCKET_IFNAME": "ib0", "PMI_SIZE": "2"})
    assert (env["GLOO_SOCKET_IFNAME"], env["OMP_NUM_THREADS"], env["A"]) == ("ib0", "4", "b")
    assert "PMI_SIZE" not in env  # set by srun where MPI is the default; accelerate would take it for the world size


def _call_all(plan: LaunchPlan, reports: list[rollcall.Report], timeout_s: float) -> list[list[str]]:
    answers: list[list[str]] = [[] for _ in reports]

    def call(i: int) -> None:
        arguments = (plan.head_addr, plan.port, plan.attempt, reports[i])
        if reports[i].node_rank:
            answers[i] = rollcall.answer(*arguments, timeout_s)
        else:
            answers[i] = rollcall.listen(*arguments, plan.hosts, timeout_s)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _report(rank: int, **values: object) -> rollcall.Report:
    return rollcall.Report(rank, f"n{rank + 1}", clock=time.time(), **values)  # type: ignore[arg-type]


def test_roll_call_tells_every_node_the_same(plan: LaunchPlan) -> None:
    plan = replace(plan, port=machine.free_port("127.0.0.1", 1), num_nodes=3, hosts=("n1", "n2", "n3"))
    good = [_report(rank, versions={"torch": "2.15"}) for rank in range(3)]
    assert _call_all(plan, good, 20) == [[], [], []]
    bad = [good[0], _report(1, versions={"torch": "2.11"}), _report(2, versions={"torch": "2.15"}, problems=["1 GPU"])]
    answers = _call_all(plan, bad, 20)
    assert answers[0] == answers[1] == answers[2] == ["n3: 1 GPU", "n2 (node 1) has torch 2.11, but n1 has 2.15"]
    alike = [_report(rank, problems=["1 GPU", *(["no disk"] if rank else [])]) for rank in range(3)]
    assert _call_all(plan, alike, 20) == [["every node: 1 GPU", "n2: no disk", "n3: no disk"]] * 3


def test_roll_call_names_the_node_that_does_not_come(plan: LaunchPlan) -> None:
    plan = replace(plan, port=machine.free_port("127.0.0.1", 2), num_nodes=3, hosts=("n1", "n2", "n3"))
    answers = _call_all(plan, [_report(0), _report(2)], 1)
    assert answers[0] == answers[1]
    assert "no word from n2 (node 1)" in answers[0][0]


def test_roll_call_ignores_reports_of_another_attempt(plan: LaunchPlan) -> None:
    plan = replace(plan, port=machine.free_port("127.0.0.1", 3))
    stranger = replace(plan, attempt="7.9-abcdef")
    threading.Thread(target=_call_all, args=(stranger, [_report(1)], 1)).start()
    assert "no word from n2" in _call_all(plan, [_report(0)], 1.5)[0][0]


def _meet(reports: list[rollcall.Report], here: str = "mark", timeout_s: float = 20) -> list[rollcall.Met]:
    """What each node hears at a rendezvous; the first one is node 0, which sees marks called `here` only."""
    server = rollcall.open_server("", 0, "n1", 3)
    assert not isinstance(server, str)
    port, met = server.getsockname()[1], [rollcall.Met([])] * len(reports)

    def call(i: int) -> None:
        if i:
            time.sleep(0.05 * i)
            met[i] = rollcall.join("localhost", port, reports[i], timeout_s)
        else:
            met[i] = rollcall.receive(server, "7.0-abcdef", reports[i], 3, timeout_s, here.__eq__)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


def test_nodes_that_do_not_know_each_other_get_a_name_for_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = (_report(rank, mark="mark") for rank in range(3))
    met = _meet([first, *others])
    assert {(each.attempt, each.hosts, *each.problems) for each in met} == {("7.0-abcdef", ("n1", "n2", "n3"))}
    assert all(machine.is_loopback(each.head_addr) for each in met)
    monkeypatch.setattr(rollcall, "MARK_S", 0.0)
    met = _meet([first, others[0], _report(2, mark="elsewhere")])
    assert {tuple(each.problems) for each in met} == {
        ("n3: its run directory is another one than n1's; all must share it",)
    }
    assert "no word from node 2 within 1 s" in _meet([first, others[0]], timeout_s=1)[1].problems[0]


def test_two_nodes_with_one_rank_are_named_at_once_and_one_that_comes_again_is_not_two() -> None:
    first, second = (_report(rank, mark="mark") for rank in range(2))
    for third, problem in (
        (replace(second, host="n3"), "n2 and n3 both say that they are node 1"),
        (second, "n2 and n2 both say that they are node 1"),
        (replace(second, host="n4", node_rank=7), "n4 says that it is node 7, but there are 3 nodes"),
    ):
        assert [each.problems for each in _meet([first, second, third])] == [[problem]] * 3
    called = rollcall._Called({0: first})
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(2):
            with socket.create_connection(server.getsockname()):
                called.add(second, server.accept()[0], 3)
    called.tell({})
    assert not called.clashes


def _line(**values: object) -> bytes:
    return json.dumps({"attempt": rollcall.MEETING, "node_rank": 1, "host": "evil", **values}).encode() + b"\n"


STRANGERS: dict[str, bytes] = {
    "nothing": b"",
    "a byte at a time": b"{" * 10_000,
    "a web browser": b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n",
    "deep": b"[" * 60_000 + b"\n",
    "long": b"x" * 200_000 + b"\n",
    "no text": b"\xff\xfe\x00\n",
    "a number": b"7\n",
    "a list": b"[]\n",
    "another attempt": _line(attempt="7.9-abcdef"),
    "an unknown entry": _line(colour="red"),
    "half a rank": _line(node_rank=1.5),
    "a true rank": _line(node_rank=True),
    "a named rank": _line(node_rank="1"),
    "versions": _line(versions=[1]),
    "problems": _line(problems=[[1]]),
    "a clock": _line(clock="noon"),
}


@contextlib.contextmanager
def _strangers(port: int, lines: Sequence[bytes], stop: threading.Event) -> Iterator[None]:
    """Each connects, and says its line; the long ones a byte at a time, until `stop`. None goes of itself."""

    def say(connection: socket.socket, line: bytes) -> None:
        with contextlib.suppress(OSError):
            if line == STRANGERS["a byte at a time"]:
                while not stop.wait(0.02):
                    connection.sendall(b"{")
            connection.sendall(line)

    with contextlib.ExitStack() as open_ones:
        connections = [open_ones.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in lines]
        threads = [threading.Thread(target=say, args=pair) for pair in zip(connections, lines, strict=True)]
        for thread in threads:
            thread.start()
        yield
        stop.set()
        for connection in connections:
            connection.close()
        for thread in threads:
            thread.join()


def test_strangers_do_not_keep_the_nodes_from_each_other() -> None:
    """They come first, forty of them, and each could hold up one who listens to it alone for five seconds."""
    server = rollcall.open_server("", 0, "n1", 3)
    assert not isinstance(server, str)
    port, first, heard = server.getsockname()[1], _report(0), []
    lines = [*STRANGERS.values(), *[b""] * 25]
    others = [
        threading.Thread(target=lambda rank=rank: heard.append(rollcall.join("localhost", port, _report(rank), 60)))
        for rank in (1, 2)
    ]
    with _strangers(port, lines, threading.Event()):
        for other in others:
            other.start()
        began = time.monotonic()
        met = rollcall.receive(server, "7.0-abcdef", first, 3, 60, lambda mark: True)
        assert time.monotonic() - began < 30  # one after the other: 200
        for other in others:
            other.join()
    assert [each.problems for each in (met, *heard)] == [[]] * 3
    assert met.hosts == ("n1", "n2", "n3")


def test_a_stranger_does_not_hold_a_node_beyond_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "CONNECT_TIMEOUT_S", 0.5)
    server = rollcall.open_server("", 0, "n1", 2)
    assert not isinstance(server, str)
    began = time.monotonic()
    with _strangers(server.getsockname()[1], [STRANGERS["a byte at a time"], b""], threading.Event()):
        met = rollcall.receive(server, "7.0-abcdef", _report(0), 2, 1.0, lambda mark: True)
    assert "no word from node 1 within 1 s" in met.problems[0]
    # And where the stranger is in the head node's place.
    with socket.create_server(("127.0.0.1", 0)) as other:

        def drip() -> None:
            connection, _ = other.accept()
            with connection, contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"{")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        met = rollcall.join("127.0.0.1", other.getsockname()[1], _report(1), 1.0)
        thread.join()
    assert "cannot reach the head node" in met.problems[0]
    assert time.monotonic() - began < 20


def test_a_head_address_of_another_machine_is_noticed_at_once() -> None:
    problems = rollcall.listen("192.0.2.99", 20001, "7.0-abcdef", _report(0), ["n1", "n2"], 60)
    assert "192.0.2.99 is not an address of the first node n1" in problems[0]


def test_the_interface_is_one_concrete_name() -> None:
    assert machine.interface_towards("127.0.0.1") == "lo"


def test_ports_stay_below_the_ephemeral_range_and_move_with_the_attempt() -> None:
    ports = {machine.free_port("127.0.0.1", 4711 * 10 + restart) for restart in range(5)}
    assert len(ports) == 5
    assert all(20000 <= port < 30000 for port in ports)


# -- hosts and arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no hosts"),
        ("-oProxyCommand=id", "host '-oProxyCommand=id' cannot be used"),
        ("n1 slots=many", "write `n1 slots=N`"),
        ("n1 slot=1", "slot is not known; expected `[user@]host [slots=N]"),
        ("n1 slots=2\nn1 slots=2", "write one line: n1 slots=N"),
        ("n1 addr=10.0.0.1\nn1", "write one line: n1 slots=N"),
        ("n1 addr=$(id)", "address"),
        ("-l@n1", "user '-l' cannot be used"),
        ("n1:8", "Write `n1 slots=8`, or `n1 port=8`"),
        ("me@n1:2222", "Write `me@n1 slots=2222`, or `me@n1 port=2222`"),
        ("[n1]:22", "brackets are for IPv6 only"),
        ("n1 4", "Write `n1 slots=4`"),
        ("n1,n2", "write one host a line"),
        ("n1 slots=4 max-slots=2", "more slots than max-slots"),
    ],
)
def test_hostfiles_with_mistakes_are_refused_with_the_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LaunchError, match=re.escape(problem)):
        hosts.read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffn1 slots=2\r\nn2 slots=2 # the second\r\n\r\n", [Host("n1", 2), Host("n2", 2)]),
        ("me@n1 port=2222\nn2", [Host("n1", user="me", port=2222), Host("n2")]),
        ("[fd00::1]\nfd00::2\n[fd00::3]:2222", [Host("fd00::1"), Host("fd00::2"), Host("fd00::3", port=2222)]),
        ("n1 slots = 4 max-slots=8\nn2 slots=4 max_slots=4", [Host("n1", 4), Host("n2", 4)]),
        ("n1\nn1\nn2\nn2\n", [Host("n1", 2), Host("n2", 2)]),  # PBS_NODEFILE, LSB_DJOB_HOSTFILE
        ("n1\nn2\n", [Host("n1"), Host("n2")]),
        ("n1 addr=[fd00::1]", [Host("n1", addr="fd00::1")]),
    ],
)
def test_hostfiles_of_other_programs_are_understood(tmp_path: Path, text: str, expected: list[Host]) -> None:
    (tmp_path / "hosts").write_text(text, newline="")
    assert hosts.read_hostfile(tmp_path / "hosts") == expected


def test_ssh_gets_user_and_port_of_each_host(plan: LaunchPlan) -> None:
    known = [Host("n1", user="me", port=2222), Host("n2")]
    first, second = hosts.commands("ssh", known)(plan)
    assert first[-5:-1] == ["-p", "2222", "--", "me@n1"]
    assert second[-2] == "n2"
    assert "-p" not in second


def test_words_for_the_remote_shell_are_quoted(plan: LaunchPlan) -> None:
    odd = replace(plan, run_dir="/data/it's $HOME; id")
    command = hosts.commands("ssh -p 2222")(odd)[1]
    assert command[:4] == ["ssh", "-p", "2222", "-tt"]
    assert command[-3:-1] == ["--", "n2"]  # after -- nothing is an option
    said = subprocess.run(
        ["sh", "-c", command[-1].replace("env ", "printf '%s\\n' ", 1)], capture_output=True, text=True
    )
    assert said.stdout.splitlines()[1:] == [
        *(sys.executable, "-m", "launcher", "node", "--plan"),
        *("/data/it's $HOME; id/plan.json", "--node-rank", "1"),
    ]


def test_every_command_has_help() -> None:
    for name in ("local", "slurm", "hosts", "show", "check", "status", "logs", "stop", "cancel", "resume"):
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0


def test_exit_codes_are_explained_where_people_look() -> None:
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    for text in (EPILOG, page[page.index("Exit codes") :]):
        for code in Exit:
            assert re.search(rf"(: |· |^){code.value} [a-z]", text, re.MULTILINE), f"{code!r} is not explained"


@pytest.mark.parametrize(
    ("head", "at"), [("127.0.0.1", "127.0.0.1"), ("127.1.2.3", "127.1.2.3"), ("::1", "::1"), ("localhost", "")]
)
def test_a_rendezvous_at_a_loopback_address_is_open_to_this_machine_alone(head: str, at: str) -> None:
    assert node.head_to_listen_at(head, "n1") == at
