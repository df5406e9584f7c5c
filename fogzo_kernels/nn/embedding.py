"""QuantEmbedding: ``nn.Embedding`` that runs with quantized weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import rotated
from .module import QuantizedModule


class QuantEmbedding(QuantizedModule, nn.Embedding):
    """``nn.Embedding`` that runs with Q(weight); made by :func:`fogzo_kernels.quantize_model`.

    A row is the vector of one entry. The row of ``padding_idx`` gets no gradient, as in PyTorch, and no
    estimate of FOGZO; what is read from it is Q of it, which is not 0 on grids without a 0.
    """

    PLAIN = nn.Embedding

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            return "its gradients are sparse"
        if module.max_norm is not None:
            return "max_norm changes its weight in the forward"
        return None

    @property
    def still_row(self) -> int | None:
        return self.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        rows = self.quantized_rows()
        found = F.embedding(input, rows, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return rotated(found, self.block, self.backend)  # of the entries that were read, not of all
