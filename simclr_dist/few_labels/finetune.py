"""Supervised training on top of a pretrained encoder: fine-tuning with few labels, and the paper's linear evaluation.

fine_tune      all weights, SGD with Nesterov momentum 0.9, no weight decay, no warm-up, lr 0.05 x B/256, random crops
               and flips only; 60 epochs for 1 % of the labels, 30 for 10 % (Chen et al. 2020, appendix B.5).
linear_protocol  the classifier alone on a frozen encoder, lr 0.1 x B/256, 90 epochs (appendix B.6).

The learning rate falls by half a cosine over the whole training. On several ranks each computes its part of every
batch; BatchNorm's statistics and the gradient are those of the batch, so the number of ranks makes no difference. A
training that was cut off goes on where `Training.unfinished` stands. Distillation (distill.py) trains by the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.checkpoint.files import check_names
from simclr_dist.config import Precision
from simclr_dist.errors import StoppedError, UserError
from simclr_dist.evaluation.features import ImageBatch, frozen
from simclr_dist.few_labels.classifier import Classifier
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.few_labels.unfinished import Unfinished
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.network.precision import autocast
from simclr_dist.optim.schedule import LearningRate, set_learning_rate
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import raise_first, run_on_all_ranks
from simclr_dist.pixel_format import RGB, PixelFormat
from simclr_dist.run.stop_signals import SIGNALS
from simclr_dist.views.augment import normalize

FINE_TUNE_LR = 0.05  # for a batch of 256
LINEAR_LR = 0.1
LINEAR_EPOCHS = 90
Loss = Callable[[Tensor, ImageBatch], Tensor]
_KEEP, _STOP, _FAILED = 1, 2, 3  # what a rank asks for before a step; the most that one of them asks for is done


def default_epochs(share: float) -> int:
    """Epochs of fine-tuning with a share of the labels: 60 up to 1 %, 30 above (appendix B.5)."""
    return 60 if share <= 0.01 else 30


@dataclass(frozen=True)
class Training:
    """How to train, and where. base_lr: for a batch of 256. on_epoch(epoch, mean loss) is called after each epoch.

    unfinished: the file that keeps the training on the way, if one does. pixels: what the images are.
    """

    epochs: int
    base_lr: float = FINE_TUNE_LR
    weight_decay: float = 0.0
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None
    unfinished: Unfinished | None = None
    pixels: PixelFormat = RGB


def fine_tune(classifier: Classifier, data: RandomCrops, training: Training) -> None:
    """Trains every weight in place. Raises as `train_supervised` does."""
    convert_to_global_batch_norm(classifier.to(training.device)).train()
    train_supervised(classifier, classifier.parameters(), data, _cross_entropy(data), training)
    classifier.eval()


def linear_protocol(classifier: Classifier, data: RandomCrops, training: Training) -> None:
    """Trains `classifier.fc` in place; the backbone is frozen, and checked to be. Raises as above."""
    classifier.to(training.device)
    with frozen(classifier.backbone):
        train_supervised(_OnFrozen(classifier), classifier.fc.parameters(), data, _cross_entropy(data), training)
    classifier.eval()


class _OnFrozen(nn.Module):
    """The classifier without a gradient into its backbone."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor, row_keys: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            h = self.classifier.backbone(images)
        return self.classifier.fc(h)


def _cross_entropy(data: RandomCrops) -> Loss:
    return lambda logits, batch: F.cross_entropy(logits, batch[1], reduction="sum") / data.batch_size


def train_supervised(
    network: nn.Module, parameters: Iterable[nn.Parameter], data: RandomCrops, loss_of: Loss, training: Training
) -> None:
    """SGD with Nesterov momentum. All ranks together.

    network(images, row_keys) gives logits; the caller sets training or evaluation mode. loss_of(logits [b, C] float32,
    batch on the device): this rank's part of a batch's loss, which is the sum over all ranks.
    Raises FloatingPointError when the mean loss of an epoch is not finite, StoppedError after a stop signal, DataError
    for an image that cannot be read, and what `Unfinished.read` raises; on other ranks FailedElsewhereError.
    """
    device = torch.device(training.device)
    state = _State(network, list(parameters), training)
    num_steps = training.epochs * data.batches_per_epoch
    schedule = LearningRate(training.base_lr * data.batch_size / 256, 0.0, float(num_steps * data.batch_size))
    step = state.restore()
    with SIGNALS:
        while step < num_steps:
            epoch, first_batch = divmod(step, data.batches_per_epoch)
            batches = data.epoch(epoch, first_batch)
            for _ in range(first_batch, data.batches_per_epoch):
                batch, request = _next_together(batches, training, device)
                if request:
                    state.keep(step)
                if request == _STOP:
                    raise StoppedError(f"stopped after {step:,} of {num_steps:,} steps; the same command goes on")
                set_learning_rate(state.optimizer, schedule(step * data.batch_size))
                row_keys = draw_keys(data.seed, epoch, step, batch[2].numpy(), device)[0]  # an image has one view
                state.update(_on_device(batch, device), loss_of, row_keys)
                step += 1
            state.end_epoch(epoch, data.batches_per_epoch)
        state.keep(step)


