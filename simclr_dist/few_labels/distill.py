"""Distillation of a fine-tuned teacher into a student with unlabelled images (SimCLR v2, arXiv 2006.10029, section 2).

With P = softmax(logits / T), the loss over all images x (eq. 2) and, where labels y are known, eq. 3:

    L = alpha mean_x [ - sum_c P_teacher(c|x) log P_student(c|x) ] + (1 - alpha) mean_(x,y) [ - log softmax(student)_y ]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import Precision
from simclr_dist.evaluation.features import ImageBatch, frozen
from simclr_dist.few_labels.classifier import Classifier
from simclr_dist.few_labels.finetune import Training, train_supervised
from simclr_dist.few_labels.random_crops import RandomCrops
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.precision import autocast
from simclr_dist.parallel import distributed
from simclr_dist.pixel_format import PixelFormat
from simclr_dist.views.augment import normalize


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    *,
    batch_size: int | None = None,
) -> Tensor:
    """The loss above for logits [n, C]; labels int64 [n], negative where unknown, weigh 1 - alpha (0: eq. 2).

    batch_size: these rows are a rank's part of so many; the losses of all ranks add up to that of the batch.
    """
    n = batch_size or len(student)
    soft = F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1), reduction="sum") / n
    if labels is None or alpha == 1:
        return soft
    known = (labels >= 0).sum()
    if batch_size is not None:
        distributed.all_reduce_sum_(known)
    # A batch without any label has a labelled term of zero, not 0/0.
    hard = F.cross_entropy(student, labels, ignore_index=-1, reduction="sum") / known.clamp_min(1)
    return alpha * soft + (1 - alpha) * hard


def distil(
    teacher: nn.Module,
    student: Classifier,
    data: RandomCrops,
    training: Training,
    *,
    labelled_ids: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    teacher_pixels: PixelFormat | None = None,
) -> None:
    """Trains the student in place on all images of `data`; the teacher is frozen, and checked to be.

    Labels are looked at for the samples in labelled_ids only, and only with alpha below 1. teacher_pixels: where it
    has learnt from images that were normalised otherwise.
    """
    teacher.to(training.device)
    convert_to_global_batch_norm(student.to(training.device)).train()
    # A student in fp16 has a teacher in float32, whose logits cannot overflow.
    precision: Precision = "fp32" if training.precision == "fp16" else training.precision
    seen_by_teacher = teacher_pixels or training.pixels
    known = labelled_ids if labelled_ids is not None else torch.empty(0, dtype=torch.int64)

    def loss_of(logits: Tensor, batch: ImageBatch) -> Tensor:
        images, labels, sample_ids = batch
        with torch.no_grad(), autocast(images.device, precision):
            teacher_logits = teacher(normalize(images, seen_by_teacher)).float()
        seen = torch.where(torch.isin(sample_ids, known).to(labels.device), labels, -1)
        return distillation_loss(logits, teacher_logits, temperature, seen, alpha, batch_size=data.batch_size)

    with frozen(teacher):
        train_supervised(student, student.parameters(), data, loss_of, training)
    student.eval()
