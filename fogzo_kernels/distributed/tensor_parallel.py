"""Weights under tensor parallelism: each process quantizes its part, and multiplies by it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..nn.module import QuantizedModule
from ..nn.view import DTensor, Part, Placement, local
from ..spec.scale import MeasuredScale
from .fsdp import Shard, part_of


class CutWeight(Placement):
    """Lets a module under tensor parallelism quantize its part of the weight, and multiply by it.

    Raises:
        ValueError: tensor parallelism of such a module, or of such a cut, is not offered.
    """

    is_whole = False

    def __init__(self, name: str, module: QuantizedModule) -> None:
        weight, how = cast("DTensor", module.latent), module.quantizer
        placements = weight.placements
        dim = placements[0].dim if len(placements) == 1 and type(placements[0]) is Shard else None
        reason = None
        if dim not in (0, 1) or weight.ndim != 2 or module.OUTPUTS != 0:
            reason = f"cut by rows or columns over a mesh of one dimension, got {placements}"
        elif how.transform is not None or module.activation is not None or getattr(module, "product", None):
            reason = "without transform and quantized inputs, got one with"
        elif isinstance(how.scale, MeasuredScale):
            reason = f"with a fixed or learned scale, got {how.scale}"
        elif local(module.alpha) is not module.alpha:
            reason = "quantized after parallelize_module, which would cut the scales, got it quantized before"
        if reason is not None:
            raise ValueError(f"{name} must be, for tensor parallelism, {reason}")
        assert dim is not None
        self._part = part_of(weight, dim, 0)

    @property
    def part(self) -> Part:
        return self._part

    def rows(self, module: QuantizedModule) -> Tensor:
        """Returns Q of the part as a DTensor like the weight."""
        alpha, weight = module.alpha, cast("DTensor", module.latent)
        if module.pass_weight is None and alpha.requires_grad:
            alpha = cast("Tensor", SumOfParts.apply(alpha, self.part))
        rows = module.quantized(weight.to_local(), self.part.own(alpha))
        mesh, placements, shape, stride = weight.device_mesh, weight.placements, weight.shape, weight.stride()
        return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


class SumOfParts(torch.autograd.Function):
    """Returns its argument. The gradient is the sum over the processes that have parts."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return alpha.view_as(alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.part.sum(grads[0].contiguous().clone()), None
