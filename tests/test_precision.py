"""`train.precision: auto`: decided once by the main process, the same on all ranks, and kept by the run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from simclr_dist.config import Config, ModelConfig, Precision, load_config, render_config
from simclr_dist.doctor.checks import examine_precision
from simclr_dist.network.inputs import images
from simclr_dist.network.precision import assumed_precision, cpu_has_bf16
from simclr_dist.plan.measure import ComparedPrecisions, compare_precisions
from simclr_dist.plan.memory import device_memory
from simclr_dist.run.layout import RunDir
from simclr_dist.training import precision as deciding
from simclr_dist.training.precision import decide_precision, with_precision
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks
from tests.training import Training

CPU = torch.device("cpu")


def smoke(tmp_path: Path, precision: str = "auto", **sizes: int) -> Config:
    settings = [f"train.precision={precision}", f"runs_dir={tmp_path}", *(f"{k}={v}" for k, v in sizes.items())]
    return load_config(REPOSITORY / "configs" / "smoke.yaml", settings)


def measure(monkeypatch: pytest.MonkeyPatch, seconds: dict[Precision, float] | None) -> None:
    """Lets a measurement find `seconds`; None: it must not happen."""

    def compare(**settings: object) -> ComparedPrecisions:
        assert seconds is not None, "measured"
        assert settings["images"] == 64
        return ComparedPrecisions(16, seconds)

    monkeypatch.setattr(deciding, "compare_precisions", compare)
    monkeypatch.setattr(deciding, "cpu_has_bf16", lambda: True)


@pytest.mark.parametrize(("bf16_s", "faster"), [(1.0, "bf16"), (4.0, "fp32")])
def test_a_cpu_takes_what_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_s: float, faster: Precision
) -> None:
    measure(monkeypatch, {"fp32": 2.0, "bf16": bf16_s})
    decision = decide_precision(smoke(tmp_path), None, CPU)
    assert decision.precision == faster
    assert "measured with 16 images: 2.00 times as fast as" in decision.reason


def test_a_cpu_without_bf16_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, None)
    monkeypatch.setattr(deciding, "cpu_has_bf16", lambda: False)
    decision = decide_precision(smoke(tmp_path), None, CPU)
    assert (decision.precision, decision.reason) == ("fp32", "this CPU only emulates bf16")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_if_it_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    measure(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert deciding._decide(smoke(tmp_path), None, torch.device("cuda")).precision == expected


def test_what_is_written_down_is_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, None)
    assert decide_precision(smoke(tmp_path, "fp16"), None, CPU).precision == "fp16"
    config = smoke(tmp_path)  # a start that was killed before its first checkpoint
    config.run_dir.mkdir(parents=True)
    RunDir(config.run_dir).config.write_text(render_config(with_precision(config, "bf16")))
    decision = decide_precision(config, None, CPU)
    assert (decision.precision, decision.reason) == ("bf16", "as when this run began")


def decide_on_a_rank(rank: int, world_size: int, folder: str) -> str:
    deciding.cpu_has_bf16 = lambda: True
    seconds: dict[Precision, float] = {"fp32": 1.0, "bf16": 0.5 if rank == 0 else 2.0}
    deciding.compare_precisions = lambda **_: ComparedPrecisions(4, seconds)
    return decide_precision(smoke(Path(folder)), None, CPU).precision


@pytest.mark.distributed
def test_all_ranks_take_what_the_main_process_found(tmp_path: Path) -> None:
    assert run_ranks(2, decide_on_a_rank, str(tmp_path)) == ["bf16", "bf16"]


def test_a_measurement_is_short_and_leaves_no_trace() -> None:
    state, began = torch.get_rng_state(), time.monotonic()
    model = ModelConfig(encoder="resnet_small", width=8)
    found = compare_precisions(model=model, channels_last=True, inputs=images(16), images=5)
    assert found.images == 5
    assert set(found.seconds) == {"fp32", "bf16"}
    assert min(found.seconds.values()) > 0
    cut = compare_precisions(model=model, channels_last=True, inputs=images(16), images=2**20, budget_s=0.2)
    assert 2 <= cut.images < 2**20
    assert time.monotonic() - began < 30
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("something else\n", True),
    ],
)
def test_bf16_of_a_cpu_is_read_from_its_flags(tmp_path: Path, text: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is has
    assert cpu_has_bf16(tmp_path / "absent")


def test_the_plan_and_the_doctor_know_auto(tmp_path: Path) -> None:
    config = smoke(tmp_path)

    def activations(config: Config, device_type: str) -> int:
        sections = {name: getattr(config, name) for name in ("data", "model", "loss", "optim", "train")}
        return device_memory(**sections, world_size=1, device_type=device_type).activations

    for device_type, precision in (("cuda", "bf16"), ("cpu", "fp32")):
        assert assumed_precision("auto", device_type) == precision
        assert activations(config, device_type) == activations(smoke(tmp_path, precision), device_type)
    (on_gpus,) = examine_precision("auto", [{"bf16": True}])
    assert (on_gpus.level, on_gpus.found) == ("ok", "auto: bf16")
    (on_old_gpus,) = examine_precision("auto", [{"bf16": False}])
    assert "train.precision=fp16" in on_old_gpus.advice
    (on_cpus,) = examine_precision("auto", [])
    assert on_cpus.found.startswith("auto: fp32")


def test_a_run_keeps_what_was_decided(images: Path, tmp_path: Path) -> None:
    settings = ("train.precision=auto", "train.global_batch_size=16")
    first = Training(images, tmp_path, "run", *settings, "train.max_steps=1", module="tests.bf16_train")
    assert first.wait() == [0], first.output
    assert "times as fast as" in first.output[0]
    decided = load_config(first.run_dir / "config.yaml").train.precision
    assert decided in ("fp32", "bf16")
    again = Training(images, tmp_path, "run", *settings, "train.max_steps=2")
    assert again.wait() == [0], again.output
    assert f"{decided} (as when this run began)" in again.output[0]
    assert "changed since step 1: train.precision" not in again.output[0]
    assert load_config(first.run_dir / "config.yaml").train.precision == decided
    finished = Training(images, tmp_path, "run", *settings, "train.max_steps=2")
    assert finished.wait() == [0], finished.output
    assert "finished at step 2 of 2" in finished.output[0]
