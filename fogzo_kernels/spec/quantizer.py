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
    """How one kind of weight is quantized, and how gradients pass the quantization.

    Args:
        grid: the values that a quantized weight may take, in units of its scale.
        scale: where the scale of each weight comes from.
        straight_through: the derivative that gradients see, and the noise that matches it. It must fit
            ``grid``: ``"identity"`` fits rounding grids, the other kinds fit the sign grid.
        transform: a transform of each row before it is quantized, such as ``Hadamard(128)``; grid and scale
            then belong to the transformed row. None: no transform.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``straight_through`` does not fit ``grid``, or a group of the scale is not made of whole
            blocks.

    Example:
        >>> q = fk.Quantizer(fk.Grid.ternary(), fk.Scale.absmean("row"), fk.StraightThrough("identity"))
        >>> model = torch.nn.Linear(8, 4)
        >>> fk.quantize_model(model, q).quantized[0].scales  # one per row
        4
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
        """Number of elements of the transform's blocks; 0 without a transform."""
        return block_of(self.transform)

    @property
    def learned(self) -> bool:
        """Whether alpha is a parameter that is trained."""
        return isinstance(self.scale, LearnedScale)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments ``grid``, ``straight_through`` and ``transform`` of the functional ops, as a dict."""
        return {"grid": self.grid, "straight_through": self.straight_through, "transform": self.transform}

    @property
    def epsilon(self) -> float:
        """The eps that the straight-through estimator fixes, in units of delta (contract, section 3)."""
        return self.straight_through.epsilon(self.grid)

    def to_dict(self) -> dict[str, Any]:
        """Return the quantizer as dicts, strings and numbers, for JSON.

        A scale from a tensor or a function keeps only its kind.

        Example:
            >>> q = fk.presets.bitnet()
            >>> fk.Quantizer.from_dict(q.to_dict()) == q
            True
        """
        parts = {"grid": asdict(self.grid), "straight_through": asdict(self.straight_through)}
        block = {"transform": asdict(self.transform)} if self.transform else {}
        return {"version": VERSION, **parts, **block, "scale": self.scale.to_dict()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Quantizer:
        """Return the quantizer of a dict from :meth:`to_dict`.

        A scale that the dict could not keep raises when it is used.

        Args:
            found: a result of :meth:`to_dict`.

        Raises:
            ValueError: the dict is no such result, or one of another version.

        Example:
            >>> fk.Quantizer.from_dict(fk.presets.quest(4).to_dict()).transform
            Hadamard(block=128)
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
