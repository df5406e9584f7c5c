"""The losses of a step's passes, and what its estimate takes of them."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 3  # times a loss: more than a step of eps changes it, but where it is scaled otherwise


class Estimate(NamedTuple):
    """What a step's passes found."""

    loss: Tensor  # of the gradient pass, 0-dim float32
    losses_plus: Tensor  # float32, (n,)
    losses_minus: Tensor  # float32, (n,)
    norm: Tensor | None  # N, 0-dim float32; None where there were no probes


class PassLosses:
    """Where the passes of a step put their losses, one tensor, so that devices reduce them in one call.

    Args:
        pairs: of probes, n.
        device: of the weights.
    """

    def __init__(self, pairs: int, device: torch.device) -> None:
        self.pairs = pairs
        # of the gradient pass, of + and of - probes
        self.all = torch.zeros(1 + 2 * pairs, dtype=torch.float32, device=device)

    def slot(self, direction: int, sign: int) -> Tensor:
        """Of one pass: losses of + and of - lie in a row, as the ops take them."""
        if sign == 0:
            return self.all[0]
        return self.all[1 + direction + (self.pairs if sign < 0 else 0)]

    def collected(self, norm: Tensor | None) -> Estimate:
        """What the estimate takes."""
        return Estimate(self.all[0], *self.all[1:].view(2, self.pairs), norm)

    def warn_of_scales(self) -> None:
        """In the first step, where it may wait for the device: losses of one scale are near each other."""
        base, *probes = self.all[: 1 + self.pairs].tolist()
        for loss in probes:
            ratio = loss / base if base else math.nan
            if not 1 / FAR <= ratio <= FAR and math.isfinite(ratio):
                warnings.warn(
                    f"a probe's loss, {loss:.4g}, is {ratio:.3g} times that of the gradient pass, {base:.4g}:"
                    " give every pass losses that are scaled alike (by 1/K, or by a gradient scaler)",
                    stacklevel=4,
                )
                return
