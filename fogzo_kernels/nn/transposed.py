"""QuantConv1D: the linear layer of GPT-2 in ``transformers``, with quantized weights.

Imported only where ``transformers`` is, by what meets such a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .permuted import PermutedModule


class QuantConv1D(PermutedModule, Conv1D):
    """``transformers.pytorch_utils.Conv1D`` that runs with Q(weight); made by ``quantize_model``.

    ``weight`` keeps its shape (inputs, outputs), and its memory is that of the transposed matrix, so that a
    row of scales, as everywhere, belongs to an output.
    """

    PLAIN = Conv1D
    OUTPUTS = 1

    bias: Tensor
    nf: int

    __repr__ = nn.Module.__repr__  # Conv1D's own knows nothing of a quantizer

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"

    def forward(self, x: Tensor) -> Tensor:
        x = self.effective_input(x, self.block)
        weight = self.shaped(self.quantized_rows())
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), weight)
        return out.view(*x.size()[:-1], self.nf)
