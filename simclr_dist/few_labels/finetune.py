"""Supervised training on top of a pretrained encoder: fine-tuning with few labels, and the paper's linear evaluation.

fine_tune      all weights, SGD with Nesterov momentum 0.9, no weight decay, no warm-up, lr 0.05 x B/256, random crops
               and flips only; 60 epochs for 1 % of the labels, 30 for 10 % (Chen et al. 2020, appendix B.5).
linear_protocol  the classifier alone on a frozen encoder, lr 0.1 x B/256, 90 epochs (appendix B.6).

The learning rate falls by half a cosine over the whole training. One process and one device. Distillation (distill.py)
trains by the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import Precision
from simclr_dist.evaluation.features import ImageBatch, frozen
from simclr_dist.few_labels.classifier import Classifier
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.network.precision import autocast
from simclr_dist.optim.schedule import LearningRate, set_learning_rate
from simclr_dist.views.augment import normalize

FINE_TUNE_LR = 0.05  # for a batch of 256
LINEAR_LR = 0.1
LINEAR_EPOCHS = 90
Loss = Callable[[Tensor, ImageBatch], Tensor]


def default_epochs(share: float) -> int:
    """Epochs of fine-tuning with a share of the labels: 60 up to 1 %, 30 above (appendix B.5)."""
    return 60 if share <= 0.01 else 30


@dataclass(frozen=True)
class Training:
    """How to train, and where. base_lr: for a batch of 256. on_epoch(epoch, mean loss) is called after each epoch."""

    epochs: int
    base_lr: float = FINE_TUNE_LR
    weight_decay: float = 0.0
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None


def fine_tune(classifier: Classifier, data: RandomCrops, training: Training) -> None:
    """Trains every weight in place. Raises FloatingPointError on NaN."""
    classifier.to(training.device).train()
    train_supervised(classifier, classifier.parameters(), data, _cross_entropy, training)
    classifier.eval()


def linear_protocol(classifier: Classifier, data: RandomCrops, training: Training) -> None:
    """Trains `classifier.fc` in place; the backbone is frozen, and checked to be. Raises FloatingPointError on NaN."""
    classifier.to(training.device)
    with frozen(classifier.backbone):
        train_supervised(_OnFrozen(classifier), classifier.fc.parameters(), data, _cross_entropy, training)
    classifier.eval()


class _OnFrozen(nn.Module):
    """The classifier without a gradient into its backbone."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.classifier.backbone(images)
        return self.classifier.fc(h)


def _cross_entropy(logits: Tensor, batch: ImageBatch) -> Tensor:
    return F.cross_entropy(logits, batch[1])


def train_supervised(
    network: nn.Module, parameters: Iterator[nn.Parameter], data: RandomCrops, loss_of: Loss, training: Training
) -> None:
    """SGD with Nesterov momentum on loss_of(logits [b, C] float32, batch on the device).

    The caller sets training or evaluation mode. Raises FloatingPointError when the mean loss of an epoch is not finite.
    """
    device, precision = torch.device(training.device), training.precision
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")
    optimizer = torch.optim.SGD(
        list(parameters), lr=0.1, momentum=0.9, nesterov=True, weight_decay=training.weight_decay
    )
    total = float(training.epochs * data.batches_per_epoch * data.batch_size)
    schedule = LearningRate(training.base_lr * data.batch_size / 256, 0.0, total)
    samples_seen = 0
    for epoch in range(training.epochs):
        loss_sum = torch.zeros((), device=device)
        for batch in _on_device(data.epoch(epoch), device):
            set_learning_rate(optimizer, schedule(samples_seen))
            with autocast(device, precision):
                logits = network(normalize(batch[0]))
            loss = loss_of(logits.float(), batch)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
            samples_seen += len(batch[0])
        mean_loss = loss_sum.item() / data.batches_per_epoch
        if not mean_loss < float("inf"):
            raise FloatingPointError(
                f"the loss of epoch {epoch + 1} is {mean_loss}: lower the learning rate "
                f"(now {training.base_lr:g} x B/256)"
            )
        training.on_epoch(epoch, mean_loss)


def _on_device(batches: Iterator[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    for images, labels, sample_ids in batches:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), sample_ids
