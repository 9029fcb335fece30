"""Autograd's side of a loss: gradients that are known already, and gradients times a number."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def with_gradient(value: Tensor, *inputs_and_gradients: tuple[Tensor, Tensor]) -> Tensor:
    """`value`, whose gradients in the inputs are those given. Each is rounded to its input's dtype only after it was
    multiplied by the incoming gradient, so that a GradScaler's scale keeps small float16 gradients alive.
    """
    inputs, gradients = zip(*inputs_and_gradients, strict=True)
    result: Tensor = _KnownGradient.apply(value, gradients, *inputs)  # type: ignore[no-untyped-call]
    return result


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is `scale` times as large."""
    result: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return result


class _KnownGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            (g * grad).to(dtype) if needed else None
            for g, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *scaled


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
