"""The health check of a training step, every n steps: what to record during the backward, what to compute afterwards.

Everything is computed from at most MAX_IMAGES images spread evenly over the *global* batch, the same ones for any
number of processes. Nothing here draws a random number or writes to the model: a run with checks has the same bytes
as one without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simclr_dist.health import figures as health
from simclr_dist.health.collapse import collapse
from simclr_dist.health.figures import Alarm, Histogram
from simclr_dist.parallel import distributed
from simclr_dist.parallel.distributed import World
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

MAX_IMAGES = 1024  # a rank of up to 1,024; a millisecond on a GPU, and one eigenvalue problem
MAX_ROWS = 2048  # of z: all views of fewer images, where there are more than two
PATIENCE = 3  # checks in a row before an alarm: one slow disk is no starvation
WATCH_EVERY = 10  # steps; at every check where these come more often
WATCHED_IMAGES = 64  # one small eigenvalue problem
WATCH_PATIENCE = 5  # a young network may look collapsed for a moment
STARVING_SHARE = 0.5
SAME_GRADIENT = 1e-3


@dataclass
class Findings:
    """By TensorBoard tag; empty on all ranks but the first."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RankFacts:
    """Figures of this rank, to be compared with those of the others."""

    data_wait_share: float
    memory_peak_gib: float


@dataclass
class Recording:
    """What one step leaves for `HealthCheck.examine`; filled when its backward has ended."""

    running_statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each BatchNorm, before the step."""
    local_norm: Tensor | None = None
    averaged_norm: Tensor | None = None
    """Of the gradient, before and after the ranks' average."""
    failure: Exception | None = None
    """What went wrong while this rank recorded; `examine` raises it, the step goes on."""


