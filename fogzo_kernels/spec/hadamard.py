"""The Hadamard transform: its blocks, and what makes it orthonormal (docs/contract.md, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import as_int

#: How many elements a block may have.
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


def factor(block: int) -> float:
    """block ** -0.5; not rounded to float32."""
    return math.sqrt(1.0 / block)


def check_block(block: int) -> int:
    """The int that ``block`` is; raise unless there are blocks of that size."""
    block = as_int("block", block)
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block}")
    return block


@dataclass(frozen=True)
class Hadamard:
    """The orthonormal Hadamard transform of each block of a row, before the row is quantized.

    It spreads a large value over its block, so that one scale fits the block (QuEST, arXiv 2502.05003, section
    3). Grid, scale and noise then belong to the transformed weight (contract, section 4).

    Args:
        block: number of elements of a block: 16, 32, 64, 128, 256, 512 or 1024. It must divide the length of a
            row.

    Raises:
        TypeError, ValueError: ``block`` is no int, or none of these.

    Example:
        >>> fk.presets.quest(4, block=64).transform == fk.Hadamard(64)
        True
    """

    block: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block(self.block))


def block_of(transform: Hadamard | None) -> int:
    """The elements of a block; 0 without a transform."""
    if transform is None:
        return 0
    if not isinstance(transform, Hadamard):
        raise TypeError(f"transform must be a Hadamard or None, got {type(transform).__name__}")
    return transform.block
