"""Other schedulers' variables are read where they are certain. Run: pytest tests/test_launcher_schedulers.py"""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.errors import LaunchError
from launcher.schedulers import Place, read_place, refuse_to_be_alone, split_address

FILES = {"/pbs": "n1.site\nn1.site\nn2.site\nn2.site\nn3.site\n", "/lsf": "n1\nn1\nn2\n"}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "1"}
FLUX = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_JOB_NNODES": "4", "FLUX_JOB_ID": "f9"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4"}
AT = {"rendezvous": "10.0.0.1:29400"}


def place(environ: dict[str, str], name: str = "n2.site", procs: int = 4, **given: Any) -> Place:
    return read_place(environ, [name, name.partition(".")[0]], procs, read=FILES.get, **given)


@pytest.mark.parametrize(
    ("environ", "given", "expected"),
    [
        ({}, {**AT, "node_rank": 1, "num_nodes": 4}, (1, 4, "10.0.0.1", 29400)),
        ({}, {"rendezvous": "[fd00::1]:29400", "node_rank": 1, "num_nodes": 4}, (1, 4, "fd00::1", 29400)),
        # Kubernetes: an indexed Job, and Kubeflow's operators of several years
        ({"JOB_COMPLETION_INDEX": "1"}, {"rendezvous": "t-0.t:29400", "num_nodes": 4}, (1, 4, "t-0.t", 29400)),
        (KUBEFLOW | {"RANK": "1", "WORLD_SIZE": "2"}, {}, (1, 2, "job-master-0", 23456)),
        (PET, {}, (1, 2, "job-master-0", 23456)),
        (PET | KUBEFLOW | {"RANK": "1", "WORLD_SIZE": "8"}, {}, (1, 2, "job-master-0", 23456)),
        (PET | {"PET_NNODES": "2:2"}, {}, (1, 2, "job-master-0", 23456)),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "h:29500"}, {}, (0, 2, "h", 29500)),
        (KUBEFLOW | {"NODE_RANK": "1", "NNODES": "2"}, {}, (1, 2, "job-master-0", 23456)),
        (KUBEFLOW | {"RANK": "1", "WORLD_SIZE": "4"}, {"num_nodes": 4}, (1, 4, "job-master-0", 23456)),
        (KUBEFLOW | {"NODE_RANK": "1", "WORLD_SIZE": "2"}, {}, (1, 2, "job-master-0", 23456)),
        # lists of hosts
        ({"PBS_NODEFILE": "/pbs", "PBS_JOBID": "12.server"}, AT, (1, 3, "10.0.0.1", 29400)),
        ({"PBS_NODEFILE": "/pbs", "MASTER_PORT": "29500"}, {}, (1, 3, "n1.site", 29500)),
        ({"LSB_DJOB_HOSTFILE": "/lsf", "MASTER_PORT": "29500"}, {}, (1, 2, "n1", 29500)),
        ({"LSB_MCPU_HOSTS": "n1 4 n2 4 n3 4", "MASTER_PORT": "29500"}, {}, (1, 3, "n1", 29500)),
        ({"LSB_HOSTS": "n1 n1 n2 n2", "MASTER_PORT": "29500"}, {}, (1, 2, "n1", 29500)),
        # one task on each node
        (OMPI, AT, (1, 4, "10.0.0.1", 29400)),
        (PMI, AT, (1, 4, "10.0.0.1", 29400)),
        (FLUX, AT, (1, 4, "10.0.0.1", 29400)),
        (STEP, AT, (1, 4, "10.0.0.1", 29400)),
        ({"PBS_NODEFILE": "/gone"} | PMI, AT, (1, 4, "10.0.0.1", 29400)),
    ],
)  # fmt: skip
def test_a_place_is_read_from_what_schedulers_set(
    environ: dict[str, str], given: dict[str, Any], expected: tuple[int, int, str, int]
) -> None:
    found = place(environ, **given)
    assert (found.node_rank, found.num_nodes, found.head, found.port) == expected
    for name, value in given.items():
        assert f"--{name.replace('num_', '').replace('_', '-')} {value}" in found.said[0]


