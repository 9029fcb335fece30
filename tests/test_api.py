"""`simclr_dist.pretrain` and `Run`: errors are raised, the process lives on, and the next call works.

Run: pytest tests/test_api.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

import simclr_dist
from simclr_dist import api
from simclr_dist.config import load_config
from simclr_dist.errors import CheckpointError, ConfigError, DataError, NonFiniteAbortError, OwnershipError
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.layout import RunDir
from simclr_dist.run.owner import claim
from simclr_dist.run.watchdog import ENDS_PROCESS, Watchdog
from simclr_dist.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.training import Training

SMOKE = REPOSITORY / "configs" / "smoke.yaml"
QUICK: dict[str, Any] = {
    "data": {"test": None},
    "evaluation": {"knn_every_epochs": None},
    "train": {"max_steps": 3},
    "monitor": {"terminal": "quiet"},
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(QUICK, "runs_dir", str(tmp_path / "runs"))


def owner(run_dir: Path) -> bool:
    return RunDir(run_dir).owner.exists()


class FailingTrainer(Trainer):
    """With one's own code in it, which has a fault."""

    fails_with: BaseException = ZeroDivisionError("in my own views")

    def train_step(self, batch):
        if self.state.step == 2:
            raise self.fails_with
        return super().train_step(batch)


class TestConfiguration:
    @pytest.mark.parametrize("form", ["path", "text", "dictionary", "Config"])
    def test_a_file_a_dictionary_and_a_config_are_the_same_run(self, form: str) -> None:
        config = {
            "path": SMOKE,
            "text": str(SMOKE),
            "dictionary": yaml.safe_load(SMOKE.read_text()),
            "Config": load_config(SMOKE),
        }[form]
        run = simclr_dist.pretrain(config, name=form, **QUICK)
        assert (run.state, run.step, run.path.name) == ("finished", 3, form)
        assert load_config(RunDir(run.path).config).loss.temperature == 0.5  # of the file

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"train": {"epoch": 5}}, "the arguments: train.epoch: unknown key; did you mean `epochs`"),
            ({"train.epoch": 5}, "the arguments: train.epoch: unknown key"),
            ({"trian": {"epochs": 5}}, "the arguments: trian: unknown key; did you mean `train`"),
            ({"loss": {"temperature": "0.1"}}, "the arguments: loss.temperature: input should be a valid number"),
            ({"data": {"train": "nowhere.beton"}}, "the arguments: data.train: nowhere.beton does not exist"),
            ({"loss": 3}, "the arguments: loss: "),
        ],
    )
    def test_mistakes_are_named_before_anything_starts(self, overrides: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            simclr_dist.pretrain(SMOKE, **(QUICK | overrides))
        assert message in str(caught.value)
        assert not (tmp_path / "runs").exists()

    def test_overrides_add_to_a_section(self) -> None:
        both = {"train": {"epochs": 7}, "train.max_steps": 4, "augment": {"jitter_p": 0.5}}
        config = load_config(yaml.safe_load(SMOKE.read_text()), both)
        assert (config.train.epochs, config.train.max_steps, config.train.global_batch_size) == (7, 4, 64)
        assert (config.augment.jitter_p, config.augment.preset) == (0.5, "simclr_cifar")
        assert load_config(SMOKE, both) == config

    def test_a_dictionary_with_mistakes_names_them_all(self) -> None:
        values = yaml.safe_load(SMOKE.read_text())
        del values["name"]
        values["model"]["widht"] = 3
        with pytest.raises(ConfigError) as caught:
            load_config(values)
        assert len(caught.value.problems) == 2
        assert "the configuration: name: is missing" in str(caught.value)
        assert "the dictionary: model.widht: unknown key; did you mean `width`?" in str(caught.value)


class TestAfterAFailure:
    def test_the_same_process_continues_the_run_in_any_precision(self) -> None:
        with pytest.raises(ZeroDivisionError, match="in my own views"):
            simclr_dist.pretrain(SMOKE, name="mine", trainer_class=FailingTrainer, **QUICK)
        run = simclr_dist.Run(Path(QUICK["runs_dir"]) / "mine")
        assert (run.state, run.step, owner(run.path)) == ("failed", 2, False)
        assert "ZeroDivisionError" in json.loads(RunDir(run.path).status.read_text())["message"]
        again = simclr_dist.pretrain(SMOKE, name="mine", **QUICK)
        assert (again.state, again.step, owner(again.path)) == ("finished", 3, False)
        for precision in ("bf16", "fp32"):
            name = f"in_{precision}"
            other = simclr_dist.pretrain(SMOKE, name=name, **{"train.precision": precision}, **QUICK)
            assert other.state == "finished"

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (DataError("a picture"), "data_error"),
            (NonFiniteAbortError("NaN"), "nan_abort"),
            (CheckpointError("no disk"), "checkpoint_error"),
            (KeyboardInterrupt(), "crash"),
            (SystemExit(3), "crash"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
    )
    def test_every_kind_of_failure_is_raised_and_recorded(
        self, error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FailingTrainer, "fails_with", error)
        with pytest.raises(type(error)):
            simclr_dist.pretrain(SMOKE, trainer_class=FailingTrainer, **QUICK)
        path = Path(QUICK["runs_dir"]) / "smoke"
        status = json.loads(RunDir(path).status.read_text())
        assert (status["state"], status["reason"], owner(path)) == ("failed", reason, False)

    def test_one_while_the_parts_are_built(self, tmp_path: Path) -> None:
        (tmp_path / "empty.beton").write_bytes(b"")
        before = threading.active_count()
        with pytest.raises(DataError, match=r"empty\.beton"):
            simclr_dist.pretrain(SMOKE, **{"data.train": str(tmp_path / "empty.beton")}, **QUICK)
        path = Path(QUICK["runs_dir"]) / "smoke"
        assert (simclr_dist.Run(path).state, owner(path)) == ("failed", False)
        assert threading.active_count() == before
        assert simclr_dist.pretrain(SMOKE, **QUICK).state == "finished"

    def test_the_run_of_somebody_else_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "runs" / "smoke"
        path.mkdir(parents=True)
        script = (
            "import sys, time; from pathlib import Path; from simclr_dist.run.owner import claim\n"
            "claim(Path(sys.argv[1])); print('claimed', flush=True); time.sleep(100)"
        )
        other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=REPOSITORY)
        with other:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(OwnershipError, match="already being trained by"):
                simclr_dist.pretrain(SMOKE, **QUICK)
            assert owner(path)
            assert not RunDir(path).status.exists()
            other.kill()


