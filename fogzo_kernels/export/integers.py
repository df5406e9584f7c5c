"""A quantized weight as integers and scales, which every format writes in its own way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..nn.pretrained import quantized_in, quantized_modules, record
from ..nn.quantized import QuantizedWeight
from ..nn.state_dict import EXTRA_STATE
from ..ops import checks
from ..spec.grid import FLOATS, Grid
from ..spec.scale import LearnedScale, Scale


def integers_of(module: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Reads a module's weight, on the CPU; a rotated weight stays in the basis in which it is quantized.

    Returns:
        ``numbers``, int16, (rows, columns), and ``scale``, float32, (rows or 1, groups of a row). In float32
        the values are exactly ``scale * numbers``; odd numbers stand for codes of half offset.
    """
    grid, codes = module.quantizer.grid, module.codes().cpu().to(torch.int16)
    alpha = module.alpha.detach().float().cpu() * (grid.r / (2 if grid.offset else 1))
    scale = alpha.reshape(1 if alpha.numel() == 1 else len(codes), -1)
    assert codes.shape[1] % scale.shape[1] == 0
    return (2 * codes + 1 if grid.offset else codes), scale


def range_of(grid: Grid) -> tuple[int, int]:
    """Returns the least and the greatest number of a grid."""
    return (2 * grid.qmin + 1, 2 * grid.qmax + 1) if grid.offset else (grid.qmin, grid.qmax)


def bits_of(grid: Grid) -> int:
    """Returns how many bits of two's complement hold any number of a grid."""
    return 1 + max((x if x >= 0 else ~x).bit_length() for x in range_of(grid))


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state of a model without its quantized weights and what quantized modules add."""
    own = {
        key.lstrip(".")
        for name, m in quantized_modules(model).items()
        for key in (m.weight_key(f"{name}."), *(f"{name}.{x}" for x in (EXTRA_STATE, *m.own_tensors())))
    }
    return {key: t for key, t in model.state_dict(keep_vars=True).items() if key not in own}


def copied(t: Tensor) -> Tensor:
    """Copies a tensor to the CPU, into memory of its own, as files take it."""
    return t.detach().cpu().contiguous().clone()


def check_exact(name: str, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a format's dtype holds a scale as it is."""
    if not torch.equal(scale.to(dtype).float(), scale):
        raise ValueError(
            f"{name}.alpha must hold numbers of {checks.named([dtype])} for this format, got others, which"
            f" would be rounded: call fk.export.freeze_scales_(model, {dtype}) first, and evaluate the model"
            " again"
        )


def reason_against_held(module: QuantizedWeight) -> str:
    """Says of a parameter that is no linear layer's what can be done instead."""
    what = "a stack of experts" if module.expert_count is not None else type(module.home).__name__
    return (
        f"it holds linear layers only, got {what}: fk.export.safetensors holds any model, and"
        " fk.dequantize_model(model) makes a plain one to save as ever"
    )


def check_fits(name: str, form: str, reasons: dict[str, bool]) -> None:
    """Raise if a reason why a format cannot hold a module is true."""
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"{name} must fit {form}: {reason}")


@torch.no_grad()
def freeze_scales_(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Fix the scales of a model's weights, rounded to a dtype, so that an export changes no bit.

    Formats keep scales in the model's dtype (compressed-tensors) or in float16 (GGUF), and rounding a scale
    changes some codes. Freeze the scales, evaluate the model, then export it. Learned and measured scales are
    fixed afterwards, so do not train the model further.

    Args:
        model: a model that :func:`fogzo_kernels.quantize_model` quantized.
        dtype: ``torch.float16`` for GGUF, the model's own dtype for compressed-tensors. ``torch.float32`` fixes
            the scales without rounding.

    Raises:
        TypeError, ValueError: an argument is wrong, or a scale is 0 or infinite in ``dtype``. Nothing has
            changed then.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
        >>> fk.export.freeze_scales_(model, torch.float16)
        >>> round(model.alpha.item(), 6)
        0.099976
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {checks.named(FLOATS)}, got {dtype}")
    modules = quantized_in(model, "export")
    plan = []
    for name, m in modules.items():
        m.codes()  # measures a measured alpha
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
    record(model)
