"""Weights under tensor parallelism: each process quantizes its part, and multiplies by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..nn.module import QuantizedModule
from ..nn.view import DTensor, Placement, local
from ..spec.scale import MeasuredScale
from .fsdp import Shard


@dataclass(frozen=True)
class Part(Placement):
    """The part of a weight that a process has: some of its rows, or of its columns."""

    is_whole = False

    dim: int  # 0: rows, 1: columns
    first: int  # of them
    length: int
    shape: tuple[int, ...]  # of the weight
    group: dist.ProcessGroup  # the processes that have the others

    @classmethod
    def of(cls, name: str, module: QuantizedModule) -> Part:
        """That of a module's weight.

        Raises:
            ValueError: tensor parallelism of such a module, or of such a cut, is not offered.
        """
        weight, how = module.weight, module.quantizer
        placements, mesh = weight.placements, weight.device_mesh  # type: ignore[attr-defined]
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
        most = -(-weight.shape[dim] // mesh.size())
        first = min(mesh.get_local_rank() * most, weight.shape[dim])
        return cls(dim, first, local(weight).shape[dim], tuple(weight.shape), mesh.get_group())

    def rows(self, module: QuantizedModule) -> Tensor:
        """Q of the part, as the weight lies over the processes."""
        alpha, weight = module.alpha, cast("DTensor", module.weight)
        if module.pass_weight is None and alpha.requires_grad:
            alpha = cast("Tensor", SumOfParts.apply(alpha, self.group))
        rows = module.quantized(weight.to_local(), self.own(alpha))
        return DTensor.from_local(
            rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
            stride=weight.stride(),
        )  # fmt: skip

    @property
    def layout(self) -> tuple[int, int, int]:
        """Where it lies among the weight's elements (docs/contract.md, section 2)."""
        columns = self.shape[1]
        if self.dim == 0:
            own = max(self.length * columns, 1)
            return self.first * columns, own, own
        return self.first, max(self.length, 1), columns

    def own(self, alpha: Tensor) -> Tensor:
        """Of a weight's scales those of the part; a view of rows."""
        if alpha.numel() == 1:
            return alpha
        if self.dim == 0:
            return alpha[self.first : self.first + self.length]
        return alpha if alpha.numel() == self.shape[0] else alpha[:, self._groups(alpha)].contiguous()

    def put(self, alphas: Tensor, own: Tensor) -> None:
        """Write those of the part."""
        grouped = self.dim == 1 and alphas.numel() > self.shape[0]
        (alphas[:, self._groups(alphas)] if grouped else self.own(alphas)).copy_(own)

    def own_row(self, row: int) -> int | None:
        if self.dim == 1:
            return row
        return row - self.first if 0 <= row - self.first < self.length else None

    def _groups(self, alpha: Tensor) -> slice:
        size = self.shape[1] // (alpha.numel() // self.shape[0])
        if self.first % size or self.length % size:
            raise ValueError(f"groups of {size} must not be cut, got a part of {self.length} columns")
        return slice(self.first // size, (self.first + self.length) // size)


class SumOfParts(torch.autograd.Function):
    """The identity; its gradient is the sum over the processes that have parts."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return alpha.view_as(alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
