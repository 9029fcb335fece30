"""Linear evaluation on cached features: multinomial logistic regression, its weight decay chosen on held-out images.

Features are standardised with the training set's mean and deviation. The weight decay is swept on a class-stratified
tenth of the *training* images, then the classifier is fitted to all of them; test images serve the result only.

Letters: n images, D width of h, C classes. Minimised, for weights W [D, C] and a bias b [C] without decay:

    mean_i cross_entropy(h_i W + b, y_i) + weight_decay / 2 |W|^2

(scikit-learn's LogisticRegression(C=1 / (n weight_decay)).)

Features are read a chunk at a time from where they lie, often a file mapped into memory. With several ranks each reads
its part of the rows, and the sums are added over all ranks: every rank finds the same minimum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.data.classes import draw_by_class
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features, part_of_rank
from simclr_dist.evaluation.labels import check_labels, split_by_class
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

WEIGHT_DECAYS = tuple(10.0**-i for i in range(7))  # 1 ... 1e-6: each fit starts where the stronger ended
HELD_OUT = 0.1
PATIENCE = 2  # weaker decays tried after the held-out loss has begun to rise
# The weight decay is swept on so many images that rows x D x C stays below this, but on 20 of each class at least.
SWEEP_WORK, SWEEP_IMAGES_A_CLASS = 5e9, 20
CHUNK_BYTES = 16 * 2**20  # of standardised features, and of logits
HELD_BYTES = 256 * 2**20  # standardised features up to this size are kept, instead of made anew in each pass
SWEEP_TOLERANCE, FINAL_TOLERANCE = 1e-4, 1e-5  # of the largest gradient; the sweep only has to rank
SGD_BATCH_SIZE = 256
SGD_EPOCHS = 60
SAY_FROM_S = 10.0
_SWEEP_PASSES, _FINAL_PASSES = 80, 25  # over the data, usually

Say = Callable[[str], None]


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
    say: Say | None = None,
) -> LinearResult:
    """Fits to `train`, reports on `test`. `seed` draws the held-out tenth and, for sgd, the order of images.

    say: gets an estimate of the time and the progress, where it takes more than some seconds.
    Memory beside the features: below 2 GiB for D = 2048 and 1,000 classes. To be called by all ranks; with sgd each
    does the whole work. Raises DataError when the labels do not fit, or when no class has a second image to hold out.
    """
    progress = _Progress(say)

    def split() -> tuple[Tensor, Tensor]:
        check_labels(train, test, num_classes)
        fit_rows, held_rows = split_by_class(train.labels, HELD_OUT, seed)
        if len(held_rows) == 0:
            raise DataError("every class has a single training image: none can be held out to choose the weight decay")
        return fit_rows, held_rows

    fit_rows, held_rows = run_on_all_ranks(split, device, catch=Exception)
    mean, scale = _standardisation(train.h, device)
    n, D = train.h.shape
    sweep_rows = fit_rows
    if method == "lbfgs":
        most = max(int(SWEEP_WORK / (D * num_classes)), SWEEP_IMAGES_A_CLASS * num_classes)
        sweep_rows = fit_rows[draw_by_class(train.labels[fit_rows].numpy(), most, seed)]

    def standardised(rows: Tensor | None, features: Features = train) -> _Rows:
        return _Rows(features, rows, mean, scale, num_classes, device, shared=method == "lbfgs")

    sweep = standardised(sweep_rows)
    fits = _path_lbfgs if method == "lbfgs" else _path_sgd
    progress.estimate(sweep, n, method)
    weight_decay, start = _choose(fits(sweep, WEIGHT_DECAYS, seed, progress), standardised(held_rows), progress)
    if len(sweep_rows) < len(fit_rows):
        # |W|^2 stands beside a mean over images; beside their sum it has the weight n weight_decay, which is kept.
        weight_decay *= len(sweep_rows) / len(fit_rows)
    whole = standardised(None)
    if method == "lbfgs":
        fit = _Curvature(whole).fit(whole, weight_decay, start, FINAL_TOLERANCE, progress)
    else:
        fit = _fit_sgd(whole, (weight_decay,), seed, progress)[0]

    correct, _ = _tested(fit, standardised(None, test))
    top1, top5 = (correct.double() / len(test)).tolist()
    weight = (scale[:, None] * fit.weight).T.float()
    bias = (fit.bias - weight.to(fit.bias.dtype) @ mean.to(fit.bias.dtype)).float()
    return LinearResult(top1, top5, weight_decay, weight.cpu(), bias.cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Rows, a chunk at a time


class _Rows:
    """Some rows of features and their labels, standardised: (h - mean) * scale in float32 on the device.

    shared: iterating gives this rank's part of the rows only.
    """

    def __init__(
        self,
        features: Features,
        rows: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        num_classes: int,
        device: torch.device | str,
        *,
        shared: bool,
    ) -> None:
        self._features, self._rows, self._mean, self._scale, self.device = features, rows, mean, scale, device
        self.C, self.D = num_classes, features.h.shape[1]
        self.n = len(features) if rows is None else len(rows)
        part = part_of_rank(self.n, distributed.rank(), distributed.world_size()) if shared else range(self.n)
        self._part = (int(part[0]), int(part[-1]) + 1) if len(part) else (0, 0)
        self._chunk = max(1, CHUNK_BYTES // (4 * max(self.D, num_classes)))
        self._held: list[tuple[Tensor, Tensor]] | None = None
        if 4 * (self._part[1] - self._part[0]) * self.D <= HELD_BYTES:
            self._held = list(self._read())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x float32 [c, D] and y int64 [c] of each chunk."""
        return iter(self._held) if self._held is not None else self._read()

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(*self._part, self._chunk):
            yield self[torch.arange(start, min(start + self._chunk, self._part[1]))]

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        own = rows if self._rows is None else self._rows[rows]
        x = self._features.h[own].to(self.device, torch.float32, non_blocking=True)
        return x.sub_(self._mean).mul_(self._scale), self._features.labels[own].to(self.device)

    def sum_over_ranks(self, totals: tuple[Tensor, ...], add: Callable[[Tensor, Tensor], None]) -> None:
        """Calls add(x, y), which adds to `totals`, for each chunk; then adds up the totals of all ranks, in place."""

        def own() -> None:
            for x, y in self:
                add(x, y)

        run_on_all_ranks(own, self.device, catch=Exception)
        for total in totals:
            distributed.all_reduce_sum_(total)


