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
    """How gradients pass a quantizer, and the noise whose mean effect has that derivative.

    With noise, Q is on average a smooth function h(x) = E[Q(x + eps_bar u)]. The straight-through gradient is
    h'(x) dL/dQ. One choice thus fixes derivative, distribution of u and eps (arXiv 2510.23926, table 1;
    contract, section 1).

    Args:
        kind: ``"identity"`` for rounding grids; ``"hardtanh"``, ``"tanh"`` or ``"approxsign"`` for
            ``Grid.sign()``.
        clip: where the derivative of ``"identity"`` is 0. ``True``: outside the range of the grid. ``"trust"``:
            where no code is within half a delta, QuEST's mask (arXiv 2502.05003). ``False``: nowhere, so that
            saturated weights can recover.
        noise: a distribution instead of the one that matches: ``"gaussian"`` or ``"rademacher"`` (SPSA, MeZO),
            ``"uniform"``, ``"triangular"`` or ``"logistic"``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, is unknown or does not fit ``kind``.

    Example:
        >>> how = fk.StraightThrough("identity", clip=False)
        >>> how.distribution, round(how.eps_bar, 4)
        ('uniform', 0.2887)
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
        """Name of the derivative, ``"identity_clipped"`` for example."""
        if self.kind != "identity" or self.clip is False:
            return self.kind
        return "identity_trust" if self.clip == "trust" else "identity_clipped"

    @classmethod
    @functools.cache
    def of_variant(cls, name: str) -> StraightThrough:
        """Return the straight-through estimator with a derivative of this name, and the noise that matches.

        Args:
            name: a value of :attr:`variant`.

        Raises:
            ValueError: the name is unknown.

        Example:
            >>> fk.StraightThrough.of_variant("identity_trust")
            StraightThrough(kind='identity', clip='trust', noise=None)
        """
        if name not in FORMS:
            raise ValueError(f"straight_through must be one of {', '.join(FORMS)}, got {name!r}")
        return cls(*FORMS[name])

    @property
    def distribution(self) -> str:
        """Distribution of the noise u."""
        return self.noise or KINDS[self.kind][1]

    @property
    def eps_bar(self) -> float:
        """Standard deviation of the noise in units of alpha."""
        return KINDS[self.kind][0]

    def epsilon(self, grid: Grid, epsilon_scale: float = 1.0) -> float:
        """Return eps, the standard deviation of the noise in units of the grid's delta.

        Args:
            grid: the grid that the noise is for.
            epsilon_scale: factor on the result.

        Example:
            >>> round(fk.StraightThrough("identity").epsilon(fk.Grid.uniform(2)), 4)
            0.2887
        """
        return epsilon_scale * self.eps_bar / grid.r

    def check_grid(self, grid: Grid) -> None:
        """Raise unless this straight-through estimator fits the grid.

        Args:
            grid: a rounding grid for ``"identity"``, ``Grid.sign()`` for the other kinds.

        Raises:
            TypeError: ``grid`` is no :class:`Grid`.
            ValueError: the two do not fit.

        Example:
            >>> fk.StraightThrough("tanh").check_grid(fk.Grid.sign())
        """
        if not isinstance(grid, Grid):
            raise TypeError(f"grid must be a Grid, got {type(grid).__name__}")
        if grid.is_sign == (self.kind == "identity"):
            raise ValueError(
                f"straight_through must be 'identity' for rounding grids and one of"
                f" {', '.join(kind for kind in KINDS if kind != 'identity')} for the sign grid,"
                f" got {self.kind!r} with {grid}"
            )
