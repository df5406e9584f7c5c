"""1 - beta over training (paper section 3; docs/contract.md, section 1)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

SCHEDULES = ("linear", "constant")

Number = TypeVar("Number", float, Tensor)


def one_minus_beta_at(
    step: int, total_steps: int, final: float, start: float = 0.0, schedule: str = "linear"
) -> float | None:
    """1 - beta of a step, or None before ``start * total_steps``, where training is plain STE.

    From there it is ``final`` (``"constant"``), or beta decays linearly from 1 (``"linear"``): it would
    reach ``1 - final`` at ``total_steps``, and stays there after.
    """
    first = start * total_steps
    if step < first:
        return None
    return final if schedule == "constant" else linear(step - first, total_steps - first, final)


def linear(elapsed: Number, length: float, final: Number | float) -> Number:
    """1 - beta of ``"linear"``, ``elapsed`` steps after its start: from 0 to ``final`` in ``length`` steps.

    Args:
        elapsed: a number, or a 0-dim float64 tensor; then the result is one too, and nothing waits for
            its device.
    """
    part = elapsed / max(length, 1.0)
    return final * (part.clamp(max=1.0) if isinstance(part, Tensor) else min(1.0, part))
