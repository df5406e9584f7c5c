"""Alpha of a weight's rows: made by the quantizer's scale, and checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import hadamard_, measure_alphas_
from ..ops import checks, memory
from ..spec.hadamard import Hadamard
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale


@torch.no_grad()
def alpha_of(name: str, weight: Tensor, outputs: int, quantizer: Quantizer) -> Tensor:
    """Alpha that the quantizer's scale gives a weight: a new float32 tensor on its device.

    The scale is given rows in their plain order, whatever the memory format, so that it gives the same bits. A
    learned alpha of weights that are all 0 begins as that of PyTorch's first weights does, see :data:`FIRST`.

    Args:
        name: of the weight, for messages.
        weight: of a module; without values (meta) the alpha has none.
        outputs: the dimension that counts the outputs.

    Raises:
        TypeError, ValueError: it does not fit; the message names the weight.
    """
    rows = weight.detach().movedim(outputs, 0).flatten(1).contiguous()
    transform = quantizer.transform
    if transform and rows.shape[1] % transform.block:
        raise ValueError(
            f"transform must have a block that divides the rows of the weight, of {rows.shape[1]} elements, got"
            f" {transform} for {name}"
        )
    alpha = _made(name, rows, quantizer)
    count, length = rows.shape
    shape = tuple(alpha.shape)
    own = alpha.numel() == rows.numel() and length > 1  # one for each weight: nothing would be left to train
    if own or not checks.fits(shape, rows.shape):
        raise ValueError(
            f"alpha must have one element, one per row, shape ({count}, 1), or one per group of a row, shape"
            f" ({count}, groups) with {length} / groups elements each, for {name} with {count} rows of"
            f" {length}, got shape {shape}"
        )
    if transform and (shared := rows.numel() // max(alpha.numel(), 1)) % transform.block:
        raise ValueError(
            f"alpha must be one for whole blocks of {transform}, got one for each {shared} elements for {name}"
        )
    low, high = memory.alpha_range(quantizer.grid.r)
    if not alpha.is_meta and not memory.in_range(alpha, low, high):
        zero = quantizer.scale.from_weight and float(alpha.min()) == 0
        remedy = (
            ": where weights are all 0, a measured scale needs a bound, Scale.absmax(least=1e-5) say, and a"
            " function must return more than 0"
        )
        raise ValueError(
            f"alpha must be finite, > 0 and in {low:g}..{high:g}, got {alpha.min()}..{alpha.max()} for {name}"
            + remedy * zero
        )
    return alpha


#: Statistics of the weights that PyTorch's layers begin with, uniform within 1 / sqrt(inputs), times that root.
FIRST = {"absmax": 1.0, "absmean": 1 / 2, "rms": 1 / math.sqrt(3)}


def _made(name: str, rows: Tensor, quantizer: Quantizer) -> Tensor:
    is_learned, scale = isinstance(quantizer.scale, LearnedScale), quantizer.scale
    if isinstance(scale, LearnedScale):
        scale = scale.first(quantizer.grid)
    transform = None if rows.is_meta else quantizer.transform
    if isinstance(scale, FixedScale):
        return scale.of(rotated_rows([rows], transform)[0] if scale.from_weight else rows)
    assert isinstance(scale, MeasuredScale)
    try:
        shape = scale.shape_for(*rows.shape)
    except ValueError as error:
        raise ValueError(f"{error} for {name}") from None
    alpha = torch.empty(shape, dtype=torch.float32, device=rows.device)
    if not rows.is_meta:
        measure_([alpha], [rows], scale, transform)
        if is_learned:
            first = scale.factor * FIRST[scale.statistic] / math.sqrt(max(rows.shape[1], 1))
            alpha.masked_fill_(alpha == 0, first)
    return alpha


def measure_(
    alphas: Sequence[Tensor], rows: Sequence[Tensor], scale: MeasuredScale, transform: Hadamard | None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Write the alphas that the scale measures from these rows, or from what a transform makes of them.

    One launch for all. The rms of whole blocks is the same before and after. No gradient passes; there is no
    ``no_grad`` here, as exported programs that have one cannot be loaded.
    """
    if scale.statistic != "rms":
        rows = rotated_rows(rows, transform, backend)
    measure_alphas_(
        alphas, rows, statistic=scale.statistic, factor=scale.factor, add=scale.add, least=scale.least,
        backend=backend,
    )  # fmt: skip


def rotated_rows(
    rows: Sequence[Tensor], transform: Hadamard | None, backend: str | None = None
) -> Sequence[Tensor]:
    """Rows in the basis in which they are quantized: float32 where there is a transform."""
    if transform is None:
        return rows
    out = [torch.empty_like(t, dtype=torch.float32) for t in rows]
    hadamard_(out, list(rows), block=transform.block, backend=backend)
    return out


@torch.no_grad()
def share_at_floor(modules: Sequence[Any]) -> float:
    """The share of alphas that lie at the least value that they may have, of those that move; NaN without any.

    Learned ones are held there, measured ones have a bound. An alpha that is no number counts.
    """
    pairs = {}
    for m in modules:
        if isinstance(m.quantizer.scale, MeasuredScale):
            pairs[id(m.alpha)] = m.alpha, m.quantizer.scale.least
        pairs |= {id(alpha): (alpha, least) for alpha, least in m.learned_alphas(("alpha", "input_alpha"))}
    low = sum(int((~(alpha > least)).sum()) for alpha, least in pairs.values())
    return low / total if (total := sum(alpha.numel() for alpha, _ in pairs.values())) else math.nan


#: Of its first value: where a learned alpha is held that an update drove out of range.
HELD = 2.0**-20


@torch.no_grad()
def hold_alphas(modules: Sequence[Any], names: Sequence[str] = ("alpha", "input_alpha")) -> Tensor | None:
    """Hold learned alphas that an update drove out of range at 2^-20 of their first value, and warn once.

    Args:
        modules: quantized ones.
        names: which of their alphas, where they are learned.

    Returns:
        How many, 0-dim int64 on their device, where nothing waits for it; None if there are none, as is seen on
        the CPU.
    """
    pairs = {id(alpha): (alpha, least) for m in modules for alpha, least in m.learned_alphas(names)}
    if not pairs:
        return None
    alphas, lows = zip(*pairs.values(), strict=True)
    now, least, most = memory.in_a_row(alphas), memory.in_a_row(lows), memory.alpha_range(2)[1]
    seen = now.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and torch.equal(now, torch.maximum(now, least).clamp_(max=most)):
        return None
    out = ~((now >= least) & (now <= most))  # NaN too
    count = out.sum()
    parts = torch.where(out, least, now).split([alpha.numel() for alpha in alphas])
    torch._foreach_copy_([*alphas], [part.view_as(a) for part, a in zip(parts, alphas, strict=True)])
    if seen:
        if not any(m.warned for m in modules):
            warnings.warn(
                "a learned alpha was driven out of range and is held at 2^-20 of its first value: is its"
                " learning rate too high?",
                stacklevel=3,
            )
        for m in modules:
            m.warned = True
    return count


def in_its_range(alpha: Tensor, least: Tensor) -> Tensor:
    """What :func:`hold_alphas` would make of a learned alpha, for an exported program: nothing is written."""
    return torch.where((alpha >= least) & (alpha <= memory.alpha_range(2)[1]), alpha, least)
