"""A quantized weight as integers and scales: what every format writes, each in its own way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.module import QuantizedModule
from ..nn.state_dict import EXTRA_STATE
from ..ops import checks
from ..spec.grid import Grid


class Integers(NamedTuple):
    """Values are ``scale * numbers``, exactly, in float32. Odd numbers stand for codes of half offset.

    Attributes:
        numbers: int16, (rows, columns).
        scale: float32, (rows or 1, groups of a row).
    """

    numbers: Tensor
    scale: Tensor

    @property
    def group(self) -> int:
        """Returns how many columns share a scale."""
        return self.numbers.shape[1] // self.scale.shape[1]

    @classmethod
    def of(cls, module: QuantizedModule) -> Integers:
        """Reads a module's weight, on the CPU. A rotated weight stays in the basis in which it is quantized."""
        grid, codes = module.quantizer.grid, module.codes().cpu().to(torch.int16)
        alpha = module.alpha.detach().float().cpu() * (grid.r / (2 if grid.offset else 1))
        scale = alpha.reshape(1 if alpha.numel() == 1 else len(codes), -1)
        assert codes.shape[1] % scale.shape[1] == 0
        return cls(2 * codes + 1 if grid.offset else codes, scale)


def range_of(grid: Grid) -> tuple[int, int]:
    """Returns the least and the greatest number of a grid."""
    low, high = (2 * c + 1 if grid.offset else c for c in (grid.qmin, grid.qmax))
    return low, high


def bits_of(grid: Grid) -> int:
    """Returns how many bits of two's complement hold any number of a grid."""
    low, high = range_of(grid)
    return next(b for b in range(1, 10) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1))


def quantized_in(model: nn.Module) -> dict[str, QuantizedModule]:
    """Returns the quantized modules of a model, by name.

    Raises:
        TypeError, ValueError: it is not a model, or has none.
    """
    checks.instance("model", model, nn.Module)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not modules:
        raise ValueError("model must have quantized modules to export, got none: call quantize_model first")
    return modules


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state of a model without its quantized weights and what quantized modules add."""
    own = {
        f"{name}.{key}" if name else key
        for name, m in model.named_modules()
        if isinstance(m, QuantizedModule)
        for key in ("weight", EXTRA_STATE, *m.own_tensors())
    }
    return {key: t for key, t in model.state_dict(keep_vars=True).items() if key not in own}


def copied(t: Tensor) -> Tensor:
    """Copies a tensor to the CPU, into memory of its own, as files take it."""
    return t.detach().cpu().contiguous().clone()


def check_exact(name: str, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a format's dtype holds a scale as it is."""
    if torch.equal(scale.to(dtype).float(), scale):
        return
    raise ValueError(
        f"{name}.alpha must be a number of {checks.named([dtype])} for this format, got others, which would be"
        f" rounded: call fk.export.freeze_scales_(model, {dtype}) before, and look at the model that you get"
    )


def check_fits(name: str, form: str, reasons: dict[str, bool]) -> None:
    """Raise if one of the reasons why a format cannot hold a module is true."""
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"{name} must fit {form}: {reason}")
