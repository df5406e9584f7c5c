"""1 - beta over training (paper section 3; docs/contract.md, section 1)."""

from __future__ import annotations

SCHEDULES = ("linear", "constant")


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
    if schedule == "constant":
        return final
    return final * min(1.0, (step - first) / max(total_steps - first, 1.0))
