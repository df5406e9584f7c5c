"""freeze_scales_: a trained model's scales become numbers that a format's dtype holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..nn import pretrained
from ..ops import checks
from ..spec.scale import LearnedScale, Scale
from .integers import quantized_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def freeze_scales_(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Fix the scales of a model's weights where they are, rounded to a dtype, so that export changes no bit.

    Formats keep scales in the model's dtype (compressed-tensors) or in float16 (GGUF); between them and float32
    there are codes that flip. Freeze, evaluate what you get, then export it. Scales that were learned or
    measured are fixed from now on, and the model is no longer trained as before.

    Args:
        model: as :func:`quantize_model` made it.
        dtype: ``torch.float16`` for GGUF; the model's own for compressed-tensors; float32 only fixes them.

    Raises:
        TypeError, ValueError: an argument is wrong, or a scale is 0 or infinite in ``dtype``; nothing has
            changed then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {checks.named(DTYPES)}, got {dtype}")
    modules = quantized_in(model)
    plan = []
    for name, m in modules.items():
        m.codes()  # measures what is measured
        alpha = m.alpha.detach().to(dtype).float()
        if not bool(((alpha > 0) & alpha.isfinite()).all()):
            raise ValueError(
                f"{name}.alpha must be > 0 and finite in {dtype}, got {m.alpha.min()}..{m.alpha.max()}"
            )
        plan.append((m, alpha))
    for m, alpha in plan:
        if isinstance(m.quantizer.scale, LearnedScale):
            del m._parameters["alpha"], m._buffers["alpha_least"]
            m.register_buffer("alpha", alpha)
            m.weight_quantizer.shares = False
        else:
            m.alpha.copy_(alpha)
        m.quantizer = replace(m.quantizer, scale=Scale.fixed(alpha))
    pretrained.record(model)