@pytest.mark.parametrize(
    ("environ", "given", "complaint"),
    [
        ({}, {}, "the node rank: give --node-rank R; the number of nodes: give --nodes N; the head node: give"),
        ({"JOB_COMPLETION_INDEX": "1"}, AT, "the number of nodes: give --nodes N"),
        (KUBEFLOW | {"RANK": "1", "WORLD_SIZE": "8"}, {}, "RANK=1, WORLD_SIZE=8 may count nodes, or processes (4 on"),
        (KUBEFLOW | {"NODE_RANK": "1", "WORLD_SIZE": "8"}, {}, "WORLD_SIZE=8 may count nodes, or processes (4 on each"),
        (PET | {"NODE_RANK": "0"}, {}, "is not certain: 1 (PET_NODE_RANK=1); 0 (NODE_RANK=0). Say it: --node-rank"),
        (PET | {"MASTER_ADDR": "other"}, {}, "the head node is not certain"),
        ({"JOB_COMPLETION_INDEX": "4"}, {**AT, "num_nodes": 4}, "node rank 4 of 4 nodes"),
        ({"NODE_RANK": "first"}, AT, "NODE_RANK=first is not a whole number"),
        ({"PET_NNODES": "1:4"} | KUBEFLOW, {}, "PET_NNODES=1:4: the number of nodes does not change"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, AT, "one of several (LOCAL_RANK=2, LOCAL_WORLD_SIZE=4). Start"),
        ({"TORCHELASTIC_RUN_ID": "none"}, AT, "torchrun or another launcher"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, AT, "--map-by ppr:1:node"),
        (PMI | {"MPI_LOCALNRANKS": "2"}, AT, "-ppn 1"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, AT, "the node rank: give"),  # a task may be a node or not
        (FLUX | {"FLUX_JOB_SIZE": "16"}, AT, "FLUX_JOB_SIZE=16 tasks on FLUX_JOB_NNODES=4 nodes"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, AT, "--ntasks-per-node=1"),
        ({"PBS_NODEFILE": "/lsf"}, AT, "none of its hosts is this one (elsewhere)"),
        ({"MASTER_ADDR": "$(id)"}, {}, "address '$(id)' cannot be used"),
        ({}, {"rendezvous": "h:port"}, "expected HOST:PORT"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_asked_for(environ: dict[str, str], given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(complaint)):
        place(environ, name="elsewhere" if environ.get("PBS_NODEFILE") == "/lsf" else "n2", **given)


def test_what_is_set_and_not_used_is_said() -> None:
    found = place(PET | {"RANK": "1", "WORLD_SIZE": "8"}, rendezvous="h:1234", node_rank=0)
    assert found.said == (
        "read node rank 0 (--node-rank 0), number of nodes 2 (PET_NNODES=2), head node h (--rendezvous h:1234), "
        "port 1234 (--rendezvous h:1234)",
        "not used: RANK=1, WORLD_SIZE=8",
        "not used: PET_NODE_RANK=1; the command line says node rank 0",
        "not used: PET_MASTER_ADDR=job-master-0; the command line says head node h",
        "not used: PET_MASTER_PORT=23456; the command line says port 1234",
    )


def test_one_node_needs_no_more_and_a_job_has_a_port() -> None:
    alone = place({}, num_nodes=1)
    assert (alone.node_rank, alone.head) == (0, "127.0.0.1")
    ports = {place({"PBS_JOBID": job, "PBS_NODEFILE": "/pbs"}, name=name).port for job in "12" for name in ("n1", "n2")}
    assert len(ports) == 2  # one for each job, on every node
    assert all(20000 <= port < 30000 for port in ports)


def test_one_of_several_does_not_train_alone() -> None:
    for environ in (PET, KUBEFLOW | {"RANK": "1", "WORLD_SIZE": "2"}, OMPI, STEP, FLUX):
        with pytest.raises(LaunchError, match="Each would be a training of its own"):
            refuse_to_be_alone(environ)
    for environ in ({}, {"JOB_COMPLETION_INDEX": "3"}, {"PMI_SIZE": "7", "WORLD_SIZE": "9"}, {"PBS_NODEFILE": "/pbs"}):
        refuse_to_be_alone(environ)  # an array of trainings, what another launcher has left, an allocation


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h", ("h", None)), ("h:1", ("h", 1)), ("fd00::1", ("fd00::1", None)), ("[fd00::1]:80", ("fd00::1", 80))],
)
def test_addresses_are_split(text: str, expected: tuple[str, int | None]) -> None:
    assert split_address(text) == expected
