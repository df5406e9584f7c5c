"""What ``torch.amp.GradScaler`` tells a fused optimizer around its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.view import local


class Scaling(NamedTuple):
    """What a scaler has set on an optimizer around its step."""

    scale: Tensor | None  # of losses and gradients; None where gradients are unscaled already
    found_inf: Tensor | None  # not 0 where a gradient is not finite; None without a scaler

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Scaling:
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        return cls(scale, None if overflow is None else torch.as_tensor(overflow, dtype=torch.float32))

    def check(self, closure: bool, passes: bool, own: bool) -> None:
        """Raise where losses and gradients would not be scaled alike, before anything moves.

        The step runs a ``closure``, or makes the estimate of ``passes``; ``own``: found_inf is Fogzo's own.
        """
        if closure and self.scale is not None:
            raise RuntimeError(
                "closure must be None under a gradient scaler, which looks at gradients before the step: call"
                " fogzo.run(lambda: scaler.scale(...)) first, then scaler.step(optimizer)"
            )
        if passes and self.scale is None and self.found_inf is not None and not own:
            raise RuntimeError(
                "scaler.unscale_(optimizer) must not come between the passes and a fused step, whose losses are"
                " scaled still: call fogzo.estimate_() before it"
            )

    @torch.no_grad()
    def unscale_(self, grads: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, if there is one, in place."""
        if self.scale is None:
            return
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in map(local, grads):
            by_device.setdefault(grad.device, []).append(grad)
        for device, own in by_device.items():
            torch._foreach_div_(own, self.scale.to(device, non_blocking=True))
