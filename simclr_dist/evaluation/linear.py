"""Linear evaluation on cached features: multinomial logistic regression, its weight decay chosen on held-out images.

Features are standardised with the training set's mean and deviation. The weight decay is swept on a class-stratified
tenth of the *training* images, then the classifier is fitted to all of them; test images serve the result only.

Letters: n images, D width of h, C classes. Minimised, for weights W [D, C] and a bias b [C] without decay:

    mean_i cross_entropy(h_i W + b, y_i) + weight_decay / 2 |W|^2

(scikit-learn's LogisticRegression(C=1 / (n weight_decay)).)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.labels import check_labels, split_by_class

WEIGHT_DECAYS = tuple(10.0**-i for i in range(7))  # 1 ... 1e-6: each fit starts where the stronger ended
HELD_OUT = 0.1
PATIENCE = 2  # weaker decays tried after the held-out loss has begun to rise
CHUNK_ROWS = 16_384  # keeps logits small and in cache
SWEEP_TOLERANCE, FINAL_TOLERANCE = 1e-4, 1e-5  # of the largest gradient; the sweep only has to rank
SGD_BATCH_SIZE = 256
SGD_EPOCHS = 60


@dataclass(frozen=True)
class LinearResult:
    """Shares of the test images between 0 and 1, the chosen weight decay, and the classifier h weight^T + bias.

    weight [C, D] and bias [C] take features as the encoder gives them: the standardisation is folded in.
    """

    top1: float
    top5: float
    weight_decay: float
    weight: Tensor
    bias: Tensor

    def predict(self, h: Tensor) -> Tensor:
        """Logits [n, C] of features h [n, D]."""
        return F.linear(h, self.weight, self.bias)


@dataclass(frozen=True)
class _Fit:
    weight: Tensor  # [D, C]
    bias: Tensor  # [C]


def linear_probe(
    train: Features,
    test: Features,
    *,
    num_classes: int,
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Fits to `train`, reports on `test`. `seed` draws the held-out tenth and, for sgd, the order of images.

    Raises DataError when the labels do not fit, or when no class has a second image to hold out.
    """
    check_labels(train, test, num_classes)
    deviation, mean = torch.std_mean(train.h.to(device), dim=0, correction=0)
    constant = deviation <= 1e-6 * deviation.max()
    scale = torch.where(constant, 0.0, 1 / deviation.clamp_min(torch.finfo(torch.float32).tiny))
    x, y = (train.h.to(device) - mean) * scale, train.labels.to(device)
    fit_rows, held_rows = (rows.to(device) for rows in split_by_class(train.labels, HELD_OUT, seed))
    if len(held_rows) == 0:
        raise DataError("every class has a single training image: none can be held out to choose the weight decay")

    fits = _path_lbfgs if method == "lbfgs" else _path_sgd
    weight_decay, start = _choose(
        fits(x[fit_rows], y[fit_rows], num_classes, WEIGHT_DECAYS, seed), x[held_rows], y[held_rows]
    )
    if method == "lbfgs":
        fit = _Curvature(x).fit(x, y, weight_decay, start, FINAL_TOLERANCE)
    else:
        fit = _fit_sgd(x, y, num_classes, (weight_decay,), seed)[0]

    weight = (scale[:, None] * fit.weight).T.float()
    bias = (fit.bias - weight.to(fit.bias.dtype) @ mean.to(fit.bias.dtype)).float()
    correct = _correct(F.linear(test.h.to(device), weight, bias), test.labels.to(device))
    top1, top5 = (correct.double() / len(test)).tolist()
    return LinearResult(top1, top5, weight_decay, weight.cpu(), bias.cpu())


def _choose(path: Iterator[tuple[float, _Fit]], x: Tensor, y: Tensor) -> tuple[float, _Fit]:
    """The weight decay with the best held-out top-1 (ties: the lower loss), and its fit."""
    best: tuple[tuple[float, float], float, _Fit] | None = None
    lowest_loss, since_lowest = float("inf"), 0
    for weight_decay, fit in path:
        logits = x @ fit.weight.float() + fit.bias.float()
        loss = F.cross_entropy(logits, y).item()
        score = (int(_correct(logits, y)[0]), -loss)
        if best is None or score > best[0]:
            best = (score, weight_decay, fit)
        since_lowest = 0 if loss < lowest_loss else since_lowest + 1
        lowest_loss = min(loss, lowest_loss)
        if since_lowest >= PATIENCE:
            break
    assert best is not None
    return best[1], best[2]


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first and among the first five, int64 [2]."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


# ---------------------------------------------------------------------------------------------------------------------
# L-BFGS


