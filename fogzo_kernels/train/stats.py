"""Estimate and Stats: losses and norm of a step, what it measured for a log, and warnings of bad losses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.view import WeightView
from ..nn.weight import share_at_floor
from ..spec.noise import direction_sign
from .settings import Settings

FAR = 3  # ratio of two losses of a step: eps changes a loss by less, another scale by more
FEW_ROUNDINGS = 4  # losses that differ by less say nothing of the weights
NOTED = ("step", "one_minus_beta")  # of the noise
OF_STEP = ("loss", "difference", "rounding", "guide_norm", "one_minus_beta", "noise_to_guide", "cosine")


class Estimate(NamedTuple):
    """What an estimate is made of."""

    loss: Tensor  # of the gradient pass, 0-dim float32
    losses_plus: Tensor | None  # float32, (n,); None for guided noise
    losses_minus: Tensor | None  # float32, (n,); None for guided noise
    norm: Tensor | None  # N, 0-dim float32; None for a plain straight-through step


class Stats:
    """What the last step of an estimator measured."""

    def __init__(self, settings: Settings, weights: Sequence[WeightView]) -> None:
        self._settings, self._weights = settings, weights
        self.counts_codes = True  # whether the coming step with probes counts the codes that they change
        self._changes: Tensor | None = None  # the share of codes, from the last step that counted
        self._estimate: Estimate | None = None
        self._noise: dict[str, Any] = {}
        self._warned_of_rounding = self._warned_of_lost = False

    def note(self, estimate: Estimate | None, noise: dict[str, Any]) -> None:
        """Keep the estimate of a step and which noise it drew. Numbers on the device are about to advance."""
        self._estimate = estimate
        self._noise = {name: None if x is None else x.clone() for name, x in noise.items() if name in NOTED}

    def note_code_changes(self, share: Tensor) -> None:
        """Keep the share of codes that differ between two probes."""
        self._changes, self.counts_codes = share, False

    def restart(self, lost_steps: int) -> None:
        """Forget the steps so far. A run that goes on warned of its lost steps."""
        self._estimate, self._changes, self.counts_codes = None, None, True
        self._warned_of_lost = bool(lost_steps)

    def read(self) -> dict[str, float]:
        """Return all of it, see :meth:`fogzo_kernels.Fogzo.stats`; waits for the device."""
        stats: dict[str, float] = dict.fromkeys(OF_STEP, math.nan)
        estimate, d = self._estimate, sum(w.parameter.numel() for w in self._weights)
        if estimate is not None:
            stats["loss"] = float(estimate.loss)
        if estimate is not None and estimate.norm is not None:
            noise = float(self._noise["one_minus_beta"])
            stats |= {
                "guide_norm": float(estimate.norm),
                "one_minus_beta": noise,
                "noise_to_guide": noise * d / (1 - noise) if noise < 1 else math.inf,
            }
            if estimate.losses_plus is None or estimate.losses_minus is None:
                stats["cosine"] = cosine(1.0, 1.0, noise, d)
            else:
                differences = estimate.losses_plus - estimate.losses_minus
                stats |= {
                    "difference": float(differences.abs().mean()),
                    "rounding": abs(stats["loss"]) * torch.finfo(torch.float32).eps,
                    "cosine": self._cosine(differences.tolist(), noise, d),
                }
                self._warn_of_rounding(stats["difference"], stats["rounding"])
        stats["code_changes"] = math.nan if self._changes is None else float(self._changes)
        self.counts_codes = True
        return stats | {"alphas_at_floor": share_at_floor([m for w in self._weights for m in w.modules])}

    def _cosine(self, differences: list[float], noise: float, d: int) -> float:
        """Return the cosine between sum_i c_i v_i and g: v_i is sqrt(beta) s_i g / N + sqrt(1 - beta) u_i."""
        number = int(self._noise["step"])
        finite = [(i, c) for i, c in enumerate(differences) if math.isfinite(c)]
        along = sum(direction_sign(self._settings.seed, number, i) * c for i, c in finite)
        return cosine(along, sum(c * c for _, c in finite), noise, d)

    def warn_of_lost(self, steps: int) -> None:
        """Warn once of lost steps; of steps in a CUDA graph stats() asks, as the answer waits for it."""
        if steps and not self._warned_of_lost:
            self._warned_of_lost = True
            warnings.warn(
                "the loss or a gradient of a step was not finite: the step is lost, and changes no weight and"
                " no state. fogzo.diagnostics()['lost_steps'] counts such steps; this warning comes once",
                stacklevel=3,
            )

    def _warn_of_rounding(self, difference: float, rounding: float) -> None:
        if difference < FEW_ROUNDINGS * rounding and not self._warned_of_rounding:
            self._warned_of_rounding = True
            warnings.warn(
                f"the two losses of a probe differ by {difference:.3g}, little more than float32's rounding at"
                f" the loss, {rounding:.3g}: the estimate is mostly rounding. Compute the loss in float32, over"
                " fewer terms or without a large constant, or raise kappa",
                stacklevel=4,
            )


def cosine(along: float, energy: float, noise: float, d: int) -> float:
    """Return the cosine between g and an estimate: the sums of s_i c_i and of c_i^2, 1 - beta, elements."""
    guide = math.sqrt(1 - noise) * along
    size = math.hypot(guide, math.sqrt(noise * d * energy))
    return guide / size if size > 0 else math.nan


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