def _standardisation(h: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each column of h [n, D], float32 [D]; 0 for columns that do not vary.

    Each rank reads its part of the rows; all get the same.
    """
    n, D = h.shape
    own = part_of_rank(n, distributed.rank(), distributed.world_size())
    part = h[int(own[0]) : int(own[-1]) + 1] if len(own) else h[:0]
    moments = run_on_all_ranks(lambda: _moments(part, device), device, catch=Exception)
    counts, means, squares_of_ranks = distributed.all_gather(moments[None]).split([1, D, D], dim=1)  # [W, …]
    mean = (counts / n * means).sum(dim=0)
    squares = (squares_of_ranks + counts * (means - mean).square()).sum(dim=0)
    deviation = (squares / n).sqrt()
    constant = deviation <= 1e-6 * deviation.max()
    scale = torch.where(constant, 0.0, 1 / deviation.clamp_min(torch.finfo(torch.float32).tiny))
    return mean.float(), scale.float()


def _moments(h: Tensor, device: torch.device | str) -> Tensor:
    """Number of rows, mean and sum of squares around it of each column of h [n, D], float64 [1 + 2D]."""
    D = h.shape[1]
    mean, squares = torch.zeros(2, D, dtype=torch.float64, device=device)
    seen = 0
    for part in h.split(max(1, CHUNK_BYTES // (8 * D))) if len(h) else ():
        x = part.to(device, torch.float64)
        # Chan et al. 1979: sums of squares around the mean so far, because raw squares would cancel.
        shift = x.mean(dim=0) - mean
        squares += (x - x.mean(dim=0)).square_().sum(dim=0) + shift.square() * seen * len(x) / (seen + len(x))
        mean += shift * len(x) / (seen + len(x))
        seen += len(x)
    return torch.cat([mean.new_full((1,), seen), mean, squares])


def _tested(fit: _Fit, rows: _Rows) -> tuple[Tensor, float]:
    """How many rows have their label first and among the first five, int64 [2], and the mean cross-entropy."""
    weight, bias = fit.weight.float(), fit.bias.float()
    correct = torch.zeros(2, dtype=torch.int64, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)

    def add(x: Tensor, y: Tensor) -> None:
        logits = torch.addmm(bias, x, weight)
        hits = logits.topk(min(5, rows.C), dim=1).indices == y[:, None]
        correct.add_(torch.stack([hits[:, 0].sum(), hits.sum()]))
        loss.add_(F.cross_entropy(logits, y, reduction="sum").double())

    rows.sum_over_ranks((correct, loss), add)
    return correct, loss.item() / rows.n


class _Progress:
    """Says how long it will take, and how far it has come, where that takes a while."""

    def __init__(self, say: Say | None) -> None:
        self._say = say
        self._started = self._said = time.monotonic()

    def estimate(self, sweep: _Rows, n: int, method: str) -> None:
        """From the time of one chunk. n: images of the last fit."""
        x, y = next(iter(sweep), (None, None))
        if self._say is None or x is None or y is None:
            return
        weight, bias = x.new_zeros(sweep.D, sweep.C), x.new_zeros(sweep.C)
        for _ in range(2):  # the first warms up
            begin = time.monotonic()
            _add_slopes(x, y, weight, bias, bias.sum(), torch.zeros_like(weight), torch.zeros_like(bias))
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seconds = time.monotonic() - begin
        if method == "sgd":
            rows = SGD_EPOCHS * (len(WEIGHT_DECAYS) * sweep.n + n)
        else:
            rows = (_SWEEP_PASSES * sweep.n + _FINAL_PASSES * n) // distributed.world_size()
        if (seconds := seconds / len(x) * rows) >= SAY_FROM_S:
            part = f" (its weight decay is chosen on {sweep.n:,})" if sweep.n < n // 2 else ""
            size = f"{n:,} x {sweep.D:,} features, {sweep.C:,} classes"
            self._say(f"linear probe of {size}{part}: about {_spoken(seconds)}")

    def __call__(self, message: str, *, is_due: bool = False) -> None:
        now = time.monotonic()
        if self._say is not None and now - (self._started if is_due else self._said) >= SAY_FROM_S:
            self._say(f"{message} ({_spoken(now - self._started)})")
            self._said = now


def _spoken(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _choose(path: Iterator[tuple[float, _Fit]], held: _Rows, progress: _Progress) -> tuple[float, _Fit]:
    """The weight decay with the best held-out top-1 (ties: the lower loss), and its fit."""
    best: tuple[tuple[float, float], float, _Fit] | None = None
    lowest_loss, since_lowest = float("inf"), 0
    for weight_decay, fit in path:
        correct, loss = _tested(fit, held)
        share = float(correct[0]) / held.n
        progress(f"weight decay {weight_decay:g}: top-1 of the held-out images {share:.2%}", is_due=True)
        score = (int(correct[0]), -loss)
        if best is None or score > best[0]:
            best = (score, weight_decay, fit)
        since_lowest = 0 if loss < lowest_loss else since_lowest + 1
        lowest_loss = min(loss, lowest_loss)
        if since_lowest >= PATIENCE:
            break
    assert best is not None
    return best[1], best[2]


# ---------------------------------------------------------------------------------------------------------------------
# L-BFGS


class _Curvature:
    """L-BFGS along the principal axes of standardised features, scaled so that the objective is nearly isotropic.

    At W = 0 the Hessian is close to covariance / C + weight_decay. Searching for V with W = Q diag(s) V, Q the
    covariance's eigenvectors and s = (eigenvalue / C + weight_decay)^-1/2, L-BFGS needs half as many steps, and one
    tolerance of the gradient fits every weight decay.
    """

    def __init__(self, rows: _Rows) -> None:
        covariance = torch.zeros(rows.D, rows.D, dtype=torch.float64, device=rows.device)

        def add(x: Tensor, _: Tensor) -> None:
            covariance.add_(x.T @ x)

        rows.sum_over_ranks((covariance,), add)
        self.eigenvalues, self.axes = torch.linalg.eigh(covariance / rows.n)

    def fit(self, rows: _Rows, weight_decay: float, start: _Fit, tolerance: float, progress: _Progress) -> _Fit:
        """The minimum for these rows: matrix products in float32, sums in float64."""
        n, C = rows.n, rows.C
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
        passes = 0

        @torch.no_grad()
        def objective() -> Tensor:
            nonlocal passes
            weight, bias = (self.axes @ (s * v)).float(), b.float()
            loss, slope, bias_slope = v.new_zeros(()), v.new_zeros(v.shape), torch.zeros_like(b)
            rows.sum_over_ranks(
                (loss, slope, bias_slope), lambda x, y: _add_slopes(x, y, weight, bias, loss, slope, bias_slope)
            )
            v.grad = s * (self.axes.T @ slope) / n + weight_decay * s.square() * v
            b.grad = bias_slope / n
            passes += 1
            progress(f"weight decay {weight_decay:.2g}: pass {passes} over {n:,} images, loss {float(loss) / n:.4f}")
            return loss / n + weight_decay / 2 * (s * v).square().sum()

        solver.step(objective)
        return _Fit((self.axes @ (s * v)).detach(), b.detach())


def _add_slopes(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, loss: Tensor, slope: Tensor, bias_slope: Tensor
) -> None:
    """Adds the cross-entropy of x [c, D] and its gradients: loss [], slope [D, C], bias_slope [C].

    Both products have x as it lies and the few classes on the other side: with ten of them BLAS takes a third of the
    time, or less, that it takes for x transposed.
    """
    i = torch.arange(len(y), device=y.device)
    residual = F.linear(x, weight.T.contiguous(), bias).log_softmax(dim=1)
    loss -= residual[i, y].sum(dtype=torch.float64)
    residual.exp_()
    residual[i, y] -= 1
    slope += (residual.T @ x).T
    bias_slope += residual.sum(dim=0, dtype=torch.float64)


def _path_lbfgs(
    rows: _Rows, weight_decays: tuple[float, ...], seed: int, progress: _Progress
) -> Iterator[tuple[float, _Fit]]:
    """Fits from the strongest decay to the weakest, each started from the one before. Deterministic; ignores `seed`."""
    curvature = _Curvature(rows)
    zeros = torch.zeros(rows.D + 1, rows.C, dtype=torch.float64, device=rows.device)
    fit = _Fit(zeros[:-1], zeros[-1])
    for weight_decay in weight_decays:
        fit = curvature.fit(rows, weight_decay, fit, SWEEP_TOLERANCE, progress)
        yield weight_decay, fit


# ---------------------------------------------------------------------------------------------------------------------
# SGD, the procedure of most papers: for figures to compare with theirs


def _path_sgd(
    rows: _Rows, weight_decays: tuple[float, ...], seed: int, progress: _Progress
) -> Iterator[tuple[float, _Fit]]:
    yield from zip(weight_decays, _fit_sgd(rows, weight_decays, seed, progress), strict=True)


def _fit_sgd(rows: _Rows, weight_decays: tuple[float, ...], seed: int, progress: _Progress) -> list[_Fit]:
    """SGD with momentum 0.9 and a cosine learning rate, all M weight decays side by side in one matrix product."""
    M = len(weight_decays)
    decay = torch.tensor(weight_decays, device=rows.device)[None, :, None]
    weight, bias = torch.zeros(rows.D, M, rows.C, device=rows.device), torch.zeros(M, rows.C, device=rows.device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    covariance = weight.new_zeros(rows.D, rows.D)
    for x, _ in rows:
        covariance.addmm_(x.T, x, alpha=1 / rows.n)
    # The Hessian of cross-entropy is at most half the covariance (Boehning 1992), so this is a safe step length.
    base_lr = 1 / (0.5 * float(torch.linalg.matrix_norm(covariance, ord=2)) + max(weight_decays))
    generator = torch.Generator().manual_seed(seed)
    num_steps, step = SGD_EPOCHS * -(-rows.n // SGD_BATCH_SIZE), 0
    for epoch in range(SGD_EPOCHS):
        for batch in torch.randperm(rows.n, generator=generator).split(SGD_BATCH_SIZE):
            x, y = rows[batch]
            lr = base_lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / num_steps)).item())
            residual = ((x @ weight.flatten(1)).unflatten(1, (M, rows.C)) + bias).softmax(dim=2)
            residual.sub_(F.one_hot(y, rows.C)[:, None, :]).div_(len(y))
            slope = (x.T @ residual.flatten(1)).view_as(weight).addcmul_(decay, weight)
            weight -= lr * weight_velocity.mul_(0.9).add_(slope)
            bias -= lr * bias_velocity.mul_(0.9).add_(residual.sum(dim=0))
            step += 1
        progress(f"SGD: epoch {epoch + 1} of {SGD_EPOCHS}")
    return [_Fit(weight[:, m], bias[m]) for m in range(M)]
