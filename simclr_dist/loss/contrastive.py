"""What the losses have in common: their settings, a temperature that may be learnt, and which code computes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from simclr_dist.loss.agreement import Settings, settle
from simclr_dist.loss.implementations import Choice, Implementation

# At 0.02 exp(1/temperature) stays inside float32, and the kernels can go on, at any number of rows; above 1 all rows
# are nearly alike to the loss.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.02, 1.0


class ContrastiveLoss(nn.Module):
    """A loss over the global batch; `NTXentLoss` and `SupConLoss` compute it.

    temperature: positive. learn_temperature: make its logarithm a parameter, `log_temperature`.
    temperature_min, temperature_max: where `limit_temperature` keeps a learnt one; CLIP's lower limit is 0.01.
    implementation: "plain" (autograd on N x N), "tiled" (linear memory), "triton" (CUDA kernels), or "auto":
        the kernels on CUDA where they work, else tiled.
    gather_dtype: the dtype in which z is sent between ranks; bfloat16 halves the bytes, and every rank then computes
        with the rounded z.
    row_dtype: what the unit rows are rounded to in any case; float16 or bfloat16 makes the kernels' products 2.25
        times fewer. docs/loss.md has what it costs in exactness.
    num_views: V >= 2; every other view of an image is a positive.
    grad_reduction: what the training loop does with the gradients of the ranks: "mean" (DDP, FSDP) or "sum".
    """

    log_temperature: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        implementation: Implementation = "auto",
        gather_dtype: torch.dtype = torch.float32,
        *,
        num_views: int = 2,
        learn_temperature: bool = False,
        temperature_min: float = LOWEST_TEMPERATURE,
        temperature_max: float = HIGHEST_TEMPERATURE,
        grad_reduction: Literal["mean", "sum"] = "mean",
        row_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"the temperature must be positive, found {temperature}")
        self._temperature = temperature
        self._log_limits = math.log(temperature_min), math.log(temperature_max)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.learn_temperature = learn_temperature
        self.settings = Settings(num_views, implementation, gather_dtype, row_dtype, grad_reduction)
        self.choice: Choice | None = None
        """The code that computed the last loss, and why; before the first, what `settle` has found."""

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if self.learn_temperature else self._temperature

    @property
    def temperature_now(self) -> float:
        """As a number; the host waits for it."""
        return float(torch.as_tensor(self.temperature).detach())

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Brings a learnt temperature back to the nearer limit; call it after every update."""
        if self.learn_temperature:
            self.log_temperature.clamp_(*self._log_limits)

    def settle(self, device: torch.device, *, num_rows: int, width: int) -> Choice:
        """Tries the code for float32 z [num_rows, width] before the first call. All ranks together: all will use it.

        What one rank cannot use, none uses from here on: `choice.reason` says why, instead of a warning of each call.
        A learnt temperature is taken to fall to its lower limit, so that nothing changes in the middle of a training.
        """
        temperature = math.exp(self._log_limits[0]) if self.learn_temperature else self._temperature
        self.choice = settle(self.settings, device, num_rows=num_rows, width=width, temperature=temperature)
        if self.choice.reason:
            self.settings = replace(self.settings, implementation="tiled")
        return self.choice

    def _note(self, choice: Choice) -> None:
        if self.choice is None or choice.code != self.choice.code:
            self.choice = choice

    def extra_repr(self) -> str:
        return f"temperature={self.temperature_now:g}, implementation={self.settings.implementation}"
