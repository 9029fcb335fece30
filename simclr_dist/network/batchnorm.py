"""BatchNorm whose statistics are those of the global batch, on every backend.

SimCLR needs it: statistics per device let the network recognise positives by them (Chen et al. 2020, section 2.2,
"Global BN"), and accuracy would depend on the number of devices. torch's SyncBatchNorm takes CUDA tensors only, and in
every layer its host waits for the device, to leave out ranks without rows. Here no rank is ever without rows, and
nothing waits. On CUDA `_NormaliseOnGpu` calls the same kernels as SyncBatchNorm; elsewhere `_Normalise` does the same
with ordinary operations, so that runs on one and on several processes, with and without a GPU, can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from simclr_dist.parallel import distributed


def convert_to_global_batch_norm(model: nn.Module) -> nn.Module:
    """`model` with every BatchNorm replaced by one over all ranks; parameter names stay. One process: unchanged."""
    return model if distributed.world_size() == 1 else _replace(model)


def _replace(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        settings = module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        replacement = GlobalBatchNorm(*settings)
        if hasattr(module, "act"):
            replacement = GlobalBatchNormAct(*settings)
            replacement.drop, replacement.act = module.get_submodule("drop"), module.get_submodule("act")
        reference = next(iter(module.state_dict().values()), torch.empty(0))
        replacement.to(reference.device, reference.dtype).load_state_dict(module.state_dict())
        return replacement.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    return module


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks, for inputs [n, C, ...]; same state dict as torch's."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [n, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        C, dtype = self.num_features, torch.promote_types(input.dtype, torch.float32)
        weight: Tensor = self.weight if self.affine else input.new_ones(C, dtype=dtype)
        bias: Tensor = self.bias if self.affine else input.new_zeros(C, dtype=dtype)
        return (self._on_gpu if input.is_cuda else self._on_any_device)(input, weight, bias)

    def _on_any_device(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var, count = _global_moments(x.detach())
        if (step := self._step()) is not None:
            self._move_running_statistics(mean, var * (count / (count - 1)), step)
        return _Normalise.apply(x, weight, bias, mean, var, count, self.eps)  # type: ignore[no-untyped-call, no-any-return]

    def _on_gpu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = _dense(x)
        mean, invstd = torch.batch_norm_stats(x.detach(), self.eps)
        count = mean.new_full((1,), x.numel() // len(mean))
        gathered = distributed.all_gather(torch.cat([mean, invstd, count])[None])  # [W, 2C + 1]
        means, invstds, counts = gathered.split([len(mean), len(mean), 1], dim=1)
        step = self._step()
        # The kernel that joins the ranks' moments also moves running statistics, by a step that the host knows.
        moved_mean, moved_var = self.running_mean, self.running_var
        if not isinstance(step, float):
            moved_mean, moved_var = mean.new_zeros(2, len(mean)).unbind()
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x.detach(),
            means,
            invstds,
            moved_mean,
            moved_var,
            step if isinstance(step, float) else 1.0,
            self.eps,
            counts.reshape(-1),
        )
        if isinstance(step, Tensor):
            assert moved_mean is not None
            assert moved_var is not None
            self._move_running_statistics(moved_mean, moved_var, step)
        counts = counts.reshape(-1).to(torch.int32)
        return _NormaliseOnGpu.apply(x, weight, bias, mean, invstd, counts, self.eps)  # type: ignore[no-untyped-call, no-any-return]

    def _step(self) -> float | Tensor | None:
        """How far the running statistics go towards those of this batch; None: there are none."""
        if not self.track_running_stats:
            return None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return float(self.momentum)
        return 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)  # type: ignore[union-attr]

    def _move_running_statistics(self, mean: Tensor, var: Tensor, step: float | Tensor) -> None:
        self.running_mean.lerp_(mean, step)  # type: ignore[union-attr]
        self.running_var.lerp_(var, step)  # type: ignore[union-attr]


class GlobalBatchNormAct(GlobalBatchNorm):
    """For timm's BatchNormAct2d, which contains dropout and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and row count [] over all ranks; pooled from each rank's (Chan et al. 1979)."""
    dims = [0, *range(2, x.dim())]
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    local_mean = x.mean(dims, keepdim=True)
    local_var = (x - local_mean).square_().mean(dims)  # two passes: a quarter of torch.var_mean's time on CPUs
    local_mean = local_mean.flatten()
    count = local_mean.new_full((1,), x.numel() // x.shape[1])
    gathered = distributed.all_gather(torch.cat([local_mean, local_var, count])[None])  # [W, 2C + 1]
    means, variances, counts = (*gathered[:, :-1].chunk(2, dim=1), gathered[:, -1:])
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean, var, total


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on the rows of every rank.

    Backward: with the fixed-statistics gradient g = dy * weight * invstd, dx = g - weight * invstd / M *
    (sum dy + xhat * sum(dy * xhat)); the two sums run over all M rows of all ranks, and torch's fixed-statistics
    backward yields each rank's part of them as the gradients of bias and weight. What is subtracted from g is a
    BatchNorm of x too, with another weight and bias: one fast kernel for every dtype.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps  # type: ignore[attr-defined]
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, var, count = ctx.saved_tensors  # type: ignore[attr-defined]
        eps: float = ctx.eps  # type: ignore[attr-defined]
        fixed, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, eps, [True, True, True]
        )
        sums = distributed.all_reduce_sum_(torch.stack([dbias, dweight])) / count
        offset, slope = -weight * torch.rsqrt(var + eps) * sums
        dx = fixed.add_(torch.batch_norm(x, slope, offset, mean, var, False, 0.0, eps, False))
        return dx, dweight, dbias, None, None, None, None


class _NormaliseOnGpu(torch.autograd.Function):
    """The same by torch's kernels for SyncBatchNorm: one pass forward, two backward.

    mean, invstd [C]: of all ranks; counts int32 [W]: the rows of each. x: as `_dense` makes it.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        invstd: Tensor,
        counts: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, invstd, counts = ctx.saved_tensors  # type: ignore[attr-defined]
        dy = dy.contiguous(memory_format=_memory_format(x))  # the kernels take both in one layout
        sum_dy, sum_dy_xmu, dweight, dbias = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, weight, True, True, True
        )
        sums = distributed.all_reduce_sum_(torch.stack([sum_dy, sum_dy_xmu]))
        dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight.to(mean.dtype), sums[0], sums[1], counts)
        return dx, dweight, dbias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x, or that which its kernels can take."""
    for dims, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format
