"""The training of one run: a step that reads aloud, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.data.batch import make_ready
from simclr_dist.health.check import Recording
from simclr_dist.loss import checked_after_the_backward
from simclr_dist.monitor.speed import Speed
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.optim.schedule import set_learning_rate
from simclr_dist.run import history
from simclr_dist.run.status import State
from simclr_dist.run.stop_requests import Request, Requests
from simclr_dist.training.non_finite import NonFiniteGradientError, StepFacts
from simclr_dist.training.observers import build_observers
from simclr_dist.training.parts import build
from simclr_dist.training.step import FinishedStep, StepResult
from simclr_dist.training.summary import show_end, show_start


class Trainer:
    """Pretrains as `config` says, on all processes together.

    All of them construct it and call `fit`; a subclass may exchange `augment` and `nt_xent` in between. Raises a
    UserError on the first failing rank and FailedElsewhereError on the others.
    """

    def __init__(self, config: Config) -> None:
        self.parts = build(config)
        self.config = config = self.parts.config
        self.state = self.parts.state
        self.augment: Callable[[Batch], Tensor] = self.parts.augment
        self.nt_xent: Callable[[Tensor, Tensor], Tensor] = self.parts.nt_xent
        self.global_batch_size = config.train.global_batch_size
        self.batch_size_per_device = self.global_batch_size // self.parts.world.size

    # -----------------------------------------------------------------------------------------------------------------
    # The step

    def train_step(self, batch: Batch) -> StepResult:
        """One update from this rank's share of a global batch. Raises NonFiniteError."""
        accelerator, optimizer = self.parts.accelerator, self.parts.optimizer
        self._seed_step(self.parts.world.rank)
        row_keys = self._row_keys(batch)
        set_learning_rate(optimizer, self.learning_rate())
        views = self.augment(batch)  # [V, B, ...]
        with self.parts.health.record(self.state.step + 1) as recording, checked_after_the_backward():
            loss, h, z = self.backward(views, self._ids_of_loss(batch), row_keys)
        if self.config.optim.max_grad_norm is not None:
            accelerator.clip_grad_norm_(self.parts.model.parameters(), self.config.optim.max_grad_norm)
        if accelerator.scaler is not None:
            return self._step_with_loss_scale(batch, loss, h, z, recording)
        grad_norm = self.grad_norm()
        self.parts.non_finite.check_gradient(grad_norm, self._facts(batch))
        optimizer.step()
        self.parts.nt_xent.limit_temperature()
        return StepResult(loss, grad_norm, h, z, recording)

    def _step_with_loss_scale(
        self, batch: Batch, loss: Tensor, h: Tensor, z: Tensor, recording: Recording | None
    ) -> StepResult:
        """fp16: the scaler skips steps until its scale fits. Below a scale of 1 the gradient itself is infinite."""
        scaler = self.parts.accelerator.scaler
        used = scaler.get_scale() if recording is not None else 1.0  # the step may change it
        self.parts.optimizer.step()
        if self.parts.optimizer.step_was_skipped and scaler.get_scale() < 1:
            raise NonFiniteGradientError("the gradient is infinite in fp16 at any loss scale", self._facts(batch))
        self.parts.nt_xent.limit_temperature()
        return StepResult(loss, self.grad_norm(), h, z, recording, loss_scale=used)

    def backward(self, views: Tensor, ids: Tensor, row_keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of the global loss to the parameters.

        views: [V, B, ...]. ids: [B], which samples belong together, see `_ids_of_loss`.
        row_keys: [V, B, 2], what dropout and its like draw from; None: from torch's generator.
        Returns the loss [], h [V*B, D] and z [V*B, K], view after view, all detached.
        """
        self.parts.optimizer.zero_grad(set_to_none=True)
        if self.parts.shards is not None or self.config.train.micro_batch_size is not None:
            return self._backward_in_parts(views, ids, row_keys)
        rows = [x.flatten(0, 1) for x in (views, row_keys) if x is not None]
        h, z = self.parts.model(*rows)  # [V*B, D], [V*B, K]
        loss = self.nt_xent(z, ids)  # negatives from every rank
        self.parts.accelerator.backward(loss)
        return loss.detach(), h.detach(), z.detach()

    def _backward_in_parts(self, views: Tensor, ids: Tensor, row_keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """In shards or in micro-batches."""
        outputs: list[tuple[Tensor, Tensor]] = []
        common: dict[str, Any] = {
            "row_keys": row_keys,
            "loss_parameters": self.parts.nt_xent.parameters(),
            "backward": self.parts.accelerator.backward,
            "observe": outputs.append,
        }
        if self.parts.shards is not None:
            loss = self.parts.shards.backward(views, ids, self.nt_xent, begin_shard=self._seed_step, **common)
        else:
            size = self.config.train.micro_batch_size or len(ids)
            loss = backward_in_micro_batches(
                self.parts.model, views, lambda z: self.nt_xent(z, ids), micro_batch_size=size, **common
            )
        h, z = (
            torch.cat([x.unflatten(0, (len(views), -1)) for x in part], dim=1).flatten(0, 1)
            for part in zip(*outputs, strict=True)
        )
        return loss, h, z

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradients, []; NaN if there are none."""
        grads = [p.grad for p in self.parts.network.parameters() if p.grad is not None]
        if not grads:
            return torch.tensor(torch.nan)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def learning_rate(self) -> float:
        """Of the next step."""
        return self.parts.schedule(self.state.samples_seen)

    def _ids_of_loss(self, batch: Batch) -> Tensor:
        """[B]: what the loss is called with beside z. SupCon compares classes, the others images or groups of them."""
        if self.config.loss.kind == "supcon":
            return batch.labels
        return batch.sample_ids if batch.group_ids is None else batch.group_ids

    def _row_keys(self, batch: Batch) -> Tensor | None:
        """[V, B, 2] for the modules that draw by key; None: there are none."""
        if not self.parts.random_layers.keyed:
            return None
        return draw_keys(
            self.config.seed,
            batch.epoch,
            self.state.step,
            batch.host_ids,
            self.parts.device,
            num_views=self.config.data.num_views,
        )

    def _seed_step(self, part: int) -> None:
        """For modules that draw from torch's generator all the same: a resume on as many processes draws the same.

        part: of the global batch, a rank's or a shard.
        """
        words = np.random.SeedSequence([self.config.seed, self.state.step, part]).generate_state(2, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _facts(self, batch: Batch) -> StepFacts:
        return StepFacts(self.state.step, self.learning_rate(), batch.sample_ids)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop

    def fit(self) -> State:
        """Trains to the last step or until asked to stop; how it ended: finished, preempted or stopped."""
        with self._session() as requests:
            if self.state.step >= self.parts.last_step:
                return self._end("finished")
            requests.announce()
            if (request := requests.agreed()) >= Request.STOP:  # heard while the parts were built
                return self._stop(requests, request)
            self._rebuild_ddp_buckets()
            observers = build_observers(self.config, self.parts, self.augment, self.nt_xent, self._speed)
            observers.begin(self.state)
            for batch, began_s, waited_s in self._batches():
                requests.ask(self.parts.saver.wish(self.state.step + 1))
                requests.announce()
                result = self.parts.non_finite.run(self.train_step, batch, self._facts(batch))
                self.state.advance(self.global_batch_size)
                finished = self._finished_step(batch, result, began_s, waited_s)
                observers.after_step(finished)
                request = requests.agreed()
                with self._speed.paused():
                    self.parts.saver.after_step(finished, self.state, request)
                if finished.is_last:
                    return self._end("finished")
                if request >= Request.STOP:
                    return self._stop(requests, request)
        raise AssertionError("the loader ended before the run did")

    @contextmanager
    def _session(self) -> Iterator[Requests]:
        """Everything that must be closed however the training ends."""
        parts = self.parts
        with ExitStack() as stack:
            stack.enter_context(parts.guard.watchdog)  # first, so that it also watches the closing of the others
            stack.enter_context(parts.loader)
            stack.enter_context(parts.monitor)
            requests = stack.enter_context(Requests(self.config.run_dir, parts.device))
            stack.callback(parts.saver.close)
            stack.callback(parts.guard.closing)
            parts.guard.set_status("running")
            show_start(self.config, parts)
            if self.config.data.cache_dir is not None:
                with parts.guard.fetching():
                    make_ready(parts.loader, self.state.step)
            parts.guard.first_step_begins()
            self._speed = Speed(self.state.samples_seen)
            yield requests

    def _batches(self) -> Iterator[tuple[Batch, float, float]]:
        """Batches from the next step on; when the loop began to wait for each, and what the loader's wait was then."""
        parts, first = self.parts, True
        batches = parts.loader.batches(self.state.step)
        while True:
            parts.guard.begin(f"waiting for {parts.kind.noun}s", first=first)
            began_s, waited_s = time.monotonic(), parts.loader.wait_s
            batch = next(batches, None)
            if batch is None:
                return
            parts.guard.begin("training", first=first)
            yield batch, began_s, waited_s
            if first:
                parts.guard.first_step_done()
            first = False

    def _finished_step(self, batch: Batch, result: StepResult, began_s: float, waited_s: float) -> FinishedStep:
        epoch, left = divmod(self.state.step, self.parts.steps_per_epoch)
        return FinishedStep(
            batch,
            result,
            self.state.step,
            self.state.samples_seen,
            began_s,
            waited_s,
            ended_epoch=None if left else epoch,
            is_last=self.state.step >= self.parts.last_step,
            figures={},
        )

    def _rebuild_ddp_buckets(self) -> None:
        """A dummy backward, so that DDP rebuilds its buckets before the first step. All ranks together.

        DDP orders its buckets anew after its first backward. From three ranks on, a gradient's place decides in which
        order the ranks' shares are added, so without this the first step of a resume would round differently.
        """
        parts, B, V = self.parts, self.batch_size_per_device, self.config.data.num_views
        if parts.world.size < 3 or parts.shards is not None:
            return
        parts.guard.begin("rebuilding DDP's buckets", first=True)
        buffers = [b.clone() for b in parts.network.buffers()]
        views = parts.kind.inputs.example(V * B).unflatten(0, (V, B))
        self.backward(views.to(parts.device), torch.arange(B, device=parts.device) + parts.world.rank * B)
        parts.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(parts.network.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _stop(self, requests: Requests, request: Request) -> State:
        if self.parts.world.is_main:
            requests.forget_files()
        return self._end("preempted" if request == Request.PREEMPT else "stopped")

    def _end(self, state: State) -> State:
        parts = self.parts
        parts.guard.set_status(state)
        parts.guard.release()
        if state == "finished":
            parts.monitor.finish(self.config.model_dump(mode="json"))
        if parts.world.is_main and self.state.samples_seen > self._speed.first_sample:
            history.record_end(self.config.run_dir, state, self.state.step)
        show_end(self.config, parts, state, self._speed)
        return state
