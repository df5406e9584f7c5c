"""Settings: what a run of the estimator is, from its first step to its last."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops import checks
from ..spec.noise import MAX_DIRECTION, MAX_SEED, check_number, check_range
from ..spec.schedule import SCHEDULES, one_minus_beta_at


@dataclass(frozen=True)
class Settings:
    """What a resumed run must have in common with the one that it continues.

    Args:
        total_steps: steps over which beta decays from 1.
        one_minus_beta: 1 - beta at the end, in 0..1.
        directions: n, the pairs of probes per step.
        seed: of the noise, unsigned 64 bits.
        epsilon_scale: factor on the eps that the straight-through estimator fixes.
        schedule: ``"linear"`` or ``"constant"``.
        start: fraction of training that runs plain STE first.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    total_steps: int
    one_minus_beta: float
    directions: int
    seed: int
    epsilon_scale: float
    schedule: str
    start: float

    def __post_init__(self) -> None:
        total_steps = self.total_steps
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int >= 1, got {total_steps}")
        checks.unit_interval("one_minus_beta", self.one_minus_beta)
        check_range("directions", self.directions, MAX_DIRECTION + 1)
        if self.directions < 1:
            raise ValueError(f"directions must be >= 1, got {self.directions}")
        check_range("seed", self.seed, MAX_SEED)
        checks.finite("epsilon_scale", self.epsilon_scale)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        checks.unit_interval("start", self.start)
        for name in ("one_minus_beta", "epsilon_scale", "start"):  # an int is equal, but reads otherwise
            object.__setattr__(self, name, float(getattr(self, name)))

    def one_minus_beta_at(self, step: int) -> float | None:
        """1 - beta of a step; None while training is plain STE."""
        return one_minus_beta_at(step, self.total_steps, self.one_minus_beta, self.start, self.schedule)


def final_one_minus_beta(value: float | None, kappa: float | None, weights: int) -> float:
    """1 - beta at the end, given as it is or as kappa = (1 - beta) * weights."""
    if (value is None) == (kappa is None):
        raise ValueError(f"one of one_minus_beta and kappa must be given, got {value} and {kappa}")
    if value is not None:
        return value
    assert kappa is not None
    check_number("kappa", kappa)
    if not 0 <= kappa <= weights:
        raise ValueError(f"kappa must be in 0..{weights}, the number of weights, got {kappa}")
    return kappa / weights
