"""QuantizedModule: what makes a module run with Q(weight), whatever it computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import quantize, quantize_
from ..spec.quantizer import Quantizer

if TYPE_CHECKING:
    from typing import Self


class QuantizedModule(nn.Module):
    """Mixin of a module that keeps its ``weight`` as the latent and runs with Q(weight).

    A subclass also inherits from the plain module's class, :meth:`from_plain` turns such a module into
    one, and ``forward`` takes :meth:`effective_weight` where the plain one takes ``weight``.

    Attributes:
        alpha: scale of the grid, a float32 buffer that keeps its dtype under ``.to(dtype)``; a state dict
            without it, a checkpoint of the plain model say, leaves it as it is.
        quantizer: how the weight is quantized.
        tensor_id: which noise the weight draws (docs/contract.md, section 2).
        backend: of the ops; None takes the best available.
        probe: None, or the quantized weight to use instead of Q(weight), without a gradient.
        quantized: None, or Q(weight) where it is known already.
    """

    #: What from_plain adds to a module.
    ADDED = ("alpha", "quantizer", "tensor_id", "backend", "probe", "quantized")

    weight: Tensor
    alpha: Tensor
    quantizer: Quantizer
    tensor_id: int
    backend: str | None
    probe: Tensor | None
    quantized: Tensor | None

    @classmethod
    def from_plain(
        cls,
        module: nn.Module,
        quantizer: Quantizer,
        *,
        alpha: Tensor,
        tensor_id: int,
        backend: str | None = None,
    ) -> Self:
        """Turn a plain module into a quantized one, in place: parameters, hooks and names stay."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module.register_buffer("alpha", alpha)
        module.quantizer, module.tensor_id, module.backend = quantizer, tensor_id, backend
        module.probe = module.quantized = None
        return module

    def effective_weight(self) -> Tensor:
        """The weight to run with: the probe where there is one, else Q(weight), with a gradient."""
        if self.probe is not None:
            return self.probe
        if self.alpha.requires_grad:
            raise ValueError("alpha must not require grad, as no gradient reaches it")
        return quantize(
            self.weight,
            self.alpha,
            grid=self.quantizer.grid,
            straight_through=self.quantizer.straight_through,
            quantized=self.quantized,
            backend=self.backend,
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The int8 codes of Q(weight), of its shape, for export; see :func:`fogzo_kernels.dequantize`."""
        out = torch.empty_like(self.weight, dtype=torch.int8)
        quantize_(out, self.weight, self.alpha, grid=self.quantizer.grid, backend=self.backend)
        return out

    def extra_repr(self) -> str:
        levels, alpha = self.quantizer.grid.levels, tuple(self.alpha.shape)
        added = f"levels={levels}, alpha={alpha}, {self.quantizer.straight_through}"
        return f"{super().extra_repr()}, {added}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != torch.float32:  # alpha moves with the module but stays float32
            self.alpha = alpha.to(self.alpha.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "alpha" not in state_dict:  # a checkpoint of the plain model
            state_dict = {**state_dict, prefix + "alpha": self.alpha}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
