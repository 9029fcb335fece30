"""SimCLR on CIFAR-10 in plain torch, by none of our code but the reading of files: the control of cifar10_clock.py.

    python -m benchmarks.cifar10_plain --train cifar10_train.beton --test cifar10_test.beton --epochs 30

The recipe of configs/cifar10_resnet18_100ep.yaml, all on one device: images, views, loss and kNN. What differs: the
first convolution starts as torch's do, no BatchNorm is behind the head, weight decay is on all parameters, hue is
turned in YIQ, a batch has its operations on colours in one order, and a crop too wide is cut, not drawn again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from simclr_dist.data.loading.pillow_images import BetonSource

BATCH, RATE, DECAY, TEMPERATURE = 512, 0.12, 5e-4, 0.5
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
GREY = (0.299, 0.587, 0.114)
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    (images, labels), (test_images, test_labels) = (load(path, device) for path in (args.train, args.test))
    begin = time.monotonic()
    encoder, losses = pretrain(images, args.epochs)
    seconds = time.monotonic() - begin
    known, asked = features(encoder, images), features(encoder, test_images)
    found = {"epochs": args.epochs, "seconds": seconds, "losses": losses}
    for k in (10, 200):
        found[f"knn{k}"] = knn_top1(known, labels, asked, test_labels, k)
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def load(path: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, 32, 32] and int64 [n]."""
    source = BetonSource(path)
    pixels = np.stack([source.read(i) for i in range(len(source.labels))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), torch.tensor(source.labels, device=device).long()


def pretrain(images: Tensor, epochs: int) -> tuple[nn.Module, list[float]]:
    """The encoder, and the loss of every hundredth step."""
    torch.manual_seed(0)
    encoder = resnet18()
    encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    encoder.maxpool, encoder.fc = nn.Identity(), nn.Identity()
    head = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 128))
    model = nn.Sequential(encoder, head)
    model.to(images.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    while schedule.last_epoch < steps:
        order = torch.randperm(len(images), device=images.device)
        for ids in order[: len(order) // BATCH * BATCH].split(BATCH):
            views = torch.cat([view(images[ids]), view(images[ids])])
            with torch.autocast(images.device.type, torch.bfloat16):
                z = model(views)
            loss = nt_xent(z.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if schedule.last_epoch % 100 == 0:
                losses.append(loss.item())
    return encoder, losses


def nt_xent(z: Tensor) -> Tensor:
    """z [2 B, K], the second views behind the first."""
    z = F.normalize(z)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def view(x: Tensor) -> Tensor:
    """A normalised random view of each image of uint8 [n, 3, S, S]."""
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1, device=x.device).uniform_(low, high)

    y = crop(x.float() / 255, draw)
    jittered = y
    for operation in torch.randperm(4).tolist():
        factor = draw(0.6, 1.4)
        if operation == 0:
            jittered = jittered * factor
        elif operation == 1:
            jittered = torch.lerp(grey(jittered).mean((1, 2, 3), keepdim=True), jittered, factor)
        elif operation == 2:
            jittered = torch.lerp(grey(jittered).expand_as(jittered), jittered, factor)
        else:
            jittered = turn_hue(jittered, 2 * math.pi * draw(-0.1, 0.1))
        jittered = jittered.clamp(0, 1)
    y = torch.where(draw(0, 1) < 0.8, jittered, y)
    y = torch.where(draw(0, 1) < 0.1, grey(y), y)
    return normalized(y)


def crop(x: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
    """RandomResizedCrop from 20 % of the area on, and a flip."""
    n = len(x)
    area, ratio = draw(0.2, 1.0).view(n), draw(math.log(3 / 4), math.log(4 / 3)).view(n).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    place = torch.zeros(n, 2, 3, device=x.device)
    place[:, 0, 0] = width * torch.where(draw(0, 1).view(n) < 0.5, -1.0, 1.0)
    place[:, 1, 1] = height
    place[:, 0, 2] = draw(-1, 1).view(n) * (1 - width)
    place[:, 1, 2] = draw(-1, 1).view(n) * (1 - height)
    grid = F.affine_grid(place, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def grey(x: Tensor) -> Tensor:
    return torch.einsum("c,nchw->nhw", x.new_tensor(GREY), x)[:, None]


def turn_hue(x: Tensor, angle: Tensor) -> Tensor:
    to_yiq = x.new_tensor(YIQ)
    y, i, q = torch.einsum("ij,njhw->nihw", to_yiq, x).split(1, dim=1)
    turned = torch.cat([y, i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()], dim=1)
    return torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_yiq), turned)


def normalized(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor) -> Tensor:
    encoder.eval()
    return torch.cat([F.normalize(encoder(normalized(part.float() / 255))) for part in images.split(1000)])


def knn_top1(known: Tensor, labels: Tensor, asked: Tensor, asked_labels: Tensor, k: int) -> float:
    """Weighted votes, temperature 0.1."""
    right = 0
    for h, truth in zip(asked.split(1000), asked_labels.split(1000), strict=True):
        similarity, nearest = (h @ known.T).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(h), int(labels.max()) + 1, device=h.device)
        votes.scatter_add_(1, labels[nearest], (similarity / 0.1).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(asked)


if __name__ == "__main__":
    main()
