"""Quantizer: how one kind of weight is quantized, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from .grid import Grid
from .scale import Scale
from .straight_through import StraightThrough


@dataclass(frozen=True)
class Quantizer:
    """How one kind of weight is quantized, and how gradients pass that.

    Args:
        grid: the values that a quantized weight may take, in units of its scale.
        scale: where each weight's scale comes from.
        straight_through: the derivative that gradients see, and the noise that goes with it. It must
            belong to ``grid``: ``"identity"`` to rounding grids, the other kinds to the sign grid.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``straight_through`` does not belong to ``grid``.
    """

    grid: Grid
    scale: Scale
    straight_through: StraightThrough

    def __post_init__(self) -> None:
        for name, kind in (("grid", Grid), ("scale", Scale), ("straight_through", StraightThrough)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                hint = " (Scale.fixed(alpha), say)" if kind is Scale else ""
                raise TypeError(f"{name} must be a {kind.__name__}{hint}, got {type(value).__name__}")
        self.straight_through.check_grid(self.grid)

    @property
    def epsilon(self) -> float:
        """The eps that the straight-through estimator fixes, in units of delta (contract section 3)."""
        return self.straight_through.epsilon(self.grid)
