"""BatchNorm whose statistics are those of the global batch, on every backend.

SimCLR needs it: statistics per device let the network recognise positives by them (Chen et al. 2020, section 2.2,
"Global BN"), and accuracy would depend on the number of devices. torch's SyncBatchNorm takes CUDA tensors only;
`GlobalBatchNorm` does the same over gloo, so that runs on one and on several CPU processes can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from simclr_dist.parallel import distributed


def convert_to_global_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every BatchNorm replaced by one over all ranks; parameter names stay. One process: unchanged."""
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda":
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and hasattr(m, "act") for m in model.modules()):
            from timm.layers import convert_sync_batchnorm  # torch's would drop timm's activations

            return convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _replace(model)


def _replace(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        replacement = GlobalBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        if hasattr(module, "act"):
            replacement = GlobalBatchNormAct(module.num_features, module.eps, module.momentum, module.affine)
            replacement.drop, replacement.act = module.get_submodule("drop"), module.get_submodule("act")
        reference = next(iter(module.state_dict().values()), torch.empty(0))
        replacement.to(reference.device, reference.dtype).load_state_dict(module.state_dict())
        return replacement.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    return module


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks, for inputs [n, C] or [n, C, H, W]; same state dict as torch's."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected [n, C] or [n, C, H, W], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = _global_moments(input.detach())
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(var * (count / (count - 1)), momentum)  # type: ignore[union-attr]
        return _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps)


class GlobalBatchNormAct(GlobalBatchNorm):
    """For timm's BatchNormAct2d, which contains dropout and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and row count [] over all ranks; pooled from each rank's (Chan et al. 1979)."""
    dims = [0, 2, 3][: x.dim() - 1]
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    local_var, local_mean = torch.var_mean(x, dims, correction=0)
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
    backward yields each rank's part of them as the gradients of bias and weight.
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
        invstd = torch.rsqrt(var + eps)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        slope = -weight * invstd * invstd * sums[1]
        offset = -weight * invstd * sums[0] - slope * mean
        dx = fixed.addcmul_(x, slope.view(shape).to(x.dtype)).add_(offset.view(shape).to(x.dtype))
        return dx, dweight, dbias, None, None, None, None
