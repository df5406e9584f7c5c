"""Estimate: the losses and the norm that an estimate is made of, and whether losses have one scale."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from torch import Tensor

FAR = 3  # ratio of two losses of a step: eps changes a loss by less, another scale by more


class Estimate(NamedTuple):
    """What an estimate is made of."""

    loss: Tensor  # of the gradient pass, 0-dim float32
    losses_plus: Tensor  # float32, (n,)
    losses_minus: Tensor  # float32, (n,)
    norm: Tensor | None  # N, 0-dim float32; None where there were no probes


def warn_of_scales(losses: Tensor) -> None:
    """Warn if a probe's loss is far from the loss of the gradient pass, which stands first. Waits for them."""
    base, *probes = losses.tolist()
    for loss in probes:
        ratio = loss / base if base else math.nan
        if not 1 / FAR <= ratio <= FAR and math.isfinite(ratio):
            warnings.warn(
                f"a probe's loss, {loss:.4g}, is {ratio:.3g} times that of the gradient pass, {base:.4g}:"
                " give every pass losses that are scaled alike (by 1/K, or by a gradient scaler)",
                stacklevel=4,
            )
            return
