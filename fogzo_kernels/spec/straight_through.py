"""StraightThrough: derivative, noise distribution and eps from one choice.

A straight-through estimator replaces a step function by its mean under noise,
``h_smooth(x) = E[h(x + eps_bar u)]``, so one object fixes all three (Yang & Aamodt, NeurIPS
2025, table 1; docs/contract.md, section 1).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .grid import Grid
from .noise import DISTRIBUTIONS

#: kind -> (eps_bar in units of alpha, distribution of u)
KINDS: dict[str, tuple[float, str]] = {
    "identity": (1.0 / (2.0 * math.sqrt(3.0)), "uniform"),
    "hardtanh": (1.0 / math.sqrt(3.0), "uniform"),
    "tanh": (math.pi / math.sqrt(12.0), "logistic"),
    "approxsign": (1.0 / math.sqrt(6.0), "triangular"),
}

#: Each form of derivative by one name -> kind and clip. Only identity has several.
FORMS: dict[str, tuple[str, bool | str]] = {
    "identity_clipped": ("identity", True),
    "identity_trust": ("identity", "trust"),
    "identity": ("identity", False),
    **{kind: (kind, True) for kind in KINDS if kind != "identity"},
}
VARIANTS = tuple(FORMS)
#: Those whose h' is 0 or 1, and so does not change with the latent.
FLAT = ("identity", "identity_clipped", "identity_trust", "hardtanh")
#: Where a loss differentiates twice and there is no formula for it.
NO_SECOND = (
    "the straight-through gradient of {} has no derivative: a loss that differentiates must not do so through"
    " an input that is quantized so. Give these modules another activation, or none"
)


@dataclass(frozen=True)
class StraightThrough:
    """How gradients pass a quantizer, and the noise that smooths it the same way.

    Args:
        kind: ``"identity"`` for rounding grids; ``"hardtanh"``, ``"tanh"`` or ``"approxsign"`` for signs.
        clip: for ``"identity"``, where the derivative is 0: outside the grid's range (``True``, the
            smoothed clamp); where no code is within half a delta (``"trust"``, QuEST's mask: Panferov
            et al., 2025, arXiv 2502.05003); or nowhere (``False``), so that a saturated weight can come back.
        noise: a distribution in place of the matching one: ``"gaussian"`` or ``"rademacher"`` (SPSA, MeZO).
    """

    kind: str = "identity"
    clip: bool | str = True
    noise: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.clip, bool | str):
            raise TypeError(f"clip must be a bool or 'trust', got {type(self.clip).__name__}")
        if isinstance(self.clip, str) and self.clip != "trust":
            raise ValueError(f"clip must be True, False or 'trust', got {self.clip!r}")
        if self.clip == "trust" and self.kind != "identity":
            raise ValueError(f"clip must be True or False for {self.kind!r}, got 'trust'")
        if self.noise is not None and self.noise not in DISTRIBUTIONS:
            raise ValueError(f"noise must be None or one of {', '.join(DISTRIBUTIONS)}, got {self.noise!r}")

    @property
    def variant(self) -> str:
        """The kind, for ``"identity"`` with its clip: what selects the derivative's code."""
        if self.kind != "identity" or self.clip is False:
            return self.kind
        return "identity_trust" if self.clip == "trust" else "identity_clipped"

    @classmethod
    @functools.cache
    def of_variant(cls, name: str) -> StraightThrough:
        """The one of this :attr:`variant`, with the noise that belongs to it."""
        if name not in FORMS:
            raise ValueError(f"straight_through must be one of {', '.join(FORMS)}, got {name!r}")
        return cls(*FORMS[name])

    @property
    def distribution(self) -> str:
        """Distribution of the noise u."""
        return self.noise or KINDS[self.kind][1]

    @property
    def eps_bar(self) -> float:
        """Scale of the noise in units of alpha."""
        return KINDS[self.kind][0]

    def epsilon(self, grid: Grid, epsilon_scale: float = 1.0) -> float:
        """eps in units of delta on ``grid``."""
        return epsilon_scale * self.eps_bar / grid.r

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError unless this straight-through estimator belongs to ``grid``."""
        if not isinstance(grid, Grid):
            raise TypeError(f"grid must be a Grid, got {type(grid).__name__}")
        if grid.is_sign == (self.kind == "identity"):
            raise ValueError(
                f"straight_through must be 'identity' for rounding grids and one of"
                f" {', '.join(kind for kind in KINDS if kind != 'identity')} for the sign grid,"
                f" got {self.kind!r} with {grid}"
            )
