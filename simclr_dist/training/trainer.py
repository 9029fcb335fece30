"""The training of one run: a step that reads aloud, and the loop around it."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.data.loading.build import build_loader, describe
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.gallery import show_gallery
from simclr_dist.evaluation.online import evaluate_while_training
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.health.check import Checkup, RankFacts
from simclr_dist.loss import NTXentLoss
from simclr_dist.monitor.monitor import Monitor, RunMonitor, SilentMonitor, memory_peak_gib
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.flops import forward_flops, peak_flops, train_flops
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.lars import build_optimizer, build_schedule, set_learning_rate
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run import provenance
from simclr_dist.run.guard import Custody
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import State
from simclr_dist.run.stop_requests import Request, Requests
from simclr_dist.run.watchdog import BACKSTOP_S
from simclr_dist.training import saving
from simclr_dist.training.non_finite import NonFiniteGradientError, NonFinitePolicy, StepFacts
from simclr_dist.training.saving import Saver
from simclr_dist.training.summary import device_name, end_rows, start_rows
from simclr_dist.views.augment import Augment, normalize


class Trainer:
    """Pretrains as `config` says, on all processes together.

    All of them construct it and call `fit`; a subclass may exchange `augment` and `nt_xent` in between. Raises
    ConfigError, DataError, CheckpointError or OwnershipError on the first failing rank and FailedElsewhereError on the
    others.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true",
            mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout.first_step_s + BACKSTOP_S)),
                DistributedDataParallelKwargs(
                    broadcast_buffers=config.model.batch_norm == "per_device", gradient_as_bucket_view=True
                ),
            ],
        )
        self.device = self.accelerator.device
        self.world = distributed.world()
        self._check_world()
        self.global_batch_size = config.train.global_batch_size
        self.batch_size_per_device = self.global_batch_size // self.world.size

        self.custody = Custody(config, self.device)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.resumed = run_on_all_ranks(lambda: saving.choose(config, self.device, self._warn_on_main), self.device)
        self.loader = run_on_all_ranks(
            lambda: build_loader(
                config.data,
                config.augment,
                seed=config.seed,
                global_batch_size=self.global_batch_size,
                world=self.world,
                device=self.device,
            ),
            self.device,
        )
        self.steps_per_epoch = self.loader.order.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)

        self.augment: Callable[[Batch], Tensor] = Augment(config.augment, config.seed, config.data.image_size)
        model = build_model(config.model)
        self.feature_dim = model.feature_dim
        self.plain_model: nn.Module = model
        self.forward_flops = forward_flops(self.plain_model, config.data.image_size) if self.world.is_main else None
        self.plain_model.to(self.device)
        if config.train.channels_last:
            self.plain_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.model.batch_norm == "global":
            self.plain_model = convert_to_global_batch_norm(self.plain_model, self.device)
        self.plain_optimizer = build_optimizer(self.plain_model, config.optim)
        self.schedule = build_schedule(
            config.optim, self.global_batch_size, self.steps_per_epoch * self.global_batch_size, config.train.epochs
        )
        self.nt_xent: Callable[[Tensor, Tensor], Tensor] = NTXentLoss(
            config.loss.temperature,
            config.loss.implementation,
            gather_dtype=getattr(torch, config.loss.gather_dtype),
        )
        self.probe = run_on_all_ranks(self._build_probe, self.device)
        self.state = TrainState()
        if self.resumed is not None:
            resumed, fingerprint = self.resumed, self.loader.fingerprint
            self.state = run_on_all_ranks(
                lambda: saving.restore(
                    resumed, config, fingerprint, self.plain_model, self.plain_optimizer, self.probe
                ),
                self.device,
            )
        self.custody.state = self.state
        if config.train.compile:
            self.plain_model.compile()
        with warnings.catch_warnings():
            # torch 2.15 wants another name for broadcast_buffers, which torch 2.11 does not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.model = self.accelerator.prepare_model(self.plain_model)
        self.optimizer = self.accelerator.prepare_optimizer(self.plain_optimizer)
        if self.resumed is not None and self.accelerator.scaler is not None and self.resumed.grad_scaler:
            self.accelerator.scaler.load_state_dict(dict(self.resumed.grad_scaler))

        self.monitor: Monitor = run_on_all_ranks(self._open_monitor, self.device)
        self.saver = Saver(
            config,
            self.device,
            self.monitor,
            model=self.plain_model,
            optimizer=self.plain_optimizer,
            scaler=self.accelerator.scaler,
            probe=self.probe,
            fingerprint=self.loader.fingerprint,
            still_ours=self.custody.check,
        )
        self.finite = NonFinitePolicy(
            config.train, config.run_dir, self.world.rank, self.plain_model, self.device, self.monitor.warn
        )
        self.checkup = Checkup(config.monitor.health_every_steps, self.plain_model, self.world)
        self.latest: list[tuple[Tensor, Tensor]] = []  # h and z of the last step, micro-batch by micro-batch

    # -----------------------------------------------------------------------------------------------------------------
    # The step

    def train_step(self, batch: Batch) -> Tensor:
        """One update from this rank's share of a global batch; the loss of the global batch, the same on every rank."""
        self._seed_step()
        set_learning_rate(self.optimizer, self.schedule(self.state.samples_seen))
        views = self.augment(batch)  # [2, B, 3, H, W]
        with self.checkup.watching(self.state.step + 1):
            loss = self.backward(views, batch.sample_ids)
        if self.config.optim.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
        scaler = self.accelerator.scaler
        if scaler is None:
            self.finite.check_gradient(self.grad_norm(), self._facts(batch))
        self.optimizer.step()
        # Under fp16 the scaler skips steps until its scale fits; below 1 it is the gradient that does not.
        if scaler is not None and self.optimizer.step_was_skipped and scaler.get_scale() < 1:
            raise NonFiniteGradientError("the gradient is infinite in fp16 at any loss scale", self._facts(batch))
        return loss

    def _facts(self, batch: Batch) -> StepFacts:
        return StepFacts(self.state.step, self.schedule(self.state.samples_seen), batch.sample_ids)

    def _seed_step(self) -> None:
        """Dropout and its like draw from a generator that depends on the step alone: a resume finds the same draws."""
        words = np.random.SeedSequence([self.config.seed, self.state.step, self.world.rank]).generate_state(
            2, np.uint64
        )
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def backward(self, views: Tensor, sample_ids: Tensor) -> Tensor:
        """Gradients of the global loss in the parameters; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.latest.clear()
        if self.config.train.micro_batch_size is not None:
            return backward_in_micro_batches(
                self.model,
                views,
                lambda z: self.nt_xent(z, sample_ids),
                micro_batch_size=self.config.train.micro_batch_size,
                backward=self.accelerator.backward,
                observe=self.latest.append,
            )
        h, z = self.model(views.flatten(0, 1))  # [2B, D], [2B, K]
        self.latest.append((h.detach(), z.detach()))
        loss = self.nt_xent(z, sample_ids)  # negatives from every rank
        self.accelerator.backward(loss)
        return loss.detach()

    def _settle_order_of_sums(self) -> None:
        """A backward that counts for nothing, so that the first step of a resume rounds as the same step elsewhere.

        DDP lays gradients out in its buckets anew after its first backward, in the order in which they came. From three
        ranks on, a gradient's place decides in which order the ranks' shares are added. All ranks together.
        """
        if self.world.size < 3:
            return
        buffers = [b.clone() for b in self.plain_model.buffers()]
        batch_size, side = self.global_batch_size // self.world.size, self.config.data.image_size
        noise = torch.randn(2, batch_size, 3, side, side, device=self.device)
        first = self.world.rank * batch_size
        self.backward(noise, torch.arange(first, first + batch_size, device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.latest.clear()
        for buffer, before in zip(self.plain_model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop

    def fit(self) -> State:
        """Trains to the last step or until asked to stop; how it ended: finished, preempted or stopped."""
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(self.loader)
            stack.enter_context(self.monitor)
            requests = stack.enter_context(Requests(config.run_dir, self.device))
            stack.enter_context(self.custody.watchdog)
            self.custody.set_status("running")
            self._announce_start()
            self._started = time.monotonic(), self.state.samples_seen
            if self.state.step >= self.last_step:
                return self._end("finished")
            self.custody.watch("settling the order of sums", first=True)
            self._settle_order_of_sums()
            interval = _Interval(self)
            self._last_checkup = time.monotonic(), self.loader.wait_s
            self.custody.watch("waiting for images", first=True)
            for batch in self.loader.batches(self.state.step):
                self.custody.watch("training", first=interval.steps == 0)
                if self.saver.is_due(self.state.step + 1):
                    requests.ask(Request.SAVE)
                requests.announce()
                if self.state.step % self.steps_per_epoch == 0 or self.state.step == 0:
                    self._show_pairs(batch)
                loss = self.finite.run(lambda batch=batch: self.train_step(batch), self._facts(batch))  # type: ignore[misc]
                if interval.steps == 0:
                    distributed.set_timeout(config.timeout.step_s + BACKSTOP_S)
                learnt = self.finite.skipped_in_a_row == 0
                if self.probe is not None and learnt:
                    self.probe.update(self._latest_outputs()[0], batch.labels)
                self.state.advance(self.global_batch_size)
                interval.steps += 1
                self.monitor.advance(self.state.step)
                ended = self.state.step >= self.last_step
                if self.state.step % config.monitor.log_every_steps == 0 or ended:
                    self._log(interval.measure(loss))
                if self.checkup.is_due(self.state.step) and learnt:
                    self._check_health()
                if self.state.step % self.steps_per_epoch == 0:
                    with self.custody.watchdog.busy("evaluating", config.timeout.evaluation_s, "evaluation_s"):
                        self._end_epoch(self.state.step // self.steps_per_epoch)
                    interval.restart()
                request = requests.agreed()
                if ended or request >= Request.SAVE:
                    with self.custody.watchdog.busy("saving", config.timeout.save_s, "save_s"):
                        self.saver.save(self.state, final=ended or request >= Request.STOP)
                if ended:
                    return self._end("finished")
                if request >= Request.STOP:
                    if self.world.is_main:
                        requests.forget_files()
                    return self._end("preempted" if request == Request.PREEMPT else "stopped")
                self.custody.watch("waiting for images")
        raise AssertionError("the loader ended before the run did")

    def _end_epoch(self, epoch: int) -> None:
        every = self.config.evaluation.knn_every_epochs
        found: dict[str, float] = {}
        if every and (epoch % every == 0 or self.state.step >= self.last_step):
            found = evaluate_while_training(
                self.plain_model.get_submodule("encoder"), self.config, self.device, self.probe
            )
            self._log(found)
        every = self.config.monitor.projector_every_epochs
        if every and epoch % every == 0:
            show_gallery(
                self.plain_model.get_submodule("encoder"),
                self.config,
                self.monitor,
                samples_seen=self.state.samples_seen,
                device=self.device,
                normalize=normalize,
            )
        self.saver.save_at_epoch_end(self.state, epoch, found.get("eval/knn_top1"))

    # -----------------------------------------------------------------------------------------------------------------
    # Start and end

    def _check_world(self) -> None:
        expected = int(os.environ.get("SIMCLR_EXPECTED_WORLD_SIZE", self.world.size))
        if self.world.size != expected:
            raise ConfigError(
                [
                    f"{expected} processes were asked for, but {self.world.size} run; on a machine without GPUs use "
                    "`python -m launcher local CONFIG --nproc N` (plain `accelerate launch --cpu` starts a single one)"
                ]
            )
        if self.config.train.global_batch_size % self.world.size:
            raise ConfigError(
                [
                    f"train.global_batch_size: {self.config.train.global_batch_size} does not divide over "
                    f"{self.world.size} processes"
                ]
            )

    def _build_probe(self) -> OnlineProbe | None:
        if not self.config.evaluation.online_probe:
            return None
        num_classes = int(describe(self.config.data.train).labels.max()) + 1
        if num_classes < 2:
            raise ConfigError(
                [
                    f"evaluation.online_probe: the labels of {self.config.data.train} name {num_classes} classes, "
                    "and a classifier needs two; switch it off, or train on labelled images"
                ]
            )
        return OnlineProbe(self.feature_dim, num_classes, self.device)

    def _open_monitor(self) -> Monitor:
        if not self.world.is_main:
            return SilentMonitor()
        run_dir = self.config.run_dir
        provenance.record(self.config)
        return RunMonitor(
            run_dir,
            self.config.monitor,
            total_steps=self.last_step,
            first_step=self.state.step,
            samples_seen=self.state.samples_seen,
            steps_per_epoch=self.steps_per_epoch,
            settings_of_run=self.config.model_dump(mode="json"),
        )

    def _announce_start(self) -> None:
        config = self.config
        if self.world.is_main:
            start = f"resumes at step {self.state.step}" if self.state.step else "starts at step 0"
            rows = start_rows(config, self.world, self.device, self.loader, self.plain_model, self.forward_flops)
            self.monitor.summarize("start", f"{config.name}: {start} of {self.last_step}", rows)
        if self.world.size > 1 and config.model.batch_norm == "per_device":
            self.monitor.warn(
                "model.batch_norm=per_device: statistics, and so results, depend on the number of devices"
            )
        if config.train.micro_batch_size is not None and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.plain_model.modules()
        ):
            self.monitor.warn(
                "train.micro_batch_size with BatchNorm: statistics are those of each micro-batch, so the gradient is "
                "that of a different (still well-defined) network than without it"
            )

    def _end(self, state: State) -> State:
        self.custody.set_status(state)
        self.custody.release()
        if state == "finished":
            self.monitor.finish(self.config.model_dump(mode="json"))
        started_s, samples_before = self._started
        rows = end_rows(
            self.config,
            self.monitor.latest,
            seconds=time.monotonic() - started_s,
            images=self.state.samples_seen - samples_before,
        )
        self.monitor.summarize("end", f"{state} at step {self.state.step} of {self.last_step}", rows)
        return state

    def _warn_on_main(self, text: str) -> None:
        if self.world.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # What is shown

    def _log(self, values: dict[str, float]) -> None:
        self.monitor.log(values, step=self.state.step, samples_seen=self.state.samples_seen)

    def _latest_outputs(self) -> tuple[Tensor, Tensor]:
        """h [2B, D] and z [2B, K] of the last step, view after view, whatever the micro-batches were."""
        h, z = (
            torch.cat([x.unflatten(0, (2, -1)) for x in part], dim=1).flatten(0, 1)
            for part in zip(*self.latest, strict=True)
        )
        return h, z

    def _check_health(self) -> None:
        started, wait_s = time.monotonic(), self.loader.wait_s
        since_s, waited_s = self._last_checkup
        h, z = self._latest_outputs()
        scaler = self.accelerator.scaler
        findings = self.checkup.examine(
            h,
            z,
            RankFacts((wait_s - waited_s) / max(started - since_s, 1e-9), memory_peak_gib(self.device)),
            grad_scale=scaler.get_scale() if scaler is not None else 1.0,
        )
        if self.world.is_main:
            self._log({**findings.scalars, "speed/health_check_s": time.monotonic() - started})
            self.monitor.log_histograms(findings.histograms, samples_seen=self.state.samples_seen)
            for warning in findings.warnings:
                self.monitor.warn(f"step {self.state.step}: {warning}")
        self._last_checkup = time.monotonic(), wait_s

    def _show_pairs(self, batch: Batch) -> None:
        n = min(self.config.monitor.image_pairs, self.batch_size_per_device)
        if n and self.world.is_main:
            with torch.no_grad():
                few = Batch(batch.views[:, :n], batch.sample_ids[:n], batch.labels[:n], batch.epoch)
                self.monitor.show_pairs(self.augment(few).cpu(), samples_seen=self.state.samples_seen)

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradients as the optimiser saw them (still scaled under fp16).

        NaN if there are none, as after a step that was skipped.
        """
        grads = [p.grad for p in self.plain_model.parameters() if p.grad is not None]
        if not grads:
            return torch.tensor(torch.nan)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


