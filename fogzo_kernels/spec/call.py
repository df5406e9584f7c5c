"""What travels together from the ops down: which noise, how it is mixed, what the probes found.

Numbers that change from step to step are 0-dim tensors, on the CPU or on the device, so that a new value
neither recompiles a graph nor waits for the device (docs/contract.md, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .noise import Layout
from .update import UpdateRule


class Draw(NamedTuple):
    """Which noise: everything that it is a function of, but for the direction (contract section 2)."""

    distribution: str
    seed: Tensor  # int64, the bits of an unsigned number
    step: Tensor  # int64
    tensor_ids: Sequence[int]  # one per tensor
    layouts: Sequence[Layout]  # one per tensor


class Mix(NamedTuple):
    """How noise and guide make v, and how far the probes go along it (contract section 1)."""

    norm: Tensor  # N, float32, on the device
    one_minus_beta: Tensor  # float64
    epsilon: float  # in units of delta
    factors: Tensor | None  # t, float32, (tensors,), on the device; None: 1 for each


class Losses(NamedTuple):
    """What the probes found, one entry per direction (contract section 1); guided noise has no probes."""

    plus: Tensor  # float32, (n,)
    minus: Tensor  # float32, (n,)
    counters: Tensor | None  # int64, (3,): lost directions, lost norms, bad alphas (contract section 5)
    guided: bool  # no losses, but noise in proportion to N: one direction, c = N, s = 1

    @property
    def directions(self) -> int:
        """Directions that the estimate adds up."""
        return 1 if self.guided else self.plus.numel()


class Update(NamedTuple):
    """The optimizer's part of the fused tail: its rule, this step's numbers, its memory."""

    rule: UpdateRule
    lr: Tensor  # float64
    optimizer_step: Tensor  # int64: 1 at the optimizer's first step
    masters: Sequence[Tensor]  # float32 copies of the latents, or none
    states: Sequence[Sequence[Tensor]]  # float32, one list for each name in the rule's states


class Measure(NamedTuple):
    """How the elements of a cell become its alpha: max(factor * (statistic + add), least), float32."""

    statistic: str
    factor: float
    add: float
    least: float
