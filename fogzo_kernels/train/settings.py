"""Settings: what a run of the estimator is, from its first step to its last."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops import checks
from ..spec.checks import check_number, check_range
from ..spec.noise import MAX_DIRECTION, MAX_SEED, MAX_STEP

Number = TypeVar("Number", float, Tensor)

KAPPA = 0.1  # where neither kappa nor 1 - beta is given
NOISE_PER = ("model", "tensor")
SCHEDULES = ("linear", "constant")
#: Settings that states written before have, and the one value of each that a step still has.
RETIRED = {"difference": "central", "probe_share": 1.0}
#: Settings that states written before lack, and what their steps did.
ADDED = {"noise_per": "model"}


#: What to write instead of arguments that Fogzo has not.
HINTS = {
    "beta": "the argument is one_minus_beta, 1 - beta at the end, or kappa",
    "steps": "the argument is total_steps",
    "max_steps": "the argument is total_steps",
    "num_steps": "the argument is total_steps",
    "n": "the argument is directions",
    "num_directions": "the argument is directions",
    "eps": "the argument is epsilon_scale, a factor on eps",
    "epsilon": "the argument is epsilon_scale, a factor on eps",
    "lr": "the optimizer has the learning rate",
}


@dataclass(frozen=True)
class Settings:
    """What a resumed run must have in common with the one that it continues, see :class:`Fogzo`.

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
    every: int = 1
    noise_per: str = "model"

    def __post_init__(self) -> None:
        for name in ("total_steps", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value}")
        checks.unit_interval("one_minus_beta", self.one_minus_beta)
        check_range("directions", self.directions, MAX_DIRECTION + 1)
        check_range("seed", self.seed, MAX_SEED)
        for name in ("total_steps", "every", "directions", "seed"):  # NumPy's would not load as weights only
            object.__setattr__(self, name, int(getattr(self, name)))
        checks.finite("epsilon_scale", self.epsilon_scale)
        if not self.epsilon_scale > 0:
            raise ValueError(
                f"epsilon_scale must be > 0, got {self.epsilon_scale}: at 0 probes would not differ"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.noise_per not in NOISE_PER:
            raise ValueError(f"noise_per must be one of {', '.join(NOISE_PER)}, got {self.noise_per!r}")
        checks.unit_interval("start", self.start)
        for name in ("one_minus_beta", "epsilon_scale", "start"):  # an int reads otherwise
            object.__setattr__(self, name, float(getattr(self, name)))

    def one_minus_beta_at(self, step: int) -> float | None:
        """1 - beta of a step (paper section 3); None for a plain straight-through step.

        ``start`` and ``every`` make such steps, and so does guided noise (no directions) with 1 - beta = 0.
        """
        first, final = self.start * self.total_steps, self.one_minus_beta
        if step % self.every or step < first or (final == 0 and not self.directions):
            return None
        return final if self.schedule == "constant" else linear(step - first, self.total_steps - first, final)


def linear(elapsed: Number, length: float, final: Number | float) -> Number:
    """1 - beta of ``"linear"``, ``elapsed`` steps after its start: from 0 to ``final`` in ``length`` steps.

    Args:
        elapsed: a number, or a 0-dim float64 tensor, as is the result then. Nothing waits for its device.
    """
    part = elapsed / max(length, 1.0)
    return final * (part.clamp(max=1.0) if isinstance(part, Tensor) else min(1.0, part))


def loaded(
    state: Mapping[str, Any], settings: Settings, counters: Tensor, may_differ: Sequence[str]
) -> tuple[int, Tensor]:
    """Return the steps and counters of a state. Its settings must be these, but for names that may differ.

    Raises:
        ValueError: a setting differs, ``may_differ`` names no setting, or a key or a value is wrong.
    """
    for name, value in RETIRED.items():
        if state.get(name, value) != value:
            raise ValueError(
                f"state[{name!r}] must be {value}, got {state[name]!r}: steps of that kind are not offered any"
                " more"
            )
    state, own = ADDED | dict(state), asdict(settings)
    expected, given = {"steps", "counters", *own}, {*state} - {*RETIRED}
    if given != expected:
        raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(given)}")
    unknown = [name for name in may_differ if name not in own]
    if isinstance(may_differ, str) or unknown:
        raise ValueError(f"may_differ must be a list of some of {', '.join(own)}, got {may_differ!r}")
    differ = [name for name, value in own.items() if state[name] != value and name not in may_differ]
    if differ:
        shown = " and ".join(f"state[{name!r}] must be {own[name]}, got {state[name]}" for name in differ)
        raise ValueError(
            f"{shown}. To go on with this object's value, give load_state_dict may_differ={differ}; in"
            " FogzoTrainer and Lightning's FogzoModuleMixin it is one of the options of fogzo"
        )
    steps, saved = int(state["steps"]), torch.as_tensor(state["counters"])
    check_range("state['steps']", steps, MAX_STEP)
    if saved.shape != counters.shape:
        raise ValueError(f"state['counters'] must have shape {tuple(counters.shape)}, got {tuple(saved.shape)}")
    return steps, saved


def final_one_minus_beta(value: float | None, kappa: float | None, weights: int) -> float:
    """1 - beta at the end, given as it is or as kappa = (1 - beta) * weights."""
    if value is not None:
        if kappa is not None:
            raise ValueError(f"one_minus_beta and kappa must not both be given, got {value} and {kappa}")
        if isinstance(value, (int, float)) and 0.5 < value < 1:
            warnings.warn(
                f"one_minus_beta is 1 - beta, got {value}, which leaves almost no guide: for beta = {value}"
                f" give one_minus_beta={1 - value:.6g}",
                stacklevel=4,
            )
        return value
    kappa = min(KAPPA, weights) if kappa is None else kappa
    check_number("kappa", kappa)
    if not 0 <= kappa <= weights:
        raise ValueError(f"kappa must be in 0..{weights}, the number of weights, got {kappa}")
    return kappa / weights
