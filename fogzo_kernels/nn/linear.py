"""QuantLinear: ``nn.Linear`` that runs with quantized weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .quantized import QuantizedModule


class QuantLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    ``weight``, of shape (out_features, in_features), is the latent and keeps its name, so a checkpoint
    of the plain model loads.
    """

    PLAIN = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.effective_input(input, self.block), self.shaped(self.quantized_rows()), self.bias)