class TestTheCallersProcess:
    def test_its_accelerator_random_numbers_and_signal_handlers_stay(self) -> None:
        mine = Accelerator(cpu=True, mixed_precision="bf16")
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        simclr_dist.pretrain(SMOKE, **QUICK)
        assert torch.equal(torch.rand(3), expected)
        assert mine.mixed_precision == "bf16"
        assert mine.prepare_model(torch.nn.Linear(2, 2))(torch.ones(1, 2)).dtype == torch.float32
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers

    def test_a_thread_trains_and_another_is_told_to_wait(self) -> None:
        reached, go_on, found = threading.Event(), threading.Event(), []

        class Slow(Trainer):
            def train_step(self, batch):
                reached.set()
                assert go_on.wait(60)
                return super().train_step(batch)

        thread = threading.Thread(
            target=lambda: found.append(simclr_dist.pretrain(SMOKE, name="a", trainer_class=Slow, **QUICK))
        )
        thread.start()
        assert reached.wait(60)
        with pytest.raises(ConfigError, match="another training runs in this process"):
            simclr_dist.pretrain(SMOKE, name="b", **QUICK)
        go_on.set()
        thread.join(60)
        assert found[0].state == "finished"
        assert simclr_dist.pretrain(SMOKE, name="b", **QUICK).state == "finished"

    def test_the_file_stop_ends_it_and_another_call_goes_on(self) -> None:
        class Stopped(Trainer):
            def __init__(self, config):
                super().__init__(config)
                RunDir(config.run_dir).stop.touch()

        assert simclr_dist.pretrain(SMOKE, trainer_class=Stopped, **QUICK).state == "stopped"
        run = simclr_dist.pretrain(SMOKE, **QUICK)
        assert (run.state, run.step) == ("finished", 3)

    @pytest.fixture
    def heartbeats(self, tmp_path: Path) -> Heartbeats:
        return Heartbeats(tmp_path, "a" * 12, 0, 1, 1.0)

    def test_a_hang_is_a_warning(self, heartbeats: Heartbeats, capfd: pytest.CaptureFixture) -> None:
        ends = ENDS_PROCESS.set(False)
        try:
            watchdog = Watchdog(heartbeats, stop_signals=(), stop_s=1, on_hang=lambda message: pytest.fail(message))
        finally:
            ENDS_PROCESS.reset(ends)
        with watchdog:
            watchdog.doing("training", 7, 0.1, "step_s")
            threading.Event().wait(0.8)
            watchdog.doing("training", 8, 100, "step_s")
        warned = capfd.readouterr().err
        assert warned.count("warning: no progress for 0.1 s (timeout.step_s): step 7, training") == 1

    def test_a_lost_ownership_is_raised_by_the_next_save(self) -> None:
        class Robbed(Trainer):
            def train_step(self, batch):
                if self.state.step == 0:
                    RunDir(self.config.run_dir).owner.unlink()
                    claim(self.config.run_dir)
                return super().train_step(batch)

        with pytest.raises(OwnershipError, match="taken over"):
            simclr_dist.pretrain(SMOKE, trainer_class=Robbed, **QUICK)

    def test_importing_it_is_cheap(self) -> None:
        script = """
            import sys, simclr_dist
            assert callable(simclr_dist.pretrain) and simclr_dist.Run.__name__ == "Run"
            slow = {"torch", "accelerate", "numpy", "torchvision", "matplotlib"} & set(sys.modules)
            assert not slow, slow
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, check=True, timeout=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("runs")
        return simclr_dist.pretrain(SMOKE, **(QUICK | {"runs_dir": folder, "data": {"test": "synthetic"}}))


class TestRun:
    def test_evaluate(self, run: api.Run) -> None:
        found = run.evaluate("knn", baselines=True, device="cpu")
        assert 0 <= found.top1 <= found.top5 <= 1
        assert set(found.baselines) == {"raw pixels", "untrained encoder"}
        assert found.record["method"] == "knn"
        assert run.evaluate("knn", device="cpu").baselines == {}

    def test_embed_and_encoder_agree(self, run: api.Run, tmp_path: Path) -> None:
        found = run.embed("synthetic", tmp_path / "h.npz", device="cpu")
        assert (tmp_path / "h.npz").exists()
        assert found.h.shape[1] == run.encoder()(torch.zeros(1, 3, 32, 32)).shape[1]
        with pytest.raises(DataError, match=r"\.npz or \.parquet"):
            run.embed("synthetic", tmp_path / "h.pt", device="cpu")

    def test_export_and_report(self, run: api.Run) -> None:
        exported = run.export(format="safetensors")
        assert exported.path == run.path / "export" / "encoder.safetensors"
        assert exported.card.exists()
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
        assert "</html>" in run.report(device="cpu", images=50).read_text()

    def test_a_run_of_before_is_opened_by_its_folder(self, run: api.Run, tmp_path: Path) -> None:
        assert repr(simclr_dist.Run(str(run.path))) == f"Run('{run.path}': finished, step 3)"
        assert simclr_dist.Run(tmp_path).state == "unknown"
        with pytest.raises(ConfigError, match="there is no such run"):
            simclr_dist.Run(tmp_path / "nowhere")
        with pytest.raises(CheckpointError):
            simclr_dist.Run(tmp_path).encoder()


@pytest.mark.distributed
def test_two_processes_call_it_twice(tmp_path: Path) -> None:
    training = Training(
        Path("synthetic"), tmp_path, "both", "train.max_steps=3", world_size=2, module="tests.api_twice"
    )
    assert training.wait() == [0, 0], training.output
    for name in ("both", "both_bf16"):
        assert simclr_dist.Run(tmp_path / name).state == "finished"


def test_the_next_training_may_start_after_any_failure() -> None:
    with pytest.raises(RuntimeError), api._training_in_this_process("x"):
        raise RuntimeError
    with api._training_in_this_process("x"):
        assert not ENDS_PROCESS.get()
    assert ENDS_PROCESS.get()


def test_the_example_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "notebook.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train.epoch: unknown key; did you mean `epochs`?" in done.stdout
    assert "finished, step 8" in done.stdout
    assert "kNN: " in done.stdout
