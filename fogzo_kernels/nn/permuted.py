"""PermutedModule: a quantized module whose weight is no matrix with a row for each output."""

from __future__ import annotations

from torch import Tensor

from .module import QuantizedModule


class PermutedModule(QuantizedModule):
    """Mixin of a module whose rows are made of the weight's dimensions in another order, or of several."""

    def order(self) -> tuple[int, ...]:
        """The weight's dimensions as its rows lie in memory, that of the outputs first."""
        others = (d for d in range(self.weight.ndim) if d != self.OUTPUTS)
        return (self.OUTPUTS, *others)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order()).flatten(1)

    def shaped(self, rows: Tensor) -> Tensor:
        order = self.order()
        back = [order.index(d) for d in range(len(order))]
        return rows.view([self.weight.shape[d] for d in order]).permute(back)

    def in_rows(self, tensor: Tensor) -> bool:
        return tensor.permute(self.order()).is_contiguous()
