"""torchao: codes in its tensor subclass, for torch.export and what torchao lowers to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..distributed.packing import code_bits
from ..nn.held import HeldWeight
from ..nn.linear import QuantLinear
from ..nn.pretrained import quantized_in
from .integers import check_exact, check_fits, reason_against_held


@torch.no_grad()
def torchao(model: nn.Module) -> nn.Module:
    """Turn quantized linear layers into plain layers whose weights are torchao's ``IntxUnpackedToInt8Tensor``.

    Each code takes a byte, and a grid with an offset becomes a zero point. The model keeps its outputs, bit for
    bit, in its dtype. The latents are lost: ``copy.deepcopy`` the model first if you want to train on.

    Args:
        model: a model that :func:`fogzo_kernels.quantize_model` quantized, whose quantized modules are all
            linear.

    Returns:
        ``model``; if it is itself a quantized layer, the same layer, now plain.

    Raises:
        TypeError, ValueError: torchao's tensor cannot hold a module. The message names it and the reason;
            nothing has changed then.
        ModuleNotFoundError: ``torchao`` is not installed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.5))
        >>> type(fk.export.torchao(model).weight).__name__
        'IntxUnpackedToInt8Tensor'
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    modules = quantized_in(model, "export")
    plan: list[tuple[QuantLinear, Any]] = []
    for name, m in modules.items():
        what = m.quantizer.transform or (m.activation and "quantized ones")
        reasons = {
            reason_against_held(m): isinstance(m, HeldWeight),
            f"it stands for linear layers, got {type(m).__name__}": not isinstance(m, QuantLinear),
            f"it has neither transforms nor these inputs, got {what}": what is not None,
        }
        check_fits(name, "torchao's tensor", reasons)
        assert isinstance(m, QuantLinear)
        grid, (rows, columns), dtype = m.quantizer.grid, m.weight.shape, m.weight.dtype
        codes, delta = m.codes(), m.alpha.detach() * grid.r
        check_exact(name, delta, dtype)
        delta = delta.reshape(1 if delta.numel() == 1 else rows, -1).to(dtype)
        block = [rows // delta.shape[0], columns // delta.shape[1]]
        zero = torch.full_like(delta, -grid.offset)
        bits = getattr(torch, f"int{max(code_bits(grid), 2)}")
        plan.append((m, IntxUnpackedToInt8Tensor(codes, delta, zero, bits, block, dtype, None)))
    for m, weight in plan:
        m.to_plain()
        m.weight = nn.Parameter(weight, requires_grad=False)
    return model
