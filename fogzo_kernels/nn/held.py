"""What a module runs with during a pass of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import dequantize
from ..spec.grid import Grid


class Held(NamedTuple):
    """What a module runs with during a pass, instead of quantizing its weight itself."""

    weight: Tensor  # the parameter that the values belong to
    rows: Tensor  # of values, as QuantizedModule.rows() has them, or of a probe's int8 codes
    probe: bool  # whether they are a probe, without a gradient, or Q(weight)

    def values(self, alpha: Tensor, grid: Grid) -> Tensor:
        """The rows' values, to the bit those that a probe without codes has."""
        if self.rows.dtype != torch.int8:
            return self.rows
        return dequantize(self.rows, alpha.detach(), grid=grid, dtype=self.weight.dtype)