def _next_together(batches: Iterator[ImageBatch], training: Training, device: torch.device) -> tuple[ImageBatch, int]:
    """The next batch, and what is asked for before it: nothing (0), _KEEP or _STOP; the same on all ranks.

    If one of them cannot read its part, all raise. The device works on the step before meanwhile.
    """
    batch, failure = None, None
    try:
        batch = next(batches)
    except (UserError, OSError) as error:
        failure = error
    is_due = training.unfinished is not None and distributed.rank() == 0 and training.unfinished.is_due()
    asked = _FAILED if failure is not None else _STOP if SIGNALS.heard else _KEEP if is_due else 0
    request = distributed.agree_on_max(asked, device)()
    if request == _FAILED:
        raise_first(failure, device)
    assert batch is not None
    return batch, request


def _on_device(batch: ImageBatch, device: torch.device) -> ImageBatch:
    images, labels, sample_ids = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True), sample_ids


class _State:
    """All that a training has to keep: the network, its optimiser, and this rank's part of the epoch's loss so far."""

    def __init__(self, network: nn.Module, parameters: list[nn.Parameter], training: Training) -> None:
        self.network, self.parameters, self.training = network, parameters, training
        self.device = torch.device(training.device)
        self.optimizer = torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=training.weight_decay
        )
        fp16 = training.precision == "fp16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.loss_sum = torch.zeros((), device=self.device)

    def update(self, batch: ImageBatch, loss_of: Loss, row_keys: Tensor) -> None:
        with autocast(self.device, self.training.precision):
            logits = self.network(normalize(batch[0], self.training.pixels), row_keys)
        loss = loss_of(logits.float(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        distributed.all_reduce_sum_many_(p.grad for p in self.parameters if p.grad is not None)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss.detach()

    def end_epoch(self, epoch: int, num_batches: int) -> None:
        mean_loss = distributed.all_reduce_sum_(self.loss_sum.clone()).item() / num_batches

        def check() -> None:
            if not mean_loss < float("inf"):
                raise FloatingPointError(
                    f"the loss of epoch {epoch + 1} is {mean_loss}: lower the learning rate "
                    f"(now {self.training.base_lr:g} x B/256)"
                )

        run_on_all_ranks(check, self.device, catch=FloatingPointError)
        self.loss_sum.zero_()
        self.training.on_epoch(epoch, mean_loss)

    def keep(self, step: int) -> None:
        if self.training.unfinished is not None:
            self.training.unfinished.write(step, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        scale = torch.tensor([self.scaler.get_scale(), self.scaler._get_growth_tracker()])
        momentum = {
            f"momentum/{i}": self.optimizer.state[p]["momentum_buffer"]
            for i, p in enumerate(self.parameters)
            if p in self.optimizer.state
        }
        network = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        return {"losses": distributed.all_gather(self.loss_sum[None]), "loss_scale": scale, **momentum, **network}

    def restore(self) -> int:
        """The step from which to go on. Raises what `Unfinished.read` raises, and CheckpointError."""
        unfinished = self.training.unfinished
        found = unfinished.read() if unfinished is not None else None
        if unfinished is None or found is None:
            return 0
        step, tensors = found
        saved = {name.removeprefix("network/"): x for name, x in tensors.items() if name.startswith("network/")}
        check_names(unfinished.path, "network", saved, self.network.state_dict())
        self.network.load_state_dict(saved)
        for i, parameter in enumerate(self.parameters):
            if (momentum := tensors.get(f"momentum/{i}")) is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        if self.scaler.is_enabled():
            scale, tracker = tensors["loss_scale"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})
        losses, rank = tensors["losses"], distributed.rank()
        if len(losses) == distributed.world_size():
            self.loss_sum.copy_(losses[rank])
        elif rank == 0:  # they are of another number of ranks
            self.loss_sum.copy_(losses.sum())
        return step
