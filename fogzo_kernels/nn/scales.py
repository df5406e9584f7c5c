"""Alpha of a weight's rows: made by the quantizer's scale, and checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import measure_alphas_
from ..ops import checks, memory
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale


@torch.no_grad()
def alpha_of(name: str, weight: Tensor, outputs: int, quantizer: Quantizer) -> Tensor:
    """Alpha that the quantizer's scale gives a weight: a new float32 tensor on its device.

    The scale is given rows in their plain order, whatever the memory format, so that it gives the same bits.

    Args:
        name: of the weight, for messages.
        weight: of a module; without values (meta) the alpha has none.
        outputs: the dimension that counts the outputs.

    Raises:
        TypeError, ValueError: it does not fit; the message names the weight.
    """
    rows = weight.detach().movedim(outputs, 0).flatten(1).contiguous()
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
    low, high = memory.alpha_range(quantizer.grid.r)
    if not alpha.is_meta and not memory.in_range(alpha, low, high):
        raise ValueError(
            f"alpha must be finite, > 0 and in {low:g}..{high:g}, got {alpha.min()}..{alpha.max()} for {name}"
        )
    return alpha


def _made(name: str, rows: Tensor, quantizer: Quantizer) -> Tensor:
    scale = quantizer.scale
    if isinstance(scale, LearnedScale):
        scale = scale.first(quantizer.grid)
    if isinstance(scale, FixedScale):
        return scale.of(rows)
    assert isinstance(scale, MeasuredScale)
    try:
        shape = scale.shape_for(*rows.shape)
    except ValueError as error:
        raise ValueError(f"{error} for {name}") from None
    alpha = torch.empty(shape, device=rows.device)
    if not rows.is_meta:
        measure_([alpha], [rows], scale)
    return alpha


@torch.no_grad()
def measure_(
    alphas: Sequence[Tensor], rows: Sequence[Tensor], scale: MeasuredScale, backend: str | None = None
) -> None:
    """Write the alphas that the scale measures from these rows: one launch for all."""
    measure_alphas_(
        alphas, rows, statistic=scale.statistic, factor=scale.factor, add=scale.add, least=scale.least,
        backend=backend,
    )  # fmt: skip