class _Interval:
    """Times the steps between two log lines."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        self._from_step = self.steps
        self._from_s = time.monotonic()
        self._from_wait_s = self.trainer.loader.wait_s

    def measure(self, loss: Tensor) -> dict[str, float]:
        trainer = self.trainer
        values = {"train/loss": float(loss), "train/grad_norm": float(trainer.grad_norm())}  # waits for the device
        elapsed_s = max(time.monotonic() - self._from_s, 1e-9)
        steps = self.steps - self._from_step
        images_per_s = steps * trainer.global_batch_size / elapsed_s
        values |= {
            "train/lr": trainer.optimizer.param_groups[0]["lr"],
            "speed/images_per_s": images_per_s,
            "speed/images_per_s_per_device": images_per_s / trainer.world.size,
            "speed/data_wait_share": (trainer.loader.wait_s - self._from_wait_s) / elapsed_s,
            "speed/memory_peak_gib": memory_peak_gib(trainer.device),
            "health/masked_duplicates": float(getattr(trainer.nt_xent, "masked_duplicates", 0)),
        }
        if trainer.probe is not None:
            values["train/probe_top1"], values["train/probe_top5"] = trainer.probe.recent_accuracy()
        if trainer.forward_flops:
            flops_per_s = train_flops(trainer.forward_flops) * images_per_s / trainer.world.size
            values["speed/model_tflops_per_device"] = flops_per_s / 1e12
            if peak := peak_flops(device_name(trainer.device), trainer.config.train.precision):
                values["speed/model_flops_utilization"] = flops_per_s / peak
        self.restart()
        return values
