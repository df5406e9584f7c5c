"""What a module runs with during a pass of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import dequantize
from ..spec.grid import Grid


class PassWeight(NamedTuple):
    """What a module runs with during a pass, instead of quantizing its weight itself."""

    weight: Tensor  # the parameter that the values belong to
    rows: Tensor  # of values, as QuantizedModule.rows() has them, or of a probe's int8 codes
    probe: bool  # whether they are a probe, without a gradient, or Q(weight)
    deferred: bool = False  # of Q(weight): the weight gets dL/dQ, of which the pass makes g at its end

    def values(self, alpha: Tensor, grid: Grid) -> Tensor:
        """The rows' values, to the bit those that a probe without codes has."""
        if self.rows.dtype != torch.int8:
            return self.rows
        return dequantize(self.rows, alpha.detach(), grid=grid, dtype=self.weight.dtype)


class Deferred(torch.autograd.Function):
    """Q(latent) that is there already. The latent's gradient is dL/dQ, and that of an alpha that learns 0."""

    generate_vmap_rule = True  # for torch.func, with which a closure may differentiate

    @staticmethod
    def forward(latent: Tensor, alpha: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(alpha) if ctx.needs_input_grad[1] else None, None
