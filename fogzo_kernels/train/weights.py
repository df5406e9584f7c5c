"""The quantized weights of a model, as the estimator and the optimizers see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.quantized import QuantizedModule
from ..ops import checks
from ..spec.grid import Grid
from ..spec.quantizer import Quantizer
from ..spec.straight_through import StraightThrough


class Key(NamedTuple):
    """What the weights of one call of an op have in common.

    Not their scales: alphas are an argument of the call, each weight its own.
    """

    grid: Grid
    straight_through: StraightThrough
    backend: str | None
    latent: torch.dtype
    grad: torch.dtype


class QuantizedWeight:
    """A quantized parameter, the modules that share it, and the memory of its quantized values.

    ``buffer`` holds what a probe runs with and, after a fused optimizer's step, Q(parameter).
    """

    def __init__(self, module: QuantizedModule) -> None:
        self.parameter, self.tensor_id = module.weight, module.tensor_id
        self.modules = [module]
        self.buffer: Tensor | None = None
        self._written: tuple[int, ...] | None = None  # what Q(parameter) in the buffer was made from

    @property
    def alpha(self) -> Tensor:
        """The scale of its grid, float32."""
        return self.modules[0].alpha

    @property
    def quantizer(self) -> Quantizer:
        """How it is quantized."""
        return self.modules[0].quantizer

    def key(self, grad: Tensor, backend: str | None) -> Key:
        """What it shares with the weights that it may go into one call with."""
        q = self.quantizer
        return Key(q.grid, q.straight_through, backend, self.parameter.dtype, grad.dtype)

    def memory(self) -> Tensor:
        """The buffer, made anew where the parameter has changed its shape, dtype or device."""
        p, b = self.parameter, self.buffer
        if b is None or (b.shape, b.dtype, b.device) != (p.shape, p.dtype, p.device):
            self.buffer = b = torch.empty_like(p, requires_grad=False)
        return b

    # ---- what its modules run with

    def use(self, tensor: Tensor) -> None:
        """Its modules run with ``tensor``, of its shape and without a gradient, until :meth:`release`."""
        for module in self.modules:
            module.probe = tensor

    def recall(self) -> None:
        """Its modules take Q(parameter) from the buffer where it is there, until :meth:`release`."""
        quantized = self.quantized()
        for module in self.modules:
            module.quantized = quantized

    def release(self) -> None:
        """Its modules quantize for themselves again."""
        for module in self.modules:
            module.probe = module.quantized = None

    # ---- Q(parameter), kept

    def _state(self) -> tuple[int, ...]:
        tensors = self.parameter, self.alpha, self.memory()
        return tuple(x for t in tensors for x in (t.data_ptr(), t._version))

    def wrote_quantized(self) -> None:
        """Note that the buffer holds Q(parameter)."""
        self._written = self._state()

    def quantized(self) -> Tensor | None:
        """Q(parameter) where the buffer holds it and nothing has changed since."""
        return self.buffer if self._written is not None and self._written == self._state() else None


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """Every trainable quantized weight once, however many modules share it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is none; or tensor ids are not distinct, or weights lie on several devices, or
            their eps in units of delta differ.
    """
    checks.instance("model", model, nn.Module)
    found: dict[Tensor, QuantizedWeight] = {}
    for m in model.modules():
        if isinstance(m, QuantizedModule) and m.weight.requires_grad:
            if m.weight in found:
                found[m.weight].modules.append(m)
            else:
                found[m.weight] = QuantizedWeight(m)
    weights = list(found.values())
    if not weights:
        raise ValueError("model must have trainable quantized weights: call quantize_model first")
    ids = [w.tensor_id for w in weights]
    if len(set(ids)) != len(ids):
        raise ValueError(f"model must have a tensor_id of its own for each weight, got {ids}")
    devices = {w.parameter.device for w in weights}
    if len(devices) > 1:
        raise ValueError(f"model must have its quantized weights on one device, got {devices}")
    epsilons = {w.quantizer.epsilon for w in weights}
    if len(epsilons) > 1:
        raise ValueError(
            "model must have one eps in units of delta for all quantized weights, so that one finite"
            f" difference serves them all, got {sorted(epsilons)}"
        )
    return weights