class _Curvature:
    """L-BFGS along the principal axes of standardised features, scaled so that the objective is nearly isotropic.

    At W = 0 the Hessian is close to covariance / C + weight_decay. Searching for V with W = Q diag(s) V, Q the
    covariance's eigenvectors and s = (eigenvalue / C + weight_decay)^-1/2, L-BFGS needs half as many steps, and one
    tolerance of the gradient fits every weight decay.
    """

    def __init__(self, x: Tensor) -> None:
        self.eigenvalues, self.axes = torch.linalg.eigh((x.T @ x / len(x)).double())

    def fit(self, x: Tensor, y: Tensor, weight_decay: float, start: _Fit, tolerance: float) -> _Fit:
        """The minimum for features x float32 [n, D] and labels y [n]: matrix products in float32, sums in float64."""
        n, (D, C) = len(x), start.weight.shape
        # Classes first: sums over them then run along whole cache lines, 1.5 times as fast with ten classes.
        targets = F.one_hot(y, C).T.to(x.dtype).contiguous()
        s = (self.eigenvalues.clamp_min(0) / C + weight_decay).rsqrt()[:, None]
        v = ((self.axes.T @ start.weight) / s).requires_grad_()
        b = start.bias.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [v, b],
            max_iter=300,
            tolerance_grad=tolerance,
            tolerance_change=1e-9,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective() -> Tensor:
            weight, bias = (self.axes @ (s * v)).T.float(), b[:, None].float()
            loss = v.new_zeros(())
            slope, bias_slope = v.new_zeros((C, D)), v.new_zeros(C)
            for x_part, target in zip(x.split(CHUNK_ROWS), targets.split(CHUNK_ROWS, dim=1), strict=True):
                logits = torch.addmm(bias, weight, x_part.T)
                normaliser = logits.logsumexp(dim=0)
                loss += normaliser.sum(dtype=torch.float64) - (logits * target).sum(dtype=torch.float64)
                residual = (logits - normaliser).exp_().sub_(target)
                slope += residual @ x_part
                bias_slope += residual.sum(dim=1, dtype=torch.float64)
            v.grad = s * (self.axes.T @ slope.T) / n + weight_decay * s.square() * v
            b.grad = bias_slope / n
            return loss / n + weight_decay / 2 * (s * v).square().sum()

        solver.step(objective)
        return _Fit((self.axes @ (s * v)).detach(), b.detach())


def _path_lbfgs(
    x: Tensor, y: Tensor, num_classes: int, weight_decays: tuple[float, ...], seed: int
) -> Iterator[tuple[float, _Fit]]:
    """Fits from the strongest decay to the weakest, each started from the one before. Deterministic; ignores `seed`."""
    curvature = _Curvature(x)
    zeros = x.new_zeros((x.shape[1] + 1, num_classes), dtype=torch.float64)
    fit = _Fit(zeros[:-1], zeros[-1])
    for weight_decay in weight_decays:
        fit = curvature.fit(x, y, weight_decay, fit, SWEEP_TOLERANCE)
        yield weight_decay, fit


# ---------------------------------------------------------------------------------------------------------------------
# SGD, the procedure of most papers: for figures to compare with theirs


def _path_sgd(
    x: Tensor, y: Tensor, num_classes: int, weight_decays: tuple[float, ...], seed: int
) -> Iterator[tuple[float, _Fit]]:
    yield from zip(weight_decays, _fit_sgd(x, y, num_classes, weight_decays, seed), strict=True)


def _fit_sgd(x: Tensor, y: Tensor, num_classes: int, weight_decays: tuple[float, ...], seed: int) -> list[_Fit]:
    """SGD with momentum 0.9 and a cosine learning rate, all M weight decays side by side in one matrix product."""
    n, D, M = len(x), x.shape[1], len(weight_decays)
    decay = torch.tensor(weight_decays, device=x.device)[None, :, None]
    weight, bias = x.new_zeros((D, M, num_classes)), x.new_zeros((M, num_classes))
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    # The Hessian of cross-entropy is at most half the covariance (Boehning 1992), so this is a safe step length.
    base_lr = 1 / (0.5 * float(torch.linalg.matrix_norm(x.T @ x / n, ord=2)) + max(weight_decays))
    generator = torch.Generator().manual_seed(seed)
    num_steps, step = SGD_EPOCHS * -(-n // SGD_BATCH_SIZE), 0
    for _ in range(SGD_EPOCHS):
        for rows in torch.randperm(n, generator=generator).to(x.device).split(SGD_BATCH_SIZE):
            lr = base_lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / num_steps)).item())
            residual = ((x[rows] @ weight.flatten(1)).unflatten(1, (M, num_classes)) + bias).softmax(dim=2)
            residual.sub_(F.one_hot(y[rows], num_classes)[:, None, :]).div_(len(rows))
            slope = (x[rows].T @ residual.flatten(1)).view_as(weight).addcmul_(decay, weight)
            weight -= lr * weight_velocity.mul_(0.9).add_(slope)
            bias -= lr * bias_velocity.mul_(0.9).add_(residual.sum(dim=0))
            step += 1
    return [_Fit(weight[:, m], bias[m]) for m in range(M)]
