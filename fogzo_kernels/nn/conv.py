"""QuantConv1d, QuantConv2d, QuantConv3d: convolutions that run with quantized weights."""

from __future__ import annotations

from torch import Tensor, nn

from .permuted import PermutedModule


class _QuantConv(PermutedModule):
    """What the three share. A row of the weight is what one output channel is made of."""

    def order(self) -> tuple[int, ...]:
        """In memory of the format channels_last the channels come last, and a row is still in one piece.

        Groups are cut from a row in the plain order, whatever its memory.
        """
        w = self.weight
        plain = tuple(range(w.ndim))
        last = (0, *plain[2:], 1)
        grouped = self.alpha.numel() > w.shape[0]
        return last if not (grouped or w.is_contiguous()) and w.permute(last).is_contiguous() else plain

    def input_rows(self, input: Tensor) -> Tensor:
        """An input as a matrix: a row is a sample."""
        return (input if input.ndim == self.weight.ndim else input.unsqueeze(0)).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.effective_input(input), self.effective_weight(), self.bias)  # type: ignore[operator, no-any-return]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`."""

    PLAIN = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    The weight may lie in memory as channels_last. Its elements then draw their noise in that order.
    """

    PLAIN = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    The weight may lie in memory as channels_last_3d. Its elements then draw their noise in that order.
    """

    PLAIN = nn.Conv3d
