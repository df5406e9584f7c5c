"""Grid: the values a quantized weight may take (docs/contract.md, section 3), and the dtypes of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .checks import as_int, hinted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of latents, gradients and values
OUTPUTS = (*FLOATS, torch.int8)  # int8 holds codes


MADE_BY = "use a constructor of Grid: Grid.uniform(bits), Grid.half_offset(bits), Grid.sign() or Grid.ternary()"


@dataclass(frozen=True)
class Grid:
    """The values that a quantized weight may take: ``delta * (code + offset)`` for ``qmin <= code <= qmax``.

    ``delta = r * alpha`` is the distance between neighbouring values, and alpha the scale of the weight. Use
    :meth:`uniform`, :meth:`half_offset`, :meth:`sign` or :meth:`ternary`.

    Args:
        qmin: least code, an int >= -128.
        qmax: greatest code, an int <= 127.
        offset: 0 or 0.5.
        r: delta / alpha: 1 for rounding grids, 2 for the sign grid.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> grid = fk.Grid.uniform(2)
        >>> grid.qmin, grid.qmax, grid.offset, grid.levels, grid.bits, grid.is_sign
        (-2, 1, 0.0, 4, 2.0, False)
    """

    qmin: int
    qmax: int
    offset: float
    r: int

    def __post_init__(self) -> None:
        for name in ("qmin", "qmax"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an int, got {type(getattr(self, name)).__name__}")
        if not -128 <= self.qmin <= self.qmax <= 127:
            raise ValueError(
                f"qmin and qmax must satisfy -128 <= qmin <= qmax <= 127, got {self.qmin}, {self.qmax}"
            )
        if self.offset not in (0.0, 0.5):
            raise ValueError(f"offset must be 0 or 0.5, got {self.offset}")
        if self.r not in (1, 2):
            raise ValueError(f"r must be 1 or 2, got {self.r}")

    @property
    def levels(self) -> int:
        """Number of values of the grid."""
        return self.qmax - self.qmin + 1

    @property
    def bits(self) -> float:
        """Bits that a code carries, log2 of ``levels``; 2.0 for 4 levels, 1.58 for 3."""
        return math.log2(self.levels)

    @property
    def is_sign(self) -> bool:
        """Whether this is the grid of the two values -alpha and +alpha."""
        return self.r == 2

    @classmethod
    def uniform(cls, bits: int) -> Grid:
        """Return the grid of 2^bits values with 0 among them, in two's complement.

        Args:
            bits: 2 to 8. The values for 2 bits are -2, -1, 0 and 1 times alpha.

        Raises:
            TypeError, ValueError: ``bits`` is no int, or out of range.

        Example:
            >>> fk.Grid.uniform(4)
            Grid(qmin=-8, qmax=7, offset=0.0, r=1)
        """
        return _of_bits(cls, bits, 2, 0.0)

    @classmethod
    def half_offset(cls, bits: int) -> Grid:
        """Return the grid of 2^bits values with as many above 0 as below.

        Args:
            bits: 1 to 8. The values for 2 bits are -3/2, -1/2, 1/2 and 3/2 times alpha.

        Raises:
            TypeError, ValueError: ``bits`` is no int, or out of range.

        Example:
            >>> fk.Grid.half_offset(2)
            Grid(qmin=-2, qmax=1, offset=0.5, r=1)
        """
        return _of_bits(cls, bits, 1, 0.5)

    @classmethod
    def sign(cls) -> Grid:
        """Return the grid of the values -alpha and +alpha. The sign of 0 is +1.

        Example:
            >>> fk.Grid.sign().is_sign
            True
        """
        return cls(-1, 0, 0.5, 2)

    @classmethod
    def ternary(cls) -> Grid:
        """Return the grid of the values -alpha, 0 and +alpha.

        Example:
            >>> round(fk.Grid.ternary().bits, 2)
            1.58
        """
        return cls(-1, 1, 0.0, 1)


Grid.__init__ = hinted(MADE_BY)(Grid.__init__)  # type: ignore[method-assign]


def _of_bits(kind: type[Grid], bits: int, low: int, offset: float) -> Grid:
    bits = as_int("bits", bits)
    if not low <= bits <= 8:
        raise ValueError(f"bits must be in {low}..8, got {bits}")
    return kind(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, offset, 1)
