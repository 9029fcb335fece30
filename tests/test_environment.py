"""The environment changes a training knowingly, or not at all, and the page says which."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from simclr_dist.doctor.checks import examine_accelerate_config
from simclr_dist.doctor.environment import examine_environment
from simclr_dist.errors import ConfigError
from simclr_dist.parallel import environment
from simclr_dist.parallel.environment import TABLE, check_environment, look_up, sentence, without_ignored
from tests.conftest import REPOSITORY
from tests.training import Training

ACCELERATE = Path(find_spec("accelerate").origin).parent  # type: ignore[union-attr, arg-type]
THREE_STEPS = ("train.max_steps=3", "checkpoint.every_min=null", "monitor.image_pairs=0")


def test_every_variable_that_accelerate_reads_has_a_row_of_its_own() -> None:
    names: set[str] = set()
    for path in ACCELERATE.rglob("*.py"):
        if "test_utils" not in path.parts:
            text = path.read_text(encoding="utf-8")
            names |= set(re.findall(r"\b(?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9]\b", text))
    assert len(names) > 50
    constants = {"FSDP_PYTORCH_VERSION", "FSDP_MODEL_NAME"}  # not variables; FSDP_* has them anyway
    unknown = {name for name in names - constants if (row := look_up(name)) is None or row.names == ("ACCELERATE_*",)}
    assert not unknown


def test_every_key_of_accelerate_config_has_a_row() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    keys = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert keys <= {key for row in TABLE for key in row.config}


def test_the_page_shows_the_table() -> None:
    page = (REPOSITORY / "docs" / "environment.md").read_text(encoding="utf-8")
    assert environment.as_markdown() in page, (
        "print(simclr_dist.parallel.environment.as_markdown()) is what the page needs"
    )


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "1"}, "FSDP shards"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:3"}, "CUDA_VISIBLE_DEVICES"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "neither true nor false"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS=many"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS=0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "3"}, "RANK=3 of WORLD_SIZE=1"),
        ({"PMI_SIZE": "4"}, "mpirun, srun or the like started several processes (PMI_SIZE=4)"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "(SLURM_STEP_NUM_TASKS=8), but not where they meet"),
        ({"FLUX_JOB_SIZE": "2"}, "`python -m launcher node CONFIG`"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "(PET_NNODES=2)"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "bash slurm/train.sh CONFIG"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_asks_for_another_training_is_refused_by_name(environ: Mapping[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_environment(environ)


def test_what_accelerate_launch_always_sets_is_passed_over_in_silence() -> None:
    usual = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "OMP_NUM_THREADS": "1",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_USE_FSDP": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }
    check_environment(usual)
    assert sentence(usual) is None


def test_what_is_ignored_or_changes_results_is_one_line() -> None:
    said = sentence({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "NVIDIA_TF32_OVERRIDE": "0", "ACCELERATE_NEW": "1"})
    assert said == (
        "environment: ACCELERATE_DYNAMO_BACKEND=INDUCTOR is ignored (train.compile decides); "
        "ACCELERATE_NEW=1 is ignored (not known to this version); "
        "NVIDIA_TF32_OVERRIDE=0: changes the precision of products"
    )


def test_ignored_variables_are_out_of_sight_and_then_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with without_ignored():
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
        assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_settings_of_accelerate_do_not_change_a_training(images: Path, tmp_path: Path) -> None:
    plain = Training(images, tmp_path, "plain", *THREE_STEPS)
    assert plain.wait() == [0], plain.output
    set_by_others = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    }
    other = Training(images, tmp_path, "other", *THREE_STEPS, **set_by_others)
    assert other.wait() == [0], other.output
    assert other.losses() == plain.losses()
    assert other.final_bytes() == plain.final_bytes()
    (line,) = [line for line in other.output[0].splitlines() if "environment: " in line]
    assert all(name in line for name in set_by_others)
    assert "environment: " not in plain.output[0]
    recorded = (other.run_dir / "environment.jsonl").read_text()
    assert '"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"' in recorded


def test_a_refused_environment_is_one_message_on_two_ranks_and_leaves_no_run(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "fsdp", world_size=2, ACCELERATE_USE_FSDP="true")
    assert training.wait() == [2, 2]
    printed = "".join(training.output)
    assert printed.count("ACCELERATE_USE_FSDP=true") == 1
    assert "Traceback" not in printed
    assert not training.run_dir.exists()


def test_the_doctor_shows_what_training_would_do(tmp_path: Path) -> None:
    rows = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DEBUG_MODE": "no"}
    levels = {finding.what: finding.level for finding in examine_environment(rows)}
    assert levels == {
        "ACCELERATE_USE_FSDP": "problem",
        "ACCELERATE_MIXED_PRECISION": "warning",
        "ACCELERATE_DEBUG_MODE": "ok",
    }
    made = tmp_path / "default_config.yaml"
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "use_cpu": False}
    settings |= {"deepspeed_config": {"zero_stage": 3}, "mixed_precision": "bf16", "num_processes": 2}
    made.write_text(yaml.safe_dump(settings))
    found = {finding.what.removeprefix("accelerate: "): finding for finding in examine_accelerate_config(made)}
    assert {key: finding.level for key, finding in found.items()} == {
        "deepspeed_config": "problem",
        "distributed_type": "problem",
        "mixed_precision": "warning",
    }
    assert all("accelerate config" in finding.advice for finding in found.values())
