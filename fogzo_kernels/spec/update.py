"""UpdateRule: the optimizer's arithmetic that the fused tail applies (docs/contract.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .checks import check_number, finite, real

#: kind -> its variants, which select the code -> the lists of state of each, as the public ops name them
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "adamw": {"adamw": ("exp_avgs", "exp_avg_sqs")},
    "sgd": {"sgd": (), "momentum": ("momentum_buffers",), "nesterov": ("momentum_buffers",)},
}
#: kind -> all its lists of state
KINDS = {kind: max(variants.values(), key=len) for kind, variants in RULES.items()}
#: variant -> how many of those lists it uses
VARIANTS = {name: len(states) for variants in RULES.values() for name, states in variants.items()}


@dataclass(frozen=True)
class UpdateRule:
    """SGD with momentum, or AdamW, with everything that stays the same from step to step."""

    kind: str
    weight_decay: float = 0.0  # for SGD added to the gradient, for AdamW decoupled, as in PyTorch
    beta1: float = 0.9  # this and the next two are AdamW's, the others SGD's
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("weight_decay", "eps", "momentum"):
            finite(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be >= 0 and < 1, got {value}")
        real("dampening", self.dampening)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be a bool, got {type(self.nesterov).__name__}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov must have momentum > 0 and dampening 0, got {self.momentum} and {self.dampening}"
            )

    @classmethod
    def from_torch(cls, kind: str, options: Mapping[str, Any]) -> UpdateRule:
        """The rule with ``torch.optim``'s names for its numbers: ``betas`` is (beta1, beta2)."""
        own = dict(options)
        if "betas" in own:
            betas = own.pop("betas")
            if not isinstance(betas, tuple | list) or len(betas) != 2:
                raise ValueError(f"betas must be two numbers, got {betas!r}")
            own["beta1"], own["beta2"] = betas
        return cls(kind, **own)

    @property
    def variant(self) -> str:
        """``"adamw"``, ``"sgd"``, or ``"momentum"`` or ``"nesterov"``: what selects the code."""
        if self.kind == "sgd" and self.momentum:
            return "nesterov" if self.nesterov else "momentum"
        return self.kind

    @property
    def states(self) -> int:
        """Float32 state tensors per parameter: exp_avg and exp_avg_sq, or a momentum buffer, or none."""
        return VARIANTS[self.variant]

    @property
    def hyperparameters(self) -> dict[str, float]:
        """What the arithmetic reads besides the variant, by name."""
        return {name: float(getattr(self, name)) for name in HYPERPARAMETERS}


HYPERPARAMETERS = tuple(f.name for f in fields(UpdateRule) if f.type == "float")