class HealthCheck:
    """every: steps between two checks; None: never. All ranks must call `record` and `examine` together."""

    def __init__(
        self, every: int | None, model: nn.Module, world: World, *, num_views: int = 2, across: bool = False
    ) -> None:
        """across: the loss compares a row with those of the other view only."""
        self._every = every
        self._model = model
        self._world = world
        self._num_views = num_views
        self._across = across
        self._norms = health.tracking_norms(model)
        self._collapse, self._starvation, self._divergence = Alarm(WATCH_PATIENCE), Alarm(PATIENCE), Alarm(1)

    def is_due(self, step: int) -> bool:
        """Whether the step that makes `step` steps complete is one to look at."""
        return self._every is not None and step % self._every == 0

    def is_watched(self, step: int) -> bool:
        """Whether `watch` looks for a collapse at this step; it is cheaper than all figures, so it looks more often."""
        return self._every is not None and step % min(self._every, WATCH_EVERY) == 0

    @contextmanager
    def record(self, step: int) -> Iterator[Recording | None]:
        """Around the forward and backward of the step that makes `step` complete. None where no check is due."""
        if not self.is_due(step):
            yield None
            return
        parameters, recording, local = list(self._model.parameters()), Recording(), list[Tensor]()
        with ExitStack() as stack:
            try:
                recording.running_statistics = health.running_statistics(self._norms)
                local = stack.enter_context(health.local_gradient_norm(parameters))
            except Exception as error:
                recording.failure = error
            yield recording
        try:
            averaged = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
            recording.local_norm, recording.averaged_norm = health.norm_of(local), health.norm_of(averaged)
        except Exception as error:
            recording.failure = recording.failure or error

    @torch.no_grad()
    def examine(
        self,
        recording: Recording,
        h: Tensor,
        z: Tensor,
        facts: RankFacts,
        *,
        group_ids: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> Findings:
        """After a recorded step. h [V*B, D], z [V*B, K], view after view; group_ids int64 [B], as the loss has them;
        grad_scale: the GradScaler's factor.

        What fails on one rank fails on all: the first raises its own exception, the others FailedElsewhereError.
        """

        def prepare() -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
            if recording.failure is not None:
                raise recording.failure
            assert recording.local_norm is not None
            assert recording.averaged_norm is not None
            own = torch.tensor([[0.0, 0.0, facts.data_wait_share, facts.memory_peak_gib]], dtype=torch.float64)
            own = own.to(z.device)
            own[0, :2] = torch.stack([recording.local_norm, recording.averaged_norm])
            V = self._num_views
            h_sample = own_sample(h[None, : len(h) // V], self._world)  # one view will do
            images = max(MAX_ROWS // V, 2)
            z_sample = own_sample(z.unflatten(0, (V, -1)), self._world, images)
            groups = None if group_ids is None else own_sample(group_ids[None, :, None], self._world, images)
            return h_sample, z_sample, groups, own

        h_sample, z_sample, groups, own = run_on_all_ranks(prepare, z.device, catch=Exception)
        h_sample = distributed.all_reduce_sum_(h_sample)[0]
        z_sample = distributed.all_reduce_sum_(z_sample)
        if groups is not None:
            groups = distributed.all_reduce_sum_(groups).flatten()
        ranks = distributed.all_gather(own)  # [W, 4]
        if not self._world.is_main:
            return Findings()
        found = Findings()
        self._check_space(h_sample, z_sample, groups, found)
        self._check_batch_norm(recording, found)
        self._check_ranks(ranks.cpu(), grad_scale, found)
        return found

    @torch.no_grad()
    def watch(self, h: Tensor, z: Tensor) -> str:
        """A warning when the representation has been collapsed for some time; empty on all ranks but the first.

        h [V*B, D], z [V*B, K], view after view. What fails on one rank fails on all, as in `examine`.
        """

        def prepare() -> tuple[Tensor, Tensor]:
            V = self._num_views
            h_sample = own_sample(h[None, : len(h) // V], self._world, WATCHED_IMAGES)
            return h_sample, own_sample(z.unflatten(0, (V, -1)), self._world, WATCHED_IMAGES)

        h_sample, z_sample = run_on_all_ranks(prepare, z.device, catch=Exception)
        h_sample = distributed.all_reduce_sum_(h_sample)[0]
        z_sample = distributed.all_reduce_sum_(z_sample)
        if not self._world.is_main:
            return ""
        figures = {"rank": health.rankme(h_sample), "spread": health.spread(z_sample.flatten(0, 1)).mean()}
        numbers = to_numbers(figures)
        fallen = collapse(numbers["rank"], h_sample.shape[1], numbers["spread"])
        if not self._collapse.rings(bool(fallen)):
            return ""
        return (
            f"the representation has collapsed: {fallen}. It rarely recovers by itself. Usual causes: a learning rate "
            "too high, a warm-up too short, a temperature that does not fit, views too much alike. health/ in "
            "TensorBoard shows when it began"
        )

    def _check_space(self, h: Tensor, z: Tensor, groups: Tensor | None, found: Findings) -> None:
        """h [M, D], z [V, M, K], groups [M]."""
        near = health.similarities(z, across=self._across, groups=groups)
        negatives = near.negatives if groups is None else near.negatives[~near.negatives.isnan()]
        h_spread, z_spread = health.spread(h), health.spread(z.flatten(0, 1))
        values = {
            "health/similarity_positive": near.positives.mean(),
            "health/contrastive_top1": health.contrastive_accuracy(near, 1),
            "health/contrastive_top5": health.contrastive_accuracy(near, 5),
            "health/alignment": health.alignment(near),
            "health/uniformity": health.uniformity(z),
            "health/h_std_mean": h_spread.mean(),
            "health/h_std_min": h_spread.amin(),
            "health/z_std_mean": z_spread.mean(),
            "health/z_std_min": z_spread.amin(),
            "health/h_rankme": health.rankme(h),
            "health/z_rankme": health.rankme(z[0]),
        }
        if negatives.numel():  # a batch of one group has none
            values["health/similarity_negative"] = negatives.mean()
        found.scalars |= to_numbers(values)
        found.histograms["health/similarity_of_positives"] = health.histogram(near.positives)
        if negatives.numel():
            found.histograms["health/similarity_of_negatives"] = health.histogram(negatives)

    def _check_batch_norm(self, recording: Recording, found: Findings) -> None:
        if self._norms:
            shift, ratio = health.batch_norm_drift(self._norms, recording.running_statistics)
            found.scalars |= to_numbers({"health/batch_norm_mean_shift": shift, "health/batch_norm_var_ratio": ratio})

    def _check_ranks(self, ranks: Tensor, grad_scale: float, found: Findings) -> None:
        """ranks [W, 4]: norm of the own gradient, norm after averaging, data wait share, memory peak."""
        local, averaged, wait, memory = ranks.T
        if self._world.size > 1:
            found.scalars |= to_numbers(
                {
                    "ranks/grad_norm_min": local.amin() / grad_scale,
                    "ranks/grad_norm_max": local.amax() / grad_scale,
                    "ranks/grad_disagreement": health.gradient_disagreement(local, averaged[0]),
                    "ranks/data_wait_share_max": wait.amax(),
                    "ranks/memory_peak_gib_max": memory.amax(),
                }
            )
            found.histograms["ranks/grad_norm"] = health.histogram(local / grad_scale, 0.0, float(local.amax()))
        if self._divergence.rings(bool((averaged - averaged[0]).abs().amax() > SAME_GRADIENT * averaged[0])):
            norms = ", ".join(f"{x:.6g}" for x in (averaged / grad_scale).tolist()[:8])
            found.warnings.append(
                f"the ranks no longer train the same model: the averaged gradient has the norms {norms} on the first "
                "ranks. Stop, and go back to a checkpoint from before; `python -m launcher check` tests the machines"
            )
        worst_wait = float(wait.amax())
        if self._starvation.rings(worst_wait > STARVING_SHARE):
            found.warnings.append(
                f"rank {int(wait.argmax())} spends {worst_wait:.0%} of its time waiting for images, and all others "
                "with it. What helps: .beton files, more data.num_threads, smaller images (--max-side); docs/data.md"
            )


def own_sample(x: Tensor, world: World, num_images: int = MAX_IMAGES) -> Tensor:
    """This rank's part of a sample of the global batch: x [V, B, d] -> [V, M, d], floats in float32 at least, zeros
    elsewhere.

    The M = min(G, num_images) images are spread evenly over the global batch (whose image r*B + b is image b of rank
    r), the same for any number of ranks. The sum over ranks is the whole sample.
    """
    V, B, d = x.shape
    G, W = B * world.size, world.size
    M = min(G, num_images)
    # Sample j is image floor(j G / M). It lies on rank r if r B <= j G / M < (r + 1) B.
    first, stop = -(-world.rank * M // W), -(-(world.rank + 1) * M // W)
    own = torch.arange(first, stop, device=x.device) * G // M - world.rank * B
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
    sample = x.new_zeros((V, M, d), dtype=dtype)
    sample[:, first:stop] = x[:, own].to(sample.dtype)
    return sample


def to_numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """All at once: each reading of a single value would make the device wait."""
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
