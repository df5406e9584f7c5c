"""QuantLinear: ``nn.Linear`` that runs with quantized weights."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .module import QuantizedModule


class QuantLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    ``weight``, of shape (out_features, in_features), is the latent and keeps its name, so a checkpoint
    of the plain model loads.

    Attributes:
        product: what multiplies instead of PyTorch's linear function, or None; see
            :func:`fogzo_kernels.set_compute_`.
    """

    ADDED = (*QuantizedModule.ADDED, "product")
    PLAIN = nn.Linear

    product: Callable[[QuantLinear, Tensor], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(self, input)
        return self.plain_forward(input)

    def plain_forward(self, input: Tensor) -> Tensor:
        """By values."""
        rows = self.shaped(self.quantized_rows())
        return F.linear(self.effective_input(input, self.block), rows, self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", int8 products" if self.product is not None else "")
