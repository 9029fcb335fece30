"""Autograd functions: a value whose gradient was computed by formula, and a gradient times a number."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def with_gradient(value: Tensor, *inputs_and_gradients: tuple[Tensor, Tensor]) -> Tensor:
    """`value`, with the given gradients with respect to the inputs.

    A gradient is rounded to its input's dtype only after it was multiplied by the incoming one: a GradScaler's scale
    then keeps small float16 gradients from becoming zero.
    """
    inputs, gradients = zip(*inputs_and_gradients, strict=True)
    result: Tensor = _KnownGradient.apply(value, gradients, *inputs)  # type: ignore[no-untyped-call]
    return result


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x; its gradient is multiplied by `scale`."""
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
