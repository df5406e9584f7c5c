"""What a step measured beside its estimate, for a log, and warnings where it tells nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn.view import WeightView
from ..nn.weight import share_at_floor
from ..spec.noise import direction_sign
from .losses import Estimate
from .step import Step

FEW_ROUNDINGS = 4  # by which losses differ without telling anything
OF_STEP = ("loss", "difference", "rounding", "guide_norm", "one_minus_beta", "noise_to_guide", "cosine")


class Stats:
    """Of the last step of an estimator.

    Args:
        seed: of its noise.
        total_weights: d.
    """

    def __init__(self, seed: int, total_weights: int) -> None:
        self.seed, self.total_weights = seed, total_weights
        self.wanted = True  # whether the coming step with probes counts codes that differ
        self._changes: Tensor | None = None  # the share of them in the last step that counted
        self._estimate: Estimate | None = None
        self._noise_left: float | Tensor | None = None  # its 1 - beta
        self._number: int | Tensor = 0  # its own
        self._warned = self._warned_of_lost = False  # that losses differ by rounding alone; of lost steps

    def note(self, step: Step) -> None:
        """Keep what a step found; numbers on its device are about to advance."""
        self._estimate = step.found
        left, number = step.noise["one_minus_beta"], step.noise["step"]
        self._noise_left = left.clone() if isinstance(left, Tensor) else left
        self._number = number.clone() if isinstance(number, Tensor) else number
        if step.changes is not None:
            self._changes, self.wanted = step.changes, False

    def restart(self, lost_steps: int) -> None:
        """There was no step, but so many lost steps in the run that goes on, which said so."""
        self._estimate, self._changes, self.wanted = None, None, True
        self._warned_of_lost = bool(lost_steps)

    def read(self, weights: Sequence[WeightView]) -> dict[str, float]:
        """All of it, see :meth:`fogzo_kernels.Fogzo.stats`; waits for the device."""
        found: dict[str, float] = dict.fromkeys(OF_STEP, math.nan)
        estimate, left = self._estimate, self._noise_left
        if estimate is not None:
            found["loss"] = float(estimate.loss)
        if estimate is not None and estimate.norm is not None and left is not None:
            noise = float(left)
            differences = estimate.losses_plus - estimate.losses_minus
            found |= {
                "difference": float(differences.abs().mean()),
                "rounding": abs(found["loss"]) * torch.finfo(torch.float32).eps,
                "guide_norm": float(estimate.norm),
                "one_minus_beta": noise,
                "noise_to_guide": noise * self.total_weights / (1 - noise) if noise < 1 else math.inf,
                "cosine": self._cosine(differences.tolist(), noise),
            }
            self._warn_of_rounding(found["difference"], found["rounding"])
        found["code_changes"] = math.nan if self._changes is None else float(self._changes)
        self.wanted = True
        return found | {"alphas_at_floor": share_at_floor([m for w in weights for m in w.modules])}

    def _cosine(self, differences: list[float], noise: float) -> float:
        """Of the angle between sum_i c_i v_i and g, in units of delta, with the noise at its expectation.

        v_i is sqrt(beta) s_i g / N + sqrt(1 - beta) u_i, where the u_i have d elements of variance 1.
        """
        number = int(self._number)
        finite = [(i, c) for i, c in enumerate(differences) if math.isfinite(c)]
        along = math.sqrt(1 - noise) * sum(direction_sign(self.seed, number, i) * c for i, c in finite)
        size = math.hypot(along, math.sqrt(noise * self.total_weights * sum(c * c for _, c in finite)))
        return along / size if size > 0 else math.nan

    def warn_of_lost(self, steps: int) -> None:
        """Once; of steps in a CUDA graph stats() asks, as the answer waits for it."""
        if steps and not self._warned_of_lost:
            self._warned_of_lost = True
            warnings.warn(
                "the loss or a gradient of a step was not finite: the step is lost, and changes no weight and"
                " no state. Such steps are counted in fogzo.diagnostics()['lost_steps'] and not said again",
                stacklevel=3,
            )

    def _warn_of_rounding(self, difference: float, rounding: float) -> None:
        if difference < FEW_ROUNDINGS * rounding and not self._warned:
            self._warned = True
            warnings.warn(
                f"the losses of a probe's two sides differ by {difference:.3g}, little more than float32's"
                f" rounding at the loss, {rounding:.3g}: the estimate is mostly that. Compute the loss in"
                " float32, over fewer terms or without a large constant, or raise kappa",
                stacklevel=4,
            )
