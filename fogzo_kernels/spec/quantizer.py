"""Quantizer: how one kind of weight is quantized, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .checks import hinted
from .grid import Grid
from .hadamard import Hadamard, block_of
from .scale import LearnedScale, Scale
from .straight_through import StraightThrough


@dataclass(frozen=True)
class Quantizer:
    """How one kind of weight is quantized, and how gradients pass that.

    Args:
        grid: the values that a quantized weight may take, in units of its scale.
        scale: where each weight's scale comes from.
        straight_through: the derivative that gradients see, and the noise that goes with it. It must
            belong to ``grid``: ``"identity"`` to rounding grids, the other kinds to the sign grid.
        transform: what each row goes through before, ``Hadamard(128)``, say; grid and scale are then those of
            the rotated row. None: nothing.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``straight_through`` is not for ``grid``, or groups of the scale are not whole blocks.
    """

    grid: Grid
    scale: Scale
    straight_through: StraightThrough
    transform: Hadamard | None = None

    def __post_init__(self) -> None:
        for name, kind, example in PARTS:
            value = getattr(self, name)
            if not isinstance(value, kind):
                got = f"the str {value!r}" if isinstance(value, str) else type(value).__name__
                raise TypeError(f"{name} must be a {kind.__name__}, {example} say, got {got}")
        self.straight_through.check_grid(self.grid)
        block = block_of(self.transform)
        group = getattr(self.scale, "granularity", None)
        if block and isinstance(group, int) and group % block:
            raise ValueError(f"scale must have groups of whole blocks of {self.transform}, got {self.scale}")

    @property
    def block(self) -> int:
        """The size of the transform's blocks; 0 without one."""
        return block_of(self.transform)

    @property
    def learned(self) -> bool:
        """Whether alpha is a parameter."""
        return isinstance(self.scale, LearnedScale)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ops that quantize with a gradient."""
        return {"grid": self.grid, "straight_through": self.straight_through, "transform": self.transform}

    @property
    def epsilon(self) -> float:
        """The eps that the straight-through estimator fixes, in units of delta (contract section 3)."""
        return self.straight_through.epsilon(self.grid)

    def to_dict(self) -> dict[str, Any]:
        """Itself in dicts, strings and numbers, for JSON; of a scale that is no number, only its kind."""
        parts = {"grid": asdict(self.grid), "straight_through": asdict(self.straight_through)}
        block = {"transform": asdict(self.transform)} if self.transform else {}
        return {"version": VERSION, **parts, **block, "scale": self.scale.to_dict()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Quantizer:
        """The quantizer that :meth:`to_dict` gave; a scale that it could not hold raises when it is used.

        Raises:
            ValueError: it is not such a dict, or of another version.
        """
        if not isinstance(found, dict) or found.get("version") != VERSION:
            version = found.get("version") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"the quantizer must be of version {VERSION}, got {version}")
        try:
            grid, straight_through = Grid(**found["grid"]), StraightThrough(**found["straight_through"])
            transform = Hadamard(**found["transform"]) if found.get("transform") else None
            return cls(grid, Scale.from_dict(found["scale"]), straight_through, transform)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the quantizer must be as to_dict gives it, got {found}") from error


Quantizer.__init__ = hinted(  # type: ignore[method-assign]
    "Quantizer takes grid, scale and straight_through; fk.presets has ready ones, fk.presets.lsq(2) say"
)(Quantizer.__init__)

#: Of the form of :meth:`Quantizer.to_dict`.
VERSION = 1

PARTS = (
    ("grid", Grid, "Grid.uniform(2)"),
    ("scale", Scale, "Scale.fixed(alpha)"),
    ("straight_through", StraightThrough, 'StraightThrough("identity")'),
)
